"""Compares batched training of several runs with training them sequentially."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ngpt.data.dataset import Dataset, open_dataset
from ngpt.ensemble.stack import Stack
from ngpt.ensemble.throughput import benchmark_runs
from ngpt.ensemble.train import train_step_together
from ngpt.system.device import pick_device
from ngpt.system.timing import compare_times, interleave, machine_info, timers
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.throughput import benchmark_run

RUN_COUNTS = (1, 2, 4, 8)
WORTH_IT = 1.1  # ratios up to here are within the noise of this benchmark


def vectorised(config: TrainConfig, *, seconds: float = 40.0) -> dict[str, Any]:
    """Compares one batched step of K runs of one graph with K sequential steps of single runs.

    Returns under at_once, for each K: ms and reference_ms (of one step of all K runs), best_ms, ratio,
    tokens_per_second and reference_tokens_per_second (summed over the runs), and kept_bytes and reference_kept_bytes
    (saved for the backward pass, which is most of the memory of a step). K = 1 shows the overhead of batching.
    Also returns best (the K above 1 with the highest ratio), ratio (of that K) and worth_it (whether it exceeds 1.1).

    Raises:
        ConfigError: such runs cannot be trained together.
    """
    config = resolved(config)
    dataset, device = open_dataset(config.data), pick_device(config.device)
    measured = {str(count): _compare(config, dataset, count, seconds / len(RUN_COUNTS)) for count in RUN_COUNTS}
    best = max((count for count in measured if count != "1"), key=lambda count: measured[count]["ratio"])
    ratio = measured[best]["ratio"]
    summary = {"best": int(best), "ratio": ratio, "worth_it": ratio > WORTH_IT}
    return summary | {"at_once": measured} | machine_info(device, config.dtype)


def _compare(config: TrainConfig, dataset: Dataset, count: int, seconds: float) -> dict[str, Any]:
    runs = benchmark_runs(config, dataset, count)
    single = benchmark_run(config, dataset=dataset)
    stack = Stack([run.model for run in runs])

    def sequential() -> None:  # steps of one run, so that its weights stay in the CPU cache, as in real training
        for _ in range(count):
            train_step(single)

    variants = {"batched": lambda: train_step_together(stack, runs), "sequential": sequential}
    times = interleave(timers(variants, single.device), seconds=seconds)
    metrics, tokens = compare_times(times["batched"], times["sequential"]), count * config.tokens_per_step
    metrics |= {"tokens_per_second": tokens / metrics["ms"] * 1000}
    metrics |= {"reference_tokens_per_second": tokens / metrics["reference_ms"] * 1000}
    batched, single_step = _saved_bytes(variants["batched"]), _saved_bytes(lambda: train_step(single))
    return metrics | {"kept_bytes": batched, "reference_kept_bytes": single_step}


def _saved_bytes(step: Callable[[], object]) -> int:
    """Counts the bytes that autograd saves for the backward pass. Peak memory would also depend on the allocator."""
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        step()
    return sum(saved.values())
