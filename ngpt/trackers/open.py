"""Opens the writers of a run: one for each tracking tool that its settings ask for."""

import contextlib
from collections.abc import Callable
from typing import Any

from ngpt.trackers.base import TrackedRun, Writer
from ngpt.trackers.config import TrackerConfig
from ngpt.trackers.wandb_run import resolve_mode

Rows = Callable[[], list[dict[str, Any]]]  # reads the rows that the run has logged so far


def open_writers(cfg: TrackerConfig, run: TrackedRun, rows: Rows, stack: contextlib.ExitStack) -> list[Writer]:
    """Opens the writers, which `stack` closes. Packages are imported only if they are used."""
    writers: list[Writer] = []
    if cfg.tensorboard:
        from ngpt.trackers.tensorboard_run import TensorBoardRun

        writers.append(stack.enter_context(TensorBoardRun(run)))
    if cfg.mlflow != "disabled":
        from ngpt.trackers.mlflow_run import MlflowRun

        writers.append(stack.enter_context(MlflowRun(run, cfg.mlflow, rows)))
    if cfg.trackio != "disabled":
        from ngpt.trackers.trackio_run import TrackioRun

        writers.append(stack.enter_context(TrackioRun(run, cfg.trackio, rows)))
    if (mode := resolve_mode(cfg.wandb, run.folder) if cfg.wandb == "auto" else cfg.wandb) != "disabled":
        from ngpt.trackers.wandb_run import WandbRun

        name = cfg.run_name or run.folder.name
        writers.append(stack.enter_context(WandbRun(run, mode=mode, name=name, job_type=cfg.job_type)))
    return writers
