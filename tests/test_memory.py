"""The peak memory of one run among several in a process."""

import sys

import pytest
import torch

from ngpt.memory import peak_memory, reset_peak_memory

CPU = torch.device("cpu")
MEGABYTE = 1_000_000


def peak_of(megabytes: int) -> int:
    reset_peak_memory(CPU)
    block = torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)
    del block
    return peak_memory(CPU)


def test_a_run_that_needs_100_megabytes_more_reports_about_that_much_more() -> None:
    small = peak_of(1)
    assert 80 * MEGABYTE < peak_of(101) - small < 130 * MEGABYTE


def test_it_is_measured_in_bytes_and_at_least_what_torch_itself_needs() -> None:
    assert 50 * MEGABYTE < peak_of(1) < 50_000 * MEGABYTE


def test_a_small_run_after_a_large_one_reports_its_own_peak() -> None:
    if sys.platform != "linux":
        pytest.xfail("the peak of a process can be reset on Linux only")
    large, small = peak_of(200), peak_of(1)
    assert large - small > 150 * MEGABYTE
