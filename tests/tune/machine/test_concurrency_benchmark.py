"""Trials that train at the same time: real processes with real steps on this machine's device."""

import os

import pytest

from ngpt.config.base import override
from ngpt.data.dataset import prepare
from ngpt.system.memory import peak_memory
from ngpt.training.config import TrainConfig
from tune.machine.concurrency_benchmark import (
    FREE,
    CalibrationError,
    ThroughputPoint,
    describe_device,
    measure_concurrent_trials,
)
from tune.machine.environment import total_memory


def alone(count: int) -> int:
    return 1


@pytest.mark.slow
def test_a_second_trial_runs_beside_the_first_and_both_are_counted(tiny: TrainConfig) -> None:
    prepare(tiny.data)
    lines: list[str] = []
    curve = measure_concurrent_trials(tiny, counts=(1, 2), threads=alone, seconds=0.3, log=lines.append)
    assert [point.trials for point in curve] == [1, 2]
    assert all(point.tokens_per_second > 0 for point in curve)
    # A process that trains has at least the interpreter and torch in memory, and fits on a machine that runs tests.
    assert all(50e6 < point.memory_bytes < total_memory() for point in curve)
    assert all(point.room == int(total_memory() * (1 - FREE) / point.memory_bytes) for point in curve)
    assert [line.split(":")[0] for line in lines] == ["1 at once", "2 at once"]


@pytest.mark.slow
def test_an_error_of_a_trial_is_told_in_its_own_words(tiny: TrainConfig) -> None:
    prepare(tiny.data)
    longer = override(tiny, {"model.block_size": 1 << 17})  # than the whole corpus
    with pytest.raises(CalibrationError, match="tokens"):
        measure_concurrent_trials(longer, counts=(1,), threads=alone)


def test_a_point_fits_where_there_is_room_for_all_of_its_trials() -> None:
    point = ThroughputPoint(trials=4, threads=1, tokens_per_second=1.0, memory_bytes=1, room=4)
    assert point.fits
    assert not ThroughputPoint(5, 1, 1.0, 1, 4).fits


def test_a_device_is_known_by_host_name_and_version(tiny: TrainConfig) -> None:
    import torch

    described = describe_device(tiny, 1)
    assert f"torch {torch.__version__}" in described and os.uname().nodename in described
    assert peak_memory(torch.device("cpu")) > 0
