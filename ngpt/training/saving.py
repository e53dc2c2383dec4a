"""When a run saves a checkpoint, and what happens if it cannot."""

import contextlib
import logging
from collections.abc import Iterator

from ngpt.config.base import flatten
from ngpt.data.tokens.tokenizer import MODEL_FILE
from ngpt.optim.schedule import is_due
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import is_out_of_memory, retry_on_oom
from ngpt.training.checkpoint import checkpoint_folders, save_checkpoint
from ngpt.training.run import Run, identity
from ngpt.training.tracker import Tracker

log = logging.getLogger(__name__)


@contextlib.contextmanager
def checkpoint_on_stop(run: Run, tracker: Tracker, heartbeat: HeartbeatWriter) -> Iterator[None]:
    """Saves a checkpoint when the block is closed after a stop request, so that the run can resume from this step.

    It does not if a checkpoint would change later results: one of a diverged state, or one between the regular
    checkpoints of a run that may roll back.
    """
    try:
        yield
    except GeneratorExit:
        step, scores = run.state.step, run.state.last_eval
        saved = [path.name for path in checkpoint_folders(run.out_dir / "checkpoints")]
        is_saved = step == 0 or f"step_{step:07d}" in saved
        is_sound = scores.get("step") != step or scores["val_loss"] is not None
        is_allowed = run.config.nonfinite.policy != "rollback" or is_due(step, run.config.checkpoint.every)
        if heartbeat.stop_requested(now=True) and is_sound and is_allowed and not is_saved:
            try_save_checkpoint(run, tracker, last=False)
        raise


def try_save_checkpoint(run: Run, tracker: Tracker, *, last: bool) -> None:
    """Saves rows and state. A failed save is logged and skipped; the last one is retried once, then raises.

    If the disk refuses a checkpoint of a run that may roll back, it is retried and raises as well: where such a run can
    roll back to decides its results. If memory runs out, any save is retried once, unless `on_oom` is fail.
    """
    step = run.state.step
    is_required = last or run.config.nonfinite.policy == "rollback"
    may_retry, attempts = run.config.on_oom != "fail", 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        save(run, tracker)

    try:
        retry_on_oom(attempt, lambda: may_retry and attempts == 1, run.device)
    except OSError as error:
        reason = error.strerror or error
        if not is_required:
            log.warning("step %d: the checkpoint was not saved (%s); the next one will be tried", step, reason)
            return
        log.warning("step %d: the checkpoint was not saved (%s); trying once more", step, reason)
        save(run, tracker)
    except (RuntimeError, MemoryError) as error:
        if last or not may_retry or not is_out_of_memory(error):
            raise
        log.warning("step %d: no memory to save a checkpoint; the next one will be tried", step)


def save(run: Run, tracker: Tracker) -> None:
    """Commits a checkpoint from which the run continues exactly, after all rows before it are on disk."""
    tracker.sync()
    latest, optimizers = run.state.last_eval, [optimizer.state_dict() for optimizer in run.optimizers]
    save_checkpoint(
        run.out_dir / "checkpoints",
        model=run.model,
        state={"progress": run.state.to_saved(), "optimizers": optimizers},
        step=run.state.step,
        val_loss=latest["val_loss"] if latest.get("step") == run.state.step else None,
        identity=identity(run.config, run.dataset),
        data={"settings": flatten(run.config.data), "tokenizer": run.dataset.manifest["tokenizer"]},
        files={} if run.tokenizer_model is None else {MODEL_FILE: run.tokenizer_model},
        keep_last=run.config.checkpoint.keep_last,
    )
