"""One training run in memory: how it is set up, what its result says, and how it gets to disk and back.

The loop that moves it from step to step is in ngpt/training/loop.py.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, flatten, identity_settings
from ngpt.data import dataset as corpora
from ngpt.data.dataset import DataConfig, Dataset, open_dataset
from ngpt.data.loader import EvalSet, eval_set
from ngpt.data.tokens.tokenizer import MODEL_FILE, parse_spec
from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import build_optimizers
from ngpt.optim.schedule import is_due
from ngpt.system.device import mixed_precision, pick_device
from ngpt.system.heartbeat import Heartbeat
from ngpt.system.memory import (
    free_memory,
    is_out_of_memory,
    peak_memory,
    reset_peak_memory,
    retry_smaller,
    settle_allocator,
)
from ngpt.training.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from ngpt.training.config import TrainConfig, rollback_settings
from ngpt.training.recovery import ON_OOM, halved
from ngpt.training.state import Metrics, TrainState
from ngpt.training.tracker import Tracker, finite_or_none

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One training run in memory."""

    config: TrainConfig
    out_dir: Path
    device: torch.device
    dataset: Dataset
    tokenizer_model: bytes | None  # what a checkpoint carries besides, see `tokenizer_model`
    validation: EvalSet
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    state: TrainState
    clock: "Clock"
    upcoming: tuple[int, tuple[Tensor, Tensor]] | None = None  # the next batch by its number, where it is made already

    @property
    def batch_size(self) -> int:
        """Sequences in a step: as the config says, unless memory ran out and the policy is to halve it."""
        return max(1, self.config.batch_size >> self.state.batch_halvings)

    @property
    def micro_batch_size(self) -> int:
        """Sequences at once in training: as the config says, halved for each time that memory ran out."""
        given = self.config.micro_batch_size or self.config.batch_size
        return min(self.batch_size, halved(given, self.state.microbatch_halvings))

    @property
    def eval_rows(self) -> int:
        """Sequences at once in evaluation: what fits while training fits there, or else less."""
        return halved(self.micro_batch_size, self.state.eval_halvings)

    @property
    def autocast(self) -> torch.autocast:
        """A block in which matrix products have the precision that the config names."""
        return mixed_precision(self.device, self.config.dtype)


class Clock:
    """Adds the time of training steps to `progress`, without the process's first `warmup` ones (allocation, caches)."""

    def __init__(self, state: TrainState, *, warmup: int) -> None:
        self._state, self._skip = state, warmup
        self._tokens = 0
        self._start = 0.0

    def step(self, tokens: int) -> Self:
        """Use as `with clock.step(n):` around a training step of `n` tokens."""
        self._tokens = tokens
        return self

    def leave_out(self) -> None:
        """Does not count the step under way: something was tried twice in it."""
        self._skip = max(self._skip, 1)

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._skip:
            self._skip -= 1
            return
        self._state.timed_seconds += time.perf_counter() - self._start
        self._state.timed_tokens += self._tokens


