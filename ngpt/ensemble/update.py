"""The optimizer steps and projections of several runs at once: what has one shape is one batch, whosever it is."""

import logging
from collections.abc import Sequence

from ngpt.optim.muon import Muon, step_muons
from ngpt.optim.projection import project
from ngpt.optim.schedule import is_due
from ngpt.system.memory import is_out_of_memory
from ngpt.training.loop import reduce_batch
from ngpt.training.run import Run, rollback_to_checkpoint

log = logging.getLogger(__name__)


def update_together(runs: Sequence[Run]) -> None:
    """What `ngpt.train.update` does for a run, for several: each by its own optimizers and with its own period.

    Where memory runs out all of them go back to their newest checkpoints, with smaller micro-batches.
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
        moved = [run.model for run in runs if is_due(run.state.step, run.config.project_every)]
        project(entry for model in moved for entry in model.sphere_weights())
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not any([reduce_batch(run) for run in runs]):  # a list: all of them give way
            raise
    log.warning("no memory for the optimizers' steps: going back to the newest checkpoints")
    for run in runs:
        microbatch_halvings = run.state.microbatch_halvings
        rollback_to_checkpoint(run)
        run.state.microbatch_halvings = microbatch_halvings
