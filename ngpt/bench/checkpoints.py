"""Measures the cost of a checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ngpt.config.base import override
from ngpt.system.timing import compare_times, interleave, machine_info, timers
from ngpt.training.checkpoint import checkpoint_folders
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.saving import save
from ngpt.training.throughput import benchmark_run
from ngpt.training.tracker import Tracker


def checkpoint(config: TrainConfig, *, seconds: float = 10.0) -> dict[str, Any]:
    """Compares a checkpoint (with digests, syncs and the removal of old ones) with torch.save of the same state.

    Returns ms, best_ms, reference_ms, ratio; saved_bytes; step_ms (of a training step) and share (checkpoint time over
    training time, with one checkpoint every `checkpoint.every` steps).
    """
    config = override(resolved(config), {"tracker.wandb": "disabled"})
    run = benchmark_run(config)
    with tempfile.TemporaryDirectory() as folder:
        run.out_dir = Path(folder)

        def plain_save() -> None:
            optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
            torch.save({"model": run.model.state_dict(), "optimizers": optimizers}, run.out_dir / "plain.pt")

        with Tracker(config.tracker, run.out_dir, settings={}) as tracker:
            variants = {"step": lambda: train_step(run), "ours": lambda: save(run, tracker), "plain": plain_save}
            times = interleave(timers(variants, run.device), seconds=seconds)
        newest = checkpoint_folders(run.out_dir / "checkpoints")[-1]
        size = sum(path.stat().st_size for path in newest.iterdir())
    metrics = compare_times(times["ours"], times["plain"])
    step_ms = float(np.median(times["step"])) * 1000
    share = metrics["ms"] / (config.checkpoint.every * step_ms)
    return metrics | {"saved_bytes": size, "step_ms": step_ms, "share": share} | machine_info(run.device, config.dtype)
