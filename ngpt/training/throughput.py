"""Timed training steps: tokens per second, and the share of what a large matrix product reaches."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.model.flops import flops_per_token
from ngpt.system.device import DTYPES
from ngpt.system.memory import peak_memory
from ngpt.system.timing import gemm_flops, timed, where
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.run import Run, set_up

ENOUGH = 100_000  # steps that no benchmark makes, so that no schedule comes to its end


def measure_step(
    config: TrainConfig, *, dataset: Dataset | None = None, warmup: int = 5, steps: int = 20
) -> dict[str, Any]:
    """Times whole training steps: data, forward, backward, optimizer, projection.

    Returns tokens_per_second and step_ms (medians), gemm_tflops (see `gemm_flops`), mfu (the model's FLOPs over what
    the matrix product would have done in that time), peak_memory_bytes, device, dtype, compiled and threads.
    """
    config = resolved(config)
    run = benchmark_run(config, dataset=dataset)
    times = [timed(lambda: train_step(run), run.device) for _ in range(warmup + steps)][warmup:]
    return step_speed(config, run.device, statistics.median(times)) | {"peak_memory_bytes": peak_memory(run.device)}


def benchmark_run(config: TrainConfig, *, dataset: Dataset | None = None, **changes: Any) -> Run:
    """A run of a resolved config that writes nothing and whose schedule never ends; settings may be changed."""
    with tempfile.TemporaryDirectory() as folder:
        return set_up(override(config, {"steps": ENOUGH} | changes), Path(folder), resume=None, dataset=dataset)


def step_speed(config: TrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """The figures of a step that took so many seconds, beside the machine's ceiling in the same run."""
    rate, ceiling = config.tokens_per_step / seconds, gemm_flops(device, DTYPES[config.dtype])
    return {
        "tokens_per_second": rate,
        "step_ms": seconds * 1000,
        "gemm_tflops": ceiling / 1e12,
        "mfu": rate * flops_per_token(config.model) / ceiling,
        "compiled": config.compile,
        **where(device, config.dtype),
    }
