"""The peak memory of one run among several in a process, and trying again with less of it."""

import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from ngpt.system.memory import (
    configure_allocator,
    is_out_of_memory,
    peak_memory,
    reset_peak_memory,
    retry_on_oom,
)

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


# In a process of its own: torch looks once. `hg` says that the kernel was asked for huge pages, see proc_pid_smaps(5).
PAGES = """
import sys, torch
from ngpt.system.memory import configure_allocator

if sys.argv[1] == "huge":
    configure_allocator()
tensor = torch.ones(100_000_000, dtype=torch.uint8)
middle, holds_it = tensor.data_ptr() + len(tensor) // 2, False
for line in open("/proc/self/smaps"):
    first, *words = line.split()
    if "-" in first:
        low, high = (int(end, 16) for end in first.split("-"))
        holds_it = low <= middle < high
    elif first == "VmFlags:" and holds_it:
        print("hg" in words)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_a_setting_of_the_user_about_huge_pages_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    configure_allocator()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    configure_allocator()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


# A tensor is freed below some that stay, after glibc has seen that larger ones come and go: those are aligned to 2 MiB
# where huge pages are asked for, so its own threshold is anywhere from their size to 2 MiB more.
HOLES = """
import sys, torch
from ngpt.system.memory import configure_allocator

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

if sys.argv[1] == "settled":
    configure_allocator()
torch.ones(30_000_000, dtype=torch.uint8)
large = torch.ones(20_000_000, dtype=torch.uint8)
stay = [torch.ones(100_000, dtype=torch.uint8) for _ in range(100)]  # more than fit into holes below it
before = resident()
del large
print(before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="this is about glibc")
@pytest.mark.parametrize("huge_pages", ["0", "1"])
def test_a_large_tensor_is_released_whatever_lies_above_it_on_the_heap(
    huge_pages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given_back(kind: str) -> int:
        run = subprocess.run([sys.executable, "-c", HOLES, kind], capture_output=True, text=True, check=True)
        return int(run.stdout)

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", huge_pages)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert given_back("settled") > 15_000 > 5_000 > given_back("as it was")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "40000000")
    assert given_back("settled") < 5_000, "what the user says stays"


@pytest.mark.slow
@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel knows no huge pages")
def test_huge_pages_are_enabled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(kind: str) -> str:
        run = subprocess.run([sys.executable, "-c", PAGES, kind], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert (asked("huge"), asked("small")) == ("True", "False")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert asked("huge") == "False", "what the user says stays"


# ---- when there is none left -----------------------------------------------------------------------------------------


def shortage(words: str) -> Exception:
    return RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {words} allocate 8 bytes. Error code 12")


def compiler() -> None:
    """Stands for the backend of torch.compile."""


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (shortage("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), False),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 64 GiB"), True),
        (RuntimeError("HIP error: out of memory"), True),
        (RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (BackendCompilerFailed(compiler, torch.OutOfMemoryError("CUDA out of memory."), None), True),
        (BackendCompilerFailed(compiler, MemoryError(), None), True),
        (BackendCompilerFailed(compiler, ValueError("no such operator"), None), False),
        (InductorError(RuntimeError("Triton Error [CUDA]: out of memory"), None), True),
        (InductorError(BackendCompilerFailed(compiler, MemoryError(), None), None), True),
        (caused_by(RuntimeError("the step failed"), MemoryError()), True),
        (caused_by(RuntimeError("the step failed"), KeyError("wte")), False),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_real_errors_of_torch_and_numpy_are_recognized() -> None:
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


def test_an_attempt_is_made_smaller_until_it_fits() -> None:
    sizes, tried = iter([4, 2, 1]), []
    state = {"size": 8}

    def attempt() -> int:
        tried.append(state["size"])
        if state["size"] > 2:
            raise torch.OutOfMemoryError
        return state["size"]

    def reduce_batch() -> bool:
        state["size"] = next(sizes)
        return True

    assert retry_on_oom(attempt, reduce_batch, CPU) == 2
    assert tried == [8, 4, 2]


def test_memory_of_a_failed_attempt_is_released_before_the_next() -> None:
    """Its tensors hang on the traceback, and that on the exception."""
    alive: list[weakref.ref[torch.Tensor]] = []
    found: list[int] = []

    def attempt() -> None:
        found.append(sum(one() is not None for one in alive))
        held = torch.ones(10)
        alive.append(weakref.ref(held))
        if len(alive) < 4:
            raise torch.OutOfMemoryError

    retry_on_oom(attempt, lambda: True, CPU)
    assert found == [0, 0, 0, 0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("else"), RuntimeError("else")])
def test_other_errors_are_raised_unchanged(error: Exception) -> None:
    def attempt() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        retry_on_oom(attempt, lambda: False, CPU)
    assert caught.value is error
