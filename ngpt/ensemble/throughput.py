"""Times batched training steps of several runs."""

import statistics
from collections.abc import Callable

from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import Dataset, open_dataset
from ngpt.ensemble.stack import Stack
from ngpt.ensemble.train import ensemble_incompatibility, train_step_together
from ngpt.system.timing import time_call
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.run import Run
from ngpt.training.throughput import benchmark_run


def measure_step_together(config: TrainConfig, count: int, *, warmup: int = 5, steps: int = 20) -> float:
    """Returns the total tokens per second of `count` runs trained as one program, from the median step time."""
    config = resolved(config)
    runs, take_step = steps_together(config, count)
    times = [time_call(take_step, runs[0].device) for _ in range(warmup + steps)]
    return count * config.tokens_per_step / statistics.median(times[warmup:])


def steps_together(config: TrainConfig, count: int) -> tuple[list[Run], Callable[[], object]]:
    """Sets up `count` runs of a resolved config; also returns a function that takes a step of all of them."""
    if count == 1:
        run = benchmark_run(config)
        return [run], lambda: train_step(run)
    runs = benchmark_runs(config, open_dataset(config.data), count)
    stack = Stack([run.model for run in runs])
    return runs, lambda: train_step_together(stack, runs)


def benchmark_runs(config: TrainConfig, dataset: Dataset, count: int) -> list[Run]:
    """Sets up runs of a resolved config that differ in their seeds, see `benchmark_run`."""
    if reason := ensemble_incompatibility([config]):
        raise ConfigError(reason)
    return [benchmark_run(override(config, {"seed": config.seed + k}), dataset=dataset) for k in range(count)]
