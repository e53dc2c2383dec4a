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

from ngpt.config.base import ConfigError, identity_settings
from ngpt.data.dataset import DataConfig, Dataset, open_dataset, order_settings
from ngpt.data.loader import EvalSet, eval_set
from ngpt.data.tokens.tokenizer import MODEL_FILES, model_sha256, parse_spec, read_model
from ngpt.kernels.compile import check_compiler
from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import build_optimizers
from ngpt.optim.schedule import is_due
from ngpt.system.device import mixed_precision, pick_device
from ngpt.system.memory import configure_allocator, peak_memory, reset_peak_memory
from ngpt.system.timing import synchronize
from ngpt.training.checkpoint import (
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
    optimizers: list[torch.optim.Optimizer]
    state: TrainState
    clock: "Clock"
    upcoming: tuple[int, tuple[Tensor, Tensor]] | None = None  # number, tokens and targets of the prefetched batch
    restarts: int = 0  # rollbacks in this process

    @property
    def batch_size(self) -> int:
        """Sequences per step: as configured, halved each time memory ran out if `on_oom` is halve_batch."""
        return max(1, self.config.batch_size >> self.state.batch_halvings)

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass in training: as configured, halved each time memory ran out."""
        configured = self.config.micro_batch_size or self.config.batch_size
        return min(self.batch_size, halved(configured, self.state.microbatch_halvings))

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

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Times the `with` block as a training step of `tokens` tokens."""
        start = time.perf_counter()
        yield
        if self._skip or self._is_read(self._state.step):
            synchronize(self._device)
        if self._skip:
            self._skip -= 1
            return
        self._state.timed_seconds += time.perf_counter() - start
        self._state.timed_tokens += tokens

    def discard_step(self) -> None:
        """Excludes the current step from the timing, for instance because a part of it ran twice."""
        self._skip = max(self._skip, 1)


def reads_clock(config: TrainConfig, step: int) -> bool:
    """Whether the throughput is read after `step`, or the device is used for something else than training."""
    periods = (config.tracker.log_every, config.eval_every, config.checkpoint.every)
    return any(is_due(step, every, last=step == config.steps) for every in periods)


def set_up(config: TrainConfig, out_dir: Path, *, resume: str | None, dataset: Dataset | None) -> Run:
    """Sets up a run at step 0, or restored from the newest intact checkpoint in `out_dir`, see `train`."""
    if resume not in (None, "latest", "extend"):
        raise ConfigError(f"resume must be 'latest' or 'extend', got {resume!r}")
    if resume is None:
        refuse_earlier_run(out_dir)
    device = pick_device(config.device)
    configure_allocator()
    reset_peak_memory(device)
    checkpoint = newest_checkpoint(out_dir / "checkpoints") if resume else None
    dataset, length = dataset or open_dataset(config.data), config.model.block_size
    validation = eval_set(dataset, tokens=config.eval_tokens, batch_size=config.batch_size, block_size=length)
    # A resumed run does not need its initial weights, which may be gone.
    model = (GPT(config.model, seed=config.seed) if checkpoint else initial_model(config, dataset)).to(device)
    if config.compile:
        check_compiler(device)
        model.compile_parts()
    state = TrainState()
    run = Run(
        config=config,
        out_dir=out_dir,
        device=device,
        dataset=dataset,
        tokenizer_model=find_tokenizer_model(config.data, dataset),
        validation=validation,
        model=model,
        optimizers=build_optimizers(model, config.optim),
        state=state,
        clock=Clock(state, device, warmup=min(5, config.steps // 2), is_read=partial(reads_clock, config)),
    )
    if checkpoint:
        if resume == "latest":
            check_setting(checkpoint, "steps", config.steps)
        restore(run, checkpoint)
        if (planned := checkpoint.identity["steps"]) != config.steps:
            state.extended = [*state.extended, (state.step, planned)]
    return run


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
    saved = load_checkpoint(checkpoint, run.model, identity=expected, leave_out=HISTORY)
    for optimizer, moments in zip(run.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(moments)
    extended = run.state.extended  # a rollback may restore a checkpoint from before
    run.state.restore(TrainState.from_saved(saved["progress"]))
    run.state.extended = extended or run.state.extended


@dataclass(frozen=True)
class RunResult:
    """Result of a run. Its status is `finished`, or `diverged` if a loss or gradient was not finite."""

    status: str
    steps: int
    metrics: Metrics = field(default_factory=dict)
    data: dict[str, str | int] = field(default_factory=dict)  # hashes of the corpus and of the evaluation tokens
    eval_blocks: dict[str, Any] | None = None  # of a finished run, see ngpt/training/text_blocks.py


def progress(run: Run) -> Metrics:
    """Returns the step, the tokens seen and the throughput (None until it has been measured)."""
    state, config = run.state, run.config
    return {
        "step": state.step,
        "tokens": state.step * config.tokens_per_step - state.dropped_sequences * config.model.block_size,
        "tokens_per_second": state.timed_tokens / state.timed_seconds if state.timed_seconds else None,
    }


def result_of(run: Run, status: str) -> RunResult:
    """Returns the result of a run that ends now. A diverged run gets no validation loss: a finite one would mislead."""
    metrics = run.state.last_eval | progress(run) | {"steps": run.state.step, "train_loss": run.state.train_loss}
    del metrics["step"]
    if status == "diverged":
        metrics |= {"val_loss": None, "val_bpb": None}
    metrics |= {
        "peak_memory_bytes": peak_memory(run.device),
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
