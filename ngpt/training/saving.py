"""Saves the checkpoints of a run, and handles failed saves."""

import contextlib
import logging
from collections.abc import Iterator

from torch import Tensor

from ngpt.config.base import flatten
from ngpt.data.tokens.tokenizer import MODEL_FILES, parse_spec
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.optim.schedule import is_due
from ngpt.plugins.records import used_plugins
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
        may_save = is_allowed and not has_diverged and not is_saved
        if run.ranks.stops(heartbeat.stop_requested(now=True)) and run.ranks.from_first(lambda: may_save):
            try_save_checkpoint(run, tracker, last=False)
        raise


def try_save_checkpoint(run: Run, tracker: Tracker, *, last: bool) -> None:
    """Saves metric rows and a checkpoint; every rank calls it.

    Ranks that have parts of the model save them together, and otherwise the first saves all. A failed save is logged
    and skipped; the last one is retried once, then raises. A run that may roll back retries and raises after every disk
    error, because its results depend on the checkpoints it can roll back to. If memory runs out, any save is retried
    once, unless `on_oom` is fail.
    """
    run.replica.collect_counts()
    if run.replica.saves_shards or run.ranks.is_first:
        _try_save(run, tracker, last=last)


def _try_save(run: Run, tracker: Tracker, *, last: bool) -> None:
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
            _warn(run, f"the checkpoint was not saved ({reason}); the next one will be tried")
            return
        _warn(run, f"the checkpoint was not saved ({reason}); trying once more")
        save(run, tracker)
    except (RuntimeError, MemoryError) as error:
        if last or not may_retry or not is_out_of_memory(error):
            raise
        _warn(run, "no memory to save a checkpoint; the next one will be tried")


def _warn(run: Run, text: str) -> None:
    if run.ranks.is_first:  # the others have the same error
        log.warning("step %d: %s", run.state.step, text)


def save(run: Run, tracker: Tracker) -> None:
    """Syncs the metric rows, then commits a checkpoint from which the run continues exactly."""
    _writers(run).together(tracker.sync)
    save_run(run)


def save_run(run: Run) -> None:
    """Commits a checkpoint of the run, without its metric rows."""
    run.clock.read()
    replica, ranks = run.replica, _writers(run)
    moments: dict[str, Tensor] = {}
    if replica.saves_shards:
        moments, optimizers = replica.split_moments(run.optimizers)
    else:
        optimizers = replica.moments(run.optimizers)
    scores, extended = run.state.last_eval, run.state.extended
    plugins = used_plugins(flatten(run.config))
    save_checkpoint(
        run.out_dir / "checkpoints",
        weights=run.model.state_dict(),
        moments=moments,
        state={"progress": run.state.to_saved(), "optimizers": optimizers},
        step=run.state.step,
        val_loss=scores["val_loss"] if scores.get("step") == run.state.step else None,
        identity=identity(run.config, run.dataset.manifest["fingerprint"])
        | ({"extended": extended} if extended else {}),
        data={"settings": flatten(run.config.data), "tokenizer": run.dataset.manifest["tokenizer"]}
        | ({"plugins": plugins} if plugins else {}),
        files=_tokenizer_files(run),
        keep_last=run.config.checkpoint.keep_last,
        ranks=ranks,
    )


def _writers(run: Run) -> Ranks:
    """The ranks that write a checkpoint together: all if each has a part of the model, else this one alone."""
    return run.ranks if run.replica.saves_shards else ALONE


def _tokenizer_files(run: Run) -> dict[str, bytes]:
    """The file of the tokenizer by its name in a checkpoint; empty if it has none."""
    if run.tokenizer_model is None:
        return {}
    return {MODEL_FILES[parse_spec(run.dataset.manifest["tokenizer"]["spec"])[0]]: run.tokenizer_model}
