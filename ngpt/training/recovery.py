"""Recovery of a run that runs out of memory (`on_oom`), or whose loss or gradient is not finite (`nonfinite`).

Each recovery is counted in the `TrainState`, so a resumed run continues as an uninterrupted one would.
"""

import logging
from collections.abc import Sequence

from ngpt.system.memory import free_memory
from ngpt.training.checkpoint import newest_checkpoint
from ngpt.training.run import Run, build_run_optimizers, initial_model, restore
from ngpt.training.state import TrainState

log = logging.getLogger(__name__)


def can_reduce_batch(run: Run) -> bool:
    """Whether `on_oom` allows smaller batches, and the ranks can divide them."""
    if run.config.on_oom == "fail" or run.micro_batch_size == 1:
        return False
    return run.config.on_oom != "halve_batch" or run.batch_size // 2 % run.ranks.count == 0


def reduce_batch(run: Run) -> bool:
    """Halves the micro-batch, and the batch if `on_oom` is halve_batch; False if `can_reduce_batch` is."""
    before = run.micro_batch_size
    if not can_reduce_batch(run):
        return False
    run.state.microbatch_halvings += 1
    if run.config.on_oom == "halve_batch":  # changes the result (source report 000, section 8)
        run.state.batch_halvings += 1
    run.model.zero_grad(set_to_none=True)
    run.clock.discard_step()
    now = f"{run.micro_batch_size}, in batches of {run.batch_size}"
    log.warning("step %d: out of memory with micro-batches of %d; now %s", run.state.step, before, now)
    return True


def reduce_batches(runs: Sequence[Run]) -> bool:
    """Reduces the batch of every run whose `on_oom` policy allows it; returns whether any batch became smaller."""
    return any([reduce_batch(run) for run in runs])  # a list, because `any` stops at the first success


def reduce_eval_batch(run: Run) -> bool:
    """Halves the batch size of evaluation; False if it is one sequence or `on_oom` is fail. Results do not change."""
    if run.config.on_oom == "fail" or run.eval_batch_size == 1:
        return False
    run.state.eval_halvings += 1
    log.warning("step %d: out of memory in evaluation; now %d sequences", run.state.step, run.eval_batch_size)
    return True


def handle_nonfinite(run: Run) -> bool:
    """Skips the step or rolls back, depending on `nonfinite.policy`; returns whether the run continues."""
    state, policy, limit = run.state, run.config.nonfinite.policy, run.config.nonfinite.max
    if policy == "skip":
        state.skipped_steps += 1
        state.recent.pop()  # a mean over a NaN would be NaN
        return state.skipped_steps <= limit
    if policy == "fail" or state.rollbacks == limit:
        return False
    # As PaLM did after loss spikes, skips the batches since the checkpoint (arXiv 2204.02311, section 5.1).
    count, next_batch = state.rollbacks + 1, state.step + state.skipped_batches
    log.warning("step %d: not finite; rolling back to the newest checkpoint (%d of %d)", state.step, count, limit)
    rollback_to_checkpoint(run)
    state.rollbacks, state.skipped_batches = count, next_batch - state.step
    return True


def rollback_to_checkpoint(run: Run) -> None:
    """Restores the newest intact checkpoint, or restarts the run if it has no checkpoint."""
    run.restarts += 1
    run.model.zero_grad(set_to_none=True)
    run.optimizers = build_run_optimizers(run.replica, run.config)
    free_memory(run.device)
    spent = {"seconds": run.state.seconds, "train_seconds": run.state.train_seconds}
    if checkpoint := run.ranks.from_first(lambda: newest_checkpoint(run.out_dir / "checkpoints")):
        restore(run, checkpoint)
    else:
        run.replica.load_state_dict(initial_model(run.config, run.dataset).state_dict())
        run.state.restore(TrainState())
    vars(run.state).update(spent)  # the steps that are lost have taken their time


def rollback_with_smaller_batches(run: Run) -> None:
    """Rolls back after memory ran out, but keeps the batch sizes that `reduce_batch` has halved."""
    microbatch_halvings, batch_halvings = run.state.microbatch_halvings, run.state.batch_halvings
    rollback_to_checkpoint(run)
    run.state.microbatch_halvings, run.state.batch_halvings = microbatch_halvings, batch_halvings