def set_up(config: TrainConfig, out_dir: Path, *, resume: str | None, dataset: Dataset | None) -> Run:
    """Model, optimizers and data at the first step, or as the newest intact checkpoint left them."""
    if resume not in (None, "latest"):
        raise ConfigError(f"resume must be 'latest', got {resume!r}")
    if resume is None and checkpoint_folders(out_dir / "checkpoints"):
        raise ConfigError(f"{out_dir} holds checkpoints of an earlier run: resume it, or choose another folder")
    device = pick_device(config.device)
    settle_allocator()
    reset_peak_memory(device)
    dataset = dataset or open_dataset(config.data)
    validation = eval_set(
        dataset, tokens=config.eval_tokens, batch_size=config.batch_size, block_size=config.model.block_size
    )
    model = GPT(config.model, seed=config.seed).to(device)
    if config.compile:
        model.compile_parts()
    optimizers = build_optimizers(model, config.optim)
    state = TrainState()
    clock = Clock(state, warmup=min(5, config.steps // 2))
    carried = tokenizer_model(config.data, dataset)
    run = Run(config, out_dir, device, dataset, carried, validation, model, optimizers, state, clock)
    if resume and (checkpoint := newest_checkpoint(out_dir / "checkpoints")):
        restore(run, checkpoint)
    return run


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Puts weights, moments and state where the checkpoint left them."""
    saved = load_checkpoint(checkpoint, run.model, identity=identity(run.config, run.dataset))
    for optimizer, moments in zip(run.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(moments)
    run.state.restore(TrainState.from_saved(saved["progress"]))


def rollback_to_checkpoint(run: Run) -> None:
    """Returns to the newest intact checkpoint, or to the start where there is none."""
    run.model.zero_grad(set_to_none=True)
    run.optimizers = build_optimizers(run.model, run.config.optim)  # without moments
    free_memory(run.device)
    if checkpoint := newest_checkpoint(run.out_dir / "checkpoints"):
        restore(run, checkpoint)
    else:
        run.model.load_state_dict(GPT(run.config.model, seed=run.config.seed).state_dict())
        run.state.restore(TrainState())


@dataclass(frozen=True)
class RunResult:
    """What remains of a run: `finished`, or `diverged` when a loss or gradient stopped being finite."""

    status: str
    steps: int
    metrics: Metrics = field(default_factory=dict)
    data: dict[str, str | int] = field(default_factory=dict)  # hashes of the corpus and of the evaluation tokens


def progress(run: Run) -> Metrics:
    """The step, the tokens seen, and the throughput so far (None before it has been measured)."""
    state = run.state
    speed = state.timed_tokens / state.timed_seconds if state.timed_seconds else None
    return {
        "step": state.step,
        "tokens": state.step * run.config.tokens_per_step - state.dropped_sequences * run.config.model.block_size,
        "tokens_per_second": speed,
    }


def finish(status: str, run: Run) -> RunResult:
    """The result of a run that stops here. A diverged one has no validation loss: its last finite one would flatter."""
    scores = {name: value for name, value in run.state.last_eval.items() if name != "step"}
    metrics = scores | progress(run) | {"steps": run.state.step, "train_loss": run.state.train_loss}
    del metrics["step"]
    if status == "diverged":
        metrics |= {"val_loss": None, "val_bpb": None}
    metrics["peak_memory_bytes"] = peak_memory(run.device)
    metrics["n_params"] = sum(parameter.numel() for parameter in run.model.parameters())
    # What became of it: fewer sequences than the config says if memory ran out, steps that were not finite.
    metrics |= {"batch_size": run.batch_size, "micro_batch_size": run.micro_batch_size}
    metrics |= {"skipped_steps": run.state.skipped_steps, "rollbacks": run.state.rollbacks}
    data = {
        "data_sha256": run.dataset.manifest["content_sha256"],
        "eval_sha256": run.validation.sha256,
        "eval_tokens": run.validation.n_tokens,
    }
    return RunResult(status, run.state.step, {name: finite_or_none(value) for name, value in metrics.items()}, data)


@contextlib.contextmanager
def checkpoint_on_stop(run: Run, tracker: Tracker, heartbeat: Heartbeat) -> Iterator[None]:
    """Saves a run where it is when it is closed because somebody asked it to stop; it then goes on from there.

    Not where a checkpoint would change what follows: a diverged state, or one that a rollback would return to.
    """
    try:
        yield
    except GeneratorExit:
        step, scores = run.state.step, run.state.last_eval
        is_there = step == 0 or any(
            path.name == f"step_{step:07d}" for path in checkpoint_folders(run.out_dir / "checkpoints")
        )
        is_sound = scores.get("step") != step or scores["val_loss"] is not None
        is_regular = run.config.nonfinite.policy != "rollback" or is_due(step, run.config.checkpoint.every)
        if heartbeat.stop_requested(now=True) and is_sound and is_regular and not is_there:
            try_save_checkpoint(run, tracker, last=False)
        raise


def try_save_checkpoint(run: Run, tracker: Tracker, *, last: bool) -> None:
    """Saves rows and state. A run can do without any one of its checkpoints but the last, which is tried twice.

    Where there is no memory for it, any one is tried twice. A run that may go back to a checkpoint needs them all: its
    numbers depend on where it can go back to.

    Raises:
        RuntimeError, MemoryError: no memory for the last checkpoint, or for any if `on_oom` is fail.
        OSError: the disk does not take the last checkpoint, or any if `nonfinite.policy` is rollback.
    """
    gives_up, step = ON_OOM[run.config.on_oom] is None, run.state.step
    needed = last or run.config.nonfinite.policy == "rollback"
    once_more = iter([not gives_up])
    try:
        retry_smaller(lambda: save(run, tracker), lambda: next(once_more, False), run.device)
    except OSError as error:
        reason = error.strerror or error
        if not needed:
            log.warning("step %d: the checkpoint was not saved (%s); the next one is tried again", step, reason)
            return
        log.warning("step %d: the checkpoint was not saved (%s); trying once more", step, reason)
        save(run, tracker)
    except (RuntimeError, MemoryError) as error:
        if last or gives_up or not is_out_of_memory(error):
            raise
        log.warning("step %d: no memory to save a checkpoint; the next one is tried again", step)


def save(run: Run, tracker: Tracker) -> None:
    """Commits a checkpoint from which the run continues exactly, once all rows before it are on disk."""
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


def tokenizer_model(config: DataConfig, dataset: Dataset) -> bytes | None:
    """The sentencepiece model that the tokens were made with; None where it is another kind, or not at hand.

    It is read before the first step: what may happen to the cache meanwhile does not end a long run.
    """
    made, shards = dataset.manifest["tokenizer"], dataset.manifest["shard_folder"]
    kind, argument = parse_spec(made["spec"])
    folders = [dataset.folder, Path(config.corpus).expanduser(), *([Path(shards)] if shards else [])]
    given = [Path(argument).expanduser()] if kind == "model" else []
    for path in [*(folder / MODEL_FILE for folder in folders), *given]:
        if path.is_file() and hashlib.sha256(model := path.read_bytes()).hexdigest() == made["sha256"]:
            return model
    return None


def identity(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What decides a run's numbers, by dotted name; of the data not where they lie, but what they are."""
    kept = {name: value for name, value in identity_settings(config).items() if not name.startswith("data.")}
    data = {"data.fingerprint": dataset.manifest["fingerprint"], "data.order": config.data.order}
    return kept | rollback_settings(config) | data | corpora.order_settings(config.data)
