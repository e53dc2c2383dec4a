"""A training run in memory: setting it up, restoring it from a checkpoint, and its results."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, Problem, identity_settings
from ngpt.data.dataset import DataConfig, Dataset, open_dataset, order_settings
from ngpt.data.loader import EvalSet, eval_set
from ngpt.data.tokens.tokenizer import MODEL_FILES, model_sha256, parse_spec, read_model
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.distributed.replica import Replica
from ngpt.distributed.strategies import problems_of, replicate
from ngpt.kernels.compile import check_compiler
from ngpt.model.flops import flops_per_token
from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import build_optimizers
from ngpt.optim.schedule import is_due
from ngpt.system.device import mixed_precision, pick_device
from ngpt.system.memory import configure_allocator, peak_memory, reset_peak_memory
from ngpt.system.timing import synchronize
from ngpt.trackers.config import TrackerConfig
from ngpt.training.checkpoint import (
    MOMENT_SHARDS,
    Checkpoint,
    check_setting,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
)
from ngpt.training.config import LOCATIONS, TrainConfig, rollback_settings
from ngpt.training.load_model import load_initial_weights
from ngpt.training.state import Metrics, TrainState
from ngpt.training.tracker import finite_or_none

TIMES = ("seconds", "train_seconds")  # in rows, and not in the results of a run, which has its own duration
HISTORY = ("steps", "extended")  # of a checkpoint's identity: these may differ from the run's, see `set_up`


@dataclass
class Run:
    """Model, data, optimizers and state of a training run."""

    config: TrainConfig
    out_dir: Path
    device: torch.device
    dataset: Dataset
    tokenizer_model: bytes | None  # saved in each checkpoint; read at the start, since the file may change
    validation: EvalSet
    model: GPT
    replica: Replica  # the model, as this rank trains it
    optimizers: list[torch.optim.Optimizer]
    state: TrainState
    clock: "Clock"
    upcoming: tuple[int, tuple[Tensor, Tensor]] | None = None  # number, tokens and targets of the prefetched batch
    restarts: int = 0  # rollbacks in this process
    ranks: Ranks = ALONE

    @property
    def tracker_config(self) -> TrackerConfig:
        """Where this rank logs: as configured, or only into its own folder."""
        tracker = self.config.tracker
        return tracker if self.ranks.is_first else TrackerConfig(log_every=tracker.log_every)

    @property
    def batch_size(self) -> int:
        """Sequences per step: as configured, halved each time memory ran out if `on_oom` is halve_batch."""
        return max(1, self.config.batch_size >> self.state.batch_halvings)

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass of a rank in training: as configured, halved each time memory ran out."""
        most = self.config.batch_size // self.ranks.count
        configured = min(self.config.micro_batch_size or most, most)
        return min(self.batch_size // self.ranks.count, halved(configured, self.state.microbatch_halvings))

    @property
    def eval_batch_size(self) -> int:
        """Sequences per forward pass in evaluation: the micro-batch, halved each time evaluation ran out of memory."""
        return halved(self.micro_batch_size, self.state.eval_halvings)

    @property
    def autocast(self) -> torch.autocast:
        """A context manager that computes matrix products in `config.dtype`."""
        return mixed_precision(self.device, self.config.dtype)


def halved(size: int, times: int) -> int:
    """`size` halved `times` times, rounded up: 5, 3, 2, 1, 1."""
    return -(-size // 2**times)


class Clock:
    """Adds the duration of training steps to the state, without the first `warmup` steps of the process.

    A step ends before the GPU has run all of its kernels, and the next step waits for them. So only the last step
    before `is_read` waits itself: then all steps so far are timed to their end, and no step waits in vain.
    """

    def __init__(
        self,
        state: TrainState,
        device: torch.device,
        *,
        warmup: int,
        is_read: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self._state, self._device, self._skip, self._is_read = state, device, warmup, is_read
        self._last_read = time.perf_counter()

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Times the `with` block as a training step of `tokens` tokens."""
        start = time.perf_counter()
        yield
        if self._skip or self._is_read(self._state.step):
            synchronize(self._device)
        seconds = time.perf_counter() - start
        self._state.train_seconds += seconds
        if self._skip:
            self._skip -= 1
            return
        self._state.timed_seconds += seconds
        self._state.timed_tokens += tokens

    def read(self) -> None:
        """Adds the time since the last call, or since the start, to `seconds` of the state."""
        now = time.perf_counter()
        self._state.seconds += now - self._last_read
        self._last_read = now

    def discard_step(self) -> None:
        """Excludes the current step from the timing, for instance because a part of it ran twice."""
        self._skip = max(self._skip, 1)


def reads_clock(config: TrainConfig, step: int) -> bool:
    """Whether the throughput is read after `step`, or the device is used for something else than training."""
    periods = (config.tracker.log_every, config.eval_every, config.checkpoint.every)
    return any(is_due(step, every, last=step == config.steps) for every in periods)


def set_up(
    config: TrainConfig, out_dir: Path, *, resume: str | None, dataset: Dataset | None, ranks: Ranks = ALONE
) -> Run:
    """Sets up a run at step 0, or restored from the newest intact checkpoint in `out_dir`, see `train`."""
    if resume not in (None, "latest", "extend"):
        raise ConfigError(f"resume must be 'latest' or 'extend', got {resume!r}")
    if problems := list(rank_problems(config, ranks.count)):
        raise ConfigError(problems)
    if resume is None:
        ranks.from_first(lambda: refuse_earlier_run(out_dir))
    device = pick_device(config.device)
    configure_allocator()
    reset_peak_memory(device)
    checkpoint = ranks.from_first(lambda: newest_checkpoint(out_dir / "checkpoints")) if resume else None
    dataset, length = dataset or open_dataset(config.data), config.model.block_size
    validation = eval_set(dataset, tokens=config.eval_tokens, batch_size=config.batch_size, block_size=length)
    # A resumed run does not need its initial weights, which may be gone.
    model = (GPT(config.model, seed=config.seed) if checkpoint else initial_model(config, dataset)).to(device)
    if config.compile:
        check_compiler(device)
        model.compile_parts()
    if config.activation_checkpointing:
        model.recompute_blocks()
    replica, state = replicate(model, ranks, config.distributed), TrainState()
    run = Run(
        config=config,
        out_dir=out_dir,
        device=device,
        dataset=dataset,
        tokenizer_model=find_tokenizer_model(config.data, dataset),
        validation=validation,
        model=model,
        replica=replica,
        optimizers=build_run_optimizers(replica, config),
        state=state,
        clock=Clock(state, device, warmup=min(5, config.steps // 2), is_read=partial(reads_clock, config)),
        ranks=ranks,
    )
    if checkpoint:
        if resume == "latest":
            check_setting(checkpoint, "steps", config.steps)
        restore(run, checkpoint)
        if (planned := checkpoint.identity["steps"]) != config.steps:
            state.extended = [*state.extended, (state.step, planned)]
    _keep_halvings(run)
    return run


def rank_problems(config: TrainConfig, count: int) -> Iterator[Problem]:
    """Yields what keeps `count` ranks from training with these settings, at the setting to change."""
    if config.batch_size % count:
        yield Problem(("batch_size",), f"{config.batch_size} sequences cannot be divided among {count} ranks")
    yield from problems_of(config.distributed, count)


def _keep_halvings(run: Run) -> None:
    """Applies the halvings with which all ranks have started again, since memory ran out too late to agree on them."""
    run.state.microbatch_halvings = max(run.state.microbatch_halvings, run.ranks.halvings)
    if run.config.on_oom == "halve_batch":
        run.state.batch_halvings = max(run.state.batch_halvings, run.ranks.halvings)


def build_run_optimizers(replica: Replica, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Builds the optimizers of a run, without moments."""
    optimizers = build_optimizers(replica.model, config.optim)
    replica.adopt(optimizers)
    return optimizers


def refuse_earlier_run(folder: Path) -> None:
    """Raises ConfigError if a new run would write into the folder of an earlier one."""
    if checkpoint_folders(folder / "checkpoints"):
        raise ConfigError(f"{folder} holds checkpoints of an earlier run: resume it, or choose another folder")


def initial_model(config: TrainConfig, dataset: Dataset) -> GPT:
    """Returns the model at step 0: with random weights, or with those of `init_from`."""
    model = GPT(config.model, seed=config.seed)
    if config.init_from is not None:
        load_initial_weights(model, config.init_from, config.init_sha256, dataset.manifest["tokenizer"])
    return model


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Loads weights, optimizer moments and state from a checkpoint, whose planned steps may be others."""
    expected = identity(run.config, run.dataset.manifest["fingerprint"])
    saved = load_checkpoint(checkpoint, run.replica, identity=expected, leave_out=HISTORY)
    if run.model.normalizer is not None and not run.ranks.is_first:
        run.model.normalizer.replaced.zero_()  # counted by the first rank
    if checkpoint.is_sharded:
        run.replica.load_split_moments(run.optimizers, saved["optimizers"], checkpoint.path / MOMENT_SHARDS)
    else:
        run.replica.load_moments(run.optimizers, saved["optimizers"])
    extended = run.state.extended  # a rollback may restore a checkpoint from before
    run.state.restore(TrainState.from_saved(saved["progress"]))
    run.state.extended = extended or run.state.extended
    _keep_halvings(run)


@dataclass(frozen=True)
class RunResult:
    """Result of a run. Its status is `finished`, or `diverged` if a loss or gradient was not finite."""

    status: str
    steps: int
    metrics: Metrics = field(default_factory=dict)
    data: dict[str, str | int] = field(default_factory=dict)  # hashes of the corpus and of the evaluation tokens
    eval_blocks: dict[str, Any] | None = None  # of a finished run, see ngpt/training/text_blocks.py


def progress(run: Run) -> Metrics:
    """Returns how far the run is, and its throughput (None until it has been measured).

    `seconds`, and `train_seconds` inside training steps, go on where an earlier attempt has saved.
    """
    state, config = run.state, run.config
    run.clock.read()
    tokens = state.step * config.tokens_per_step - state.dropped_sequences * config.model.block_size
    return {
        "step": state.step,
        "tokens": tokens,
        "flops": float(tokens * flops_per_token(run.model.cfg)),
        "seconds": round(state.seconds, 6),
        "train_seconds": round(state.train_seconds, 6),
        "tokens_per_second": state.timed_tokens / state.timed_seconds if state.timed_seconds else None,
    }


def result_of(run: Run, status: str) -> RunResult:
    """Returns the result of a run that ends now. A diverged run gets no validation loss: a finite one would mislead."""
    metrics = run.state.last_eval | progress(run) | {"steps": run.state.step, "train_loss": run.state.train_loss}
    for name in ("step", *TIMES):
        del metrics[name]
    if status == "diverged":
        metrics |= {"val_loss": None, "val_bpb": None}
    metrics |= {
        "peak_memory_bytes": max(run.ranks.gather(peak_memory(run.device))),
        "n_params": sum(parameter.numel() for parameter in run.model.parameters()),
        "batch_size": run.batch_size,  # smaller than configured if memory ran out
        "micro_batch_size": run.micro_batch_size,
        "skipped_steps": run.state.skipped_steps,
        "rollbacks": run.state.rollbacks,
        "initial_val_loss": run.state.initial_val_loss,
    }
    data = {
        "data_sha256": run.dataset.manifest["content_sha256"],
        "eval_sha256": run.validation.sha256,
        "eval_tokens": run.validation.n_tokens,
    }
    blocks = run.state.eval_blocks if status == "finished" else None
    metrics = {name: finite_or_none(value) for name, value in metrics.items()}
    return RunResult(status, run.state.step, metrics, data, blocks)


def find_tokenizer_model(config: DataConfig, dataset: Dataset) -> bytes | None:
    """Reads the file of the tokenizer of a corpus, as checkpoints keep it; None if it has none, or it is missing."""
    tokenizer, shards = dataset.manifest["tokenizer"], dataset.manifest["shard_folder"]
    spec = tokenizer["spec"]
    if (name := MODEL_FILES.get(parse_spec(spec)[0])) is None:
        return None
    folders = [dataset.folder, Path(config.corpus).expanduser(), *([Path(shards)] if shards else [])]
    readers = [(folder / name).read_bytes for folder in folders if (folder / name).is_file()]
    for read in [*readers, lambda: read_model(spec)]:
        with contextlib.suppress(ConfigError):  # the file that the spec names may be gone
            if (content := read()) is not None and model_sha256(spec, content) == tokenizer["sha256"]:
                return content
    return None


def identity(config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    """Returns the settings that affect the results, by dotted name, with hashes instead of paths: of the corpus,
    its fingerprint."""
    settings = {
        name: value
        for name, value in identity_settings(config).items()
        if not name.startswith("data.") and name not in LOCATIONS
    }
    data = {"data.fingerprint": fingerprint, "data.order": config.data.order}
    return settings | rollback_settings(config) | data | order_settings(config.data)
