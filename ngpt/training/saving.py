"""When a run saves a checkpoint, and what happens if it cannot."""

import contextlib
import logging
from collections.abc import Iterator

from ngpt.config.base import flatten
from ngpt.data.tokens.tokenizer import MODEL_FILE
from ngpt.optim.schedule import is_due
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import free_memory, is_out_of_memory
from ngpt.training.checkpoint import checkpoint_folders, save_checkpoint
from ngpt.training.recovery import ON_OOM
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
        is_saved = step == 0 or any(
            path.name == f"step_{step:07d}" for path in checkpoint_folders(run.out_dir / "checkpoints")
        )
        is_sound = scores.get("step") != step or scores["val_loss"] is not None
        is_allowed = run.config.nonfinite.policy != "rollback" or is_due(step, run.config.checkpoint.every)
        if heartbeat.stop_requested(now=True) and is_sound and is_allowed and not is_saved:
            try_save_checkpoint(run, tracker, last=False)
        raise


def try_save_checkpoint(run: Run, tracker: Tracker, *, last: bool) -> None:
    """Saves rows and state. A failed save is logged and skipped; the last one is retried once, then raises.

    If the disk refuses a checkpoint of a run that may roll back, it is retried and raises as well: where such a run can
    roll back to decides its results. If memory runs out, any save is retried once.

    Raises:
        OSError: the disk refuses a checkpoint that the run needs.
        RuntimeError, MemoryError: no memory for the last checkpoint, or for any one if `on_oom` is fail.
    """
    step = run.state.step
    is_required = last or run.config.nonfinite.policy == "rollback"
    try:
        _save_retrying_once(run, tracker)
    except OSError as error:
        reason = error.strerror or error
        if not is_required:
            log.warning("step %d: the checkpoint was not saved (%s); the next one will be tried", step, reason)
            return
        log.warning("step %d: the checkpoint was not saved (%s); trying once more", step, reason)
        save(run, tracker)
    except (RuntimeError, MemoryError) as error:
        if last or not _may_retry(run, error):
            raise
        log.warning("step %d: no memory to save a checkpoint; the next one will be tried", step)


def _save_retrying_once(run: Run, tracker: Tracker) -> None:
    try:
        save(run, tracker)
        return
    except (RuntimeError, MemoryError) as error:
        if not _may_retry(run, error):
            raise
    free_memory(run.device)  # outside of `except`, since a traceback keeps tensors alive
    save(run, tracker)


def _may_retry(run: Run, error: Exception) -> bool:
    return ON_OOM[run.config.on_oom] is not None and is_out_of_memory(error)


def save(run: Run, tracker: Tracker) -> None:
    """Commits a checkpoint from which the run continues exactly, after all rows before it are on disk."""
    tracker.sync()
    latest = run.state.last_eval
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
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
