"""Saves the checkpoints of a run, and handles failed saves."""

import contextlib
import logging
from collections.abc import Iterator

from ngpt.config.base import flatten
from ngpt.data.tokens.tokenizer import MODEL_FILES, parse_spec
from ngpt.optim.schedule import is_due
from ngpt.system.atomic_files import describe_os_error
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import is_out_of_memory, retry_on_oom
from ngpt.training.checkpoint import checkpoint_folders, save_checkpoint
from ngpt.training.run import Run, identity
from ngpt.training.tracker import Tracker

log = logging.getLogger(__name__)


@contextlib.contextmanager
def checkpoint_on_stop(run: Run, tracker: Tracker, heartbeat: HeartbeatWriter) -> Iterator[None]:
    """Saves a checkpoint when the generator is closed after a stop request, so that the run can resume from this step.

    It saves none that could change later results: of a diverged state, or between the checkpoints of a policy rollback.
    """
    try:
        yield
    except GeneratorExit:
        step, scores = run.state.step, run.state.last_eval
        saved = [path.name for path in checkpoint_folders(run.out_dir / "checkpoints")]
        is_saved = step == 0 or f"step_{step:07d}" in saved
        has_diverged = scores.get("step") == step and scores["val_loss"] is None
        is_allowed = run.config.nonfinite.policy != "rollback" or is_due(step, run.config.checkpoint.every)
        if heartbeat.stop_requested(now=True) and is_allowed and not has_diverged and not is_saved:
            try_save_checkpoint(run, tracker, last=False)
        raise


def try_save_checkpoint(run: Run, tracker: Tracker, *, last: bool) -> None:
    """Saves metric rows and a checkpoint. A failed save is logged and skipped; the last is retried once, then raises.

    A run that may roll back retries and raises after every disk error, because its results depend on the checkpoints it
    can roll back to. If memory runs out, any save is retried once, unless `on_oom` is fail.
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
        reason = describe_os_error(error)
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
    """Syncs the metric rows, then commits a checkpoint from which the run continues exactly."""
    tracker.sync()
    save_run(run)


def save_run(run: Run) -> None:
    """Commits a checkpoint of the run, without its metric rows."""
    scores, optimizers = run.state.last_eval, [optimizer.state_dict() for optimizer in run.optimizers]
    extended = run.state.extended
    save_checkpoint(
        run.out_dir / "checkpoints",
        model=run.model,
        state={"progress": run.state.to_saved(), "optimizers": optimizers},
        step=run.state.step,
        val_loss=scores["val_loss"] if scores.get("step") == run.state.step else None,
        identity=identity(run.config, run.dataset.manifest["fingerprint"])
        | ({"extended": extended} if extended else {}),
        data={"settings": flatten(run.config.data), "tokenizer": run.dataset.manifest["tokenizer"]},
        files=_tokenizer_files(run),
        keep_last=run.config.checkpoint.keep_last,
    )


def _tokenizer_files(run: Run) -> dict[str, bytes]:
    """The file of the tokenizer by its name in a checkpoint; empty if it has none."""
    if run.tokenizer_model is None:
        return {}
    return {MODEL_FILES[parse_spec(run.dataset.manifest["tokenizer"]["spec"])[0]]: run.tokenizer_model}
