"""Steps of several runs at once, against as many steps one after another."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import Dataset, open_dataset
from ngpt.ensemble.stack import Stack
from ngpt.ensemble.train import train_step_together, unstackable
from ngpt.system.device import pick_device
from ngpt.system.timing import compared, stopwatches, take_turns, timed, where
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.run import Run
from ngpt.training.throughput import prepared

AT_ONCE = (1, 2, 4, 8)
WORTH_IT = 1.1  # a ratio below it is within what single runs of this benchmark vary by


def vectorised(config: TrainConfig, *, seconds: float = 40.0) -> dict[str, Any]:
    """Whole steps of `ngpt.ensemble.train`, against as many of `ngpt.train` one after another in the same process.

    Returns, for each number of runs at once, under `at_once`: ms and reference_ms (of a step of all the runs together),
    best_ms, ratio, tokens_per_second and reference_tokens_per_second (summed over the runs), and kept_bytes and
    reference_kept_bytes (what a step keeps for its backward pass, which is most of the memory that it takes). One run
    shows what batching itself costs. And best (the number above one with the highest ratio), ratio (that one's) and
    worth_it (whether it is above 1.1).

    Raises:
        ConfigError: such runs cannot be trained at once.
    """
    config = resolved(config)
    if reason := unstackable([config]):
        raise ConfigError(reason)
    device = pick_device(config.device)
    found = {str(count): _figures(config, device, count, seconds / len(AT_ONCE)) for count in AT_ONCE}
    best = max((count for count in found if count != "1"), key=lambda count: found[count]["ratio"])
    ratio = found[best]["ratio"]
    best_figures = {"best": int(best), "ratio": ratio, "worth_it": ratio > WORTH_IT}
    return best_figures | {"at_once": found} | where(device, config.dtype)


def step_together(config: TrainConfig, count: int, *, warmup: int = 5, steps: int = 20) -> float:
    """Tokens per second that so many runs of one graph make together: of the median of whole steps.

    Raises:
        ConfigError: such runs cannot be trained at once.
    """
    config = resolved(config)
    if reason := unstackable([config]):
        raise ConfigError(reason)
    runs = _runs(config, open_dataset(config.data), count)
    stack = Stack([run.model for run in runs])
    times = [timed(lambda: train_step_together(stack, runs), runs[0].device) for _ in range(warmup + steps)][warmup:]
    return count * config.tokens_per_step / statistics.median(times)


def _runs(config: TrainConfig, dataset: Dataset, count: int) -> list[Run]:
    return [prepared(override(config, {"seed": config.seed + k}), dataset=dataset) for k in range(count)]


def _figures(config: TrainConfig, device: torch.device, count: int, seconds: float) -> dict[str, Any]:
    dataset = open_dataset(config.data)
    alone = prepared(config, dataset=dataset)
    runs = _runs(config, dataset, count)
    stack = Stack([run.model for run in runs])

    def one_by_one() -> None:  # of one run, whose weights stay in the cache as those of a run alone do
        for _ in range(count):
            train_step(alone)

    contestants = {"together": lambda: train_step_together(stack, runs), "one_by_one": one_by_one}
    times = take_turns(stopwatches(contestants, device), seconds=seconds)
    figures, tokens = compared(times["together"], times["one_by_one"]), count * config.tokens_per_step
    figures |= {"tokens_per_second": tokens / figures["ms"] * 1000}
    figures |= {"reference_tokens_per_second": tokens / figures["reference_ms"] * 1000}
    kept = _kept_bytes(contestants["together"])
    return figures | {"kept_bytes": kept, "reference_kept_bytes": _kept_bytes(lambda: train_step(alone))}


def _kept_bytes(step: Callable[[], object]) -> int:
    """Bytes that autograd holds at the end of a forward pass: exact, where a process's peak is what malloc makes it."""
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        step()
    return sum(held.values())
