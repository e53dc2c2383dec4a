"""Runs that take a second, and readers of the files they write."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import safetensors.numpy
import torch

from ngpt.data.dataset import Dataset
from ngpt.training.config import TrainConfig
from ngpt.training.loop import train
from ngpt.training.run import RunResult
from ngpt.training.state import Metrics

Result = TypeVar("Result")

TIMING = ("tokens_per_second", "peak_memory_bytes", "seconds", "train_seconds")  # these may differ between equal runs
AWKWARD = {  # intervals that divide neither each other nor the 8 steps
    "project_every": 3,
    "eval_every": 3,
    "tracker.log_every": 2,
    "checkpoint.every": 1,
    "schedule.warmup_steps": 2,
    "optim.weight_decay": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "ngpt-adamw": {"optim.name": "adamw"},
    "ngpt-muon": {"optim.name": "muon", "optim.lr_other": 0.02, "model.norm_mode": "ema"},
    "gpt": {"model.residual": "add", "model.mlp": "relu2", "model.softcap": 15.0, "data.order": "reservoir"},
    # Everything that changes from step to step without being learned.
    "scheduled": {
        "optim.name": "geodesic_muon",
        "model.alpha": 0.15,
        "model.alpha_final": 0.3,
        "model.norm_probability": 0.5,
        "model.norm_mode": "dotprod",
        "data.order": "shards",
    },
}


def finish(loop: Generator[Any, Any, Result]) -> Result:
    """Exhausts a generator and returns its return value."""
    while True:
        try:
            next(loop)
        except StopIteration as stop:
            return stop.value


def run(config: TrainConfig, out: Path, dataset: Dataset | None = None, *, resume: str | None = None) -> RunResult:
    """Trains to the end."""
    return finish(train(config, out, resume=resume, dataset=dataset))


def watch(
    config: TrainConfig, out: Path, dataset: Dataset, *, resume: str | None = None
) -> tuple[list[Metrics], RunResult]:
    """Trains to the end; also returns its evaluations."""
    loop, seen = train(config, out, resume=resume, dataset=dataset), []
    while True:
        try:
            seen.append(dict(next(loop)))
        except StopIteration as stop:
            return seen, stop.value


def untimed(row: Metrics) -> Metrics:
    return {name: value for name, value in row.items() if name not in TIMING}


def rows(out: Path) -> list[Metrics]:
    """The rows of `metrics.jsonl` without timing. A NaN fails the test."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [untimed(json.loads(line, parse_constant=pytest.fail)) for line in lines]


def weights(out: Path, step: int = 8) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(out / "checkpoints" / f"step_{step:07d}" / "model.safetensors")


def assert_equal_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def weight_difference(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs at step 8."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


class LimitedMemory:
    """Calls a function, but raises an out-of-memory error if `fails` returns True for the arguments."""

    def __init__(self, real: Callable[..., Any], *, fails: Callable[..., bool]) -> None:
        self.real, self.fails, self.failures = real, fails, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.fails(*arguments, **named):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.real(*arguments, **named)
