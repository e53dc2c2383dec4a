"""What a run does when memory runs out (`on_oom`) and when a loss or gradient is not finite (`nonfinite`).

Everything done is counted in the `TrainState`, which is saved with every checkpoint. So a resumed run continues as an
undisturbed one would, and its result reports what happened.
"""

import logging

from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import build_optimizers
from ngpt.system.memory import free_memory
from ngpt.training.checkpoint import newest_checkpoint
from ngpt.training.run import Run, restore
from ngpt.training.state import TrainState

log = logging.getLogger(__name__)


def reduce_batch(run: Run) -> bool:
    """Halves the micro-batch after training ran out of memory; False if that is not possible or not allowed.

    The batch stays the same, and so does its gradient but for rounding, unless the policy is to halve the batch too.
    """
    before = run.micro_batch_size
    if run.config.on_oom == "fail" or before == 1:
        return False
    run.state.microbatch_halvings += 1
    if run.config.on_oom == "halve_batch":  # which changes the result (source report 000, section 8)
        run.state.batch_halvings += 1
    run.model.zero_grad(set_to_none=True)
    run.clock.discard_step()
    now = f"{run.micro_batch_size}, in batches of {run.batch_size}"
    log.warning("step %d: out of memory with micro-batches of %d; now %s", run.state.step, before, now)
    return True


def reduce_eval_batch(run: Run) -> bool:
    """Halves the evaluation batch, which does not change the result; False if that is not possible or not allowed."""
    if run.config.on_oom == "fail" or run.eval_batch_size == 1:
        return False
    run.state.eval_halvings += 1
    log.warning("step %d: out of memory in evaluation; now %d sequences", run.state.step, run.eval_batch_size)
    return True


def handle_nonfinite(run: Run) -> bool:
    """Skips the step or rolls back, as the policy says; returns whether the run continues."""
    state, policy, limit = run.state, run.config.nonfinite.policy, run.config.nonfinite.max
    if policy == "skip":
        state.skipped_steps += 1
        state.recent.pop()  # a mean over a NaN would be NaN
        return state.skipped_steps <= limit
    if policy == "fail" or state.rollbacks == limit:
        return False
    # PaLM got around its loss spikes by skipping the batches since the checkpoint (arXiv 2204.02311, section 5.1).
    count, next_batch = state.rollbacks + 1, state.step + state.skipped_batches
    log.warning("step %d: not finite; rolling back to the newest checkpoint (%d of %d)", state.step, count, limit)
    rollback_to_checkpoint(run)
    state.rollbacks, state.skipped_batches = count, next_batch - state.step
    return True


def rollback_to_checkpoint(run: Run) -> None:
    """Restores the newest intact checkpoint, or the start of the run if there is none."""
    run.restarts += 1
    run.model.zero_grad(set_to_none=True)
    run.optimizers = build_optimizers(run.model, run.config.optim)  # without moments
    free_memory(run.device)
    if checkpoint := newest_checkpoint(run.out_dir / "checkpoints"):
        restore(run, checkpoint)
    else:
        run.model.load_state_dict(GPT(run.config.model, seed=run.config.seed).state_dict())
        run.state.restore(TrainState())


def rollback_with_smaller_batches(run: Run) -> None:
    """Rolls back after memory ran out, and keeps the halvings that `reduce_batch` has decided on."""
    microbatch_halvings, batch_halvings = run.state.microbatch_halvings, run.state.batch_halvings
    rollback_to_checkpoint(run)
    run.state.microbatch_halvings, run.state.batch_halvings = microbatch_halvings, batch_halvings
