"""Trials that train at the same time, in real processes with real steps on this machine's device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import override
from ngpt.data.dataset import prepare
from ngpt.training.checkpoint import checkpoint_folders
from ngpt.training.config import TrainConfig, resolved
from tests.helpers.fake_gpus import GIB, FakeGpus
from tune.machine import concurrency_benchmark
from tune.machine.concurrency_benchmark import (
    RESERVED_MEMORY,
    CalibrationError,
    ThroughputPoint,
    measure_concurrent_trials,
    room_for,
)
from tune.machine.environment import total_memory
from tune.trials.trial import tensor_bytes


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


class PlayedPipe:
    """The end of a child's pipe, at which the test plays the parent."""

    def __init__(self, *commands: tuple[float, float, int, bool]) -> None:
        self._commands: Iterator[tuple[float, float, int, bool]] = iter(commands)
        self.answers: list[dict[str, Any]] = []

    def send(self, answer: dict[str, Any]) -> None:
        self.answers.append(answer)

    def recv(self) -> tuple[float, float, int, bool]:
        try:
            return next(self._commands)
        except StopIteration:
            raise EOFError from None


def answer(config: TrainConfig, *, together: int = 1, save: bool = False) -> dict[str, Any]:
    """What a child process answers to one command."""
    pipe = PlayedPipe((0.0, 0.0, 1, save))
    concurrency_benchmark._train_on_command(resolved(config), 1, together, pipe, ())  # type: ignore[arg-type]
    return pipe.answers[-1]


@pytest.mark.usefixtures("signals")
def test_a_group_is_measured_as_it_will_run(tiny: TrainConfig, fake_gpus: Callable[..., FakeGpus]) -> None:
    prepare(tiny.data)
    config, tokens = override(tiny, {"device": "auto"}), 3 * tiny.tokens_per_step
    fake = fake_gpus(count=1, memory_bytes=GIB)
    alone = answer(config)
    fake.release_unused()
    group = answer(config, together=3)
    assert (alone["tokens"], group["tokens"]) == (tokens, 3 * tokens)
    assert group["peak"] == 3 * alone["peak"] and group["in_use"] == group["peak"] + fake.machine.context_bytes


@pytest.mark.usefixtures("signals")
def test_memory_includes_that_of_an_evaluation_and_a_checkpoint(
    tiny: TrainConfig, fake_gpus: Callable[..., FakeGpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tiny.data)
    fake, needed = fake_gpus(count=1, memory_bytes=GIB), {"evaluate": 1 << 25, "save": 1 << 26}
    saved: list[list[str]] = []

    def evaluate(run: Any, *, last: bool) -> None:
        fake.hold(needed["evaluate"])
        real[0](run, last=last)

    def save(run: Any) -> None:
        fake.hold(needed["save"])
        real[1](run)
        saved.append([path.name for path in checkpoint_folders(run.out_dir / "checkpoints")])

    real = concurrency_benchmark.evaluate_run, concurrency_benchmark.save_run
    monkeypatch.setattr(concurrency_benchmark, "evaluate_run", evaluate)
    monkeypatch.setattr(concurrency_benchmark, "save_run", save)
    config = override(tiny, {"device": "auto"})
    assert answer(config)["peak"] == needed["evaluate"] and saved == []
    assert answer(config, save=True)["peak"] == needed["save"] and len(saved) == len(saved[0]) == 1


@given(total=st.integers(1 << 31, 1 << 38), tensors=st.integers(1 << 20, 1 << 36), context=st.integers(0, 1 << 30))
def test_trials_that_fit_have_room_below_their_limit(total: int, tensors: int, context: int) -> None:
    """Also on a small card, of which the contexts of many processes take a large part."""
    room = room_for(tensors + context, tensors=tensors, total=total, has_limit=True)
    for packed in range(2, min(room, 32) + 1):
        assert tensors <= tensor_bytes(total, packed)
        assert packed * (tensors + context) <= total
    more = room + 1
    is_full = more * (tensors + context) > 0.899 * total  # not at the boundary, where floats round
    assert room == 0 or is_full or tensors > tensor_bytes(total, more)
