"""Times training steps: tokens per second, and the share of the FLOP/s of a large matrix product."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.model.flops import flops_per_token
from ngpt.system.device import DTYPES
from ngpt.system.memory import peak_memory
from ngpt.system.timing import gemm_flops, machine_info, time_call
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.run import Run, set_up

SCHEDULE_STEPS = 100_000  # more than any benchmark takes


def measure_step(
    config: TrainConfig, *, dataset: Dataset | None = None, warmup: int = 5, steps: int = 20, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Times whole training steps: data, forward, backward, optimizer, projection; several ranks call this together.

    Returns tokens_per_second and step_ms (medians), gemm_tflops (the rate of a large matrix product), mfu (the share of
    that rate that the model's FLOPs reach), peak_memory_bytes, device, dtype, compiled and threads.
    """
    config = resolved(config)
    run = benchmark_run(config, dataset=dataset, ranks=ranks)
    times = [time_call(lambda: train_step(run), run.device) for _ in range(warmup + steps)][warmup:]
    return step_speed(config, run.device, statistics.median(times)) | {"peak_memory_bytes": peak_memory(run.device)}


def benchmark_run(config: TrainConfig, *, dataset: Dataset | None = None, ranks: Ranks = ALONE, **changes: Any) -> Run:
    """Sets up a run of a resolved config that writes nothing and has a long schedule; `changes` override settings."""
    with tempfile.TemporaryDirectory() as folder:
        longer = override(config, {"steps": SCHEDULE_STEPS} | changes)
        return set_up(longer, Path(folder), resume=None, dataset=dataset, ranks=ranks)


def step_speed(config: TrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Returns the speed of a step that took `seconds`, and of a large matrix product, which is measured now."""
    rate, ceiling = config.tokens_per_step / seconds, gemm_flops(device, DTYPES[config.dtype])
    return {
        "tokens_per_second": rate,
        "step_ms": seconds * 1000,
        "gemm_tflops": ceiling / 1e12,
        "mfu": rate * flops_per_token(config.model) / ceiling,
        "compiled": config.compile,
        **machine_info(device, config.dtype),
    }
