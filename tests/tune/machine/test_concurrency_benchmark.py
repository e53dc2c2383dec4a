"""Trials that train at the same time, in real processes with real steps on this machine's device."""

import pytest

from ngpt.config.base import override
from ngpt.data.dataset import prepare
from ngpt.training.config import TrainConfig
from tune.machine.concurrency_benchmark import (
    RESERVED_MEMORY,
    CalibrationError,
    ThroughputPoint,
    measure_concurrent_trials,
)
from tune.machine.environment import total_memory


def one_thread(n_trials: int) -> int:
    return 1


@pytest.mark.slow
def test_a_second_trial_runs_beside_the_first_and_both_are_counted(tiny: TrainConfig) -> None:
    prepare(tiny.data)
    lines: list[str] = []
    curve = measure_concurrent_trials(tiny, counts=(1, 2), threads=one_thread, seconds=0.3, log=lines.append)
    assert [point.trials for point in curve] == [1, 2]
    assert all(point.tokens_per_second > 0 for point in curve)
    # A process that trains holds at least the interpreter and torch, and fits on a machine that runs tests.
    assert all(50e6 < point.memory_bytes < total_memory() for point in curve)
    assert all(point.room == int(total_memory() * (1 - RESERVED_MEMORY) / point.memory_bytes) for point in curve)
    assert [line.split(":")[0] for line in lines] == ["1 concurrent", "2 concurrent"]


@pytest.mark.slow
def test_the_error_of_a_trial_is_raised_with_its_message(tiny: TrainConfig) -> None:
    prepare(tiny.data)
    too_long = override(tiny, {"model.block_size": 1 << 17})  # longer than the corpus
    with pytest.raises(CalibrationError, match="tokens"):
        measure_concurrent_trials(too_long, counts=(1,), threads=one_thread)


@pytest.mark.parametrize(("trials", "fits"), [(4, True), (5, False)])
def test_a_point_fits_if_there_is_room_for_all_of_its_trials(trials: int, fits: bool) -> None:
    point = ThroughputPoint(trials, threads=1, tokens_per_second=1.0, memory_bytes=1, room=4)
    assert point.fits is fits
