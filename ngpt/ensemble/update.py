"""Batches the optimizer steps and projections of several runs, across tensors of equal shape."""

import logging
from collections.abc import Sequence

from ngpt.optim.muon import Muon, step_muons
from ngpt.optim.projection import project
from ngpt.optim.schedule import is_due
from ngpt.system.memory import is_out_of_memory
from ngpt.training.recovery import reduce_batch, rollback_with_smaller_batches
from ngpt.training.run import Run

log = logging.getLogger(__name__)


def update_together(runs: Sequence[Run]) -> None:
    """Like `ngpt.training.loop.update`, for several runs, each with its own optimizers and projection period.

    If memory runs out, all runs roll back to their newest checkpoints and continue with smaller micro-batches.
    """
    if not runs:
        return
    optimizers = [optimizer for run in runs for optimizer in run.optimizers]
    try:
        with runs[0].autocast:
            step_muons([optimizer for optimizer in optimizers if isinstance(optimizer, Muon)])
            for optimizer in optimizers:
                if not isinstance(optimizer, Muon):
                    optimizer.step()
        due = [run.model for run in runs if is_due(run.state.step, run.config.project_every)]
        project(entry for model in due for entry in model.sphere_weights())
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not reduce_batches(runs):
            raise
    log.warning("no memory for the optimizers; rolling back to the newest checkpoints")
    for run in runs:
        rollback_with_smaller_batches(run)


def reduce_batches(runs: Sequence[Run]) -> bool:
    """Reduces the batch of every run whose `on_oom` policy allows it; returns whether any batch became smaller."""
    return any([reduce_batch(run) for run in runs])  # a list, because `any` stops at the first success
