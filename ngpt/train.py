"""The train loop, and `python -m ngpt.train` for a single run.

python -m ngpt.train --set alpha=0.2 steps=500 --out runs/first
python -m ngpt.train --config model.yaml --out runs/first --resume latest
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ngpt.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from ngpt.config import (
    Config,
    ConfigError,
    Location,
    Problem,
    added,
    build,
    dotted,
    flatten,
    identity_settings,
    invalid,
    one_of,
    override,
    runtime,
)
from ngpt.data import corpora
from ngpt.data.corpora import DataConfig, Dataset, open_dataset
from ngpt.data.loader import EvalSet, eval_set, train_batch
from ngpt.data.shards import CorruptShardError
from ngpt.data.tokenizer import MODEL_FILE, parse_spec
from ngpt.device import DEVICES, DTYPES, mixed_precision, pick_device
from ngpt.diagnostics import (
    activation_norm_error,
    divisor_statistics,
    divisors,
    step_lengths,
    weight_norm_error,
)
from ngpt.evaluate import evaluate
from ngpt.memory import (
    ask_for_huge_pages,
    free_memory,
    is_out_of_memory,
    peak_memory,
    reset_peak_memory,
    retry_smaller,
)
from ngpt.model import GPT, Count, ModelConfig
from ngpt.norm import NORM_MODES
from ngpt.optim import OptimConfig, build_optimizers, set_rates, unfit
from ngpt.projection import project_weights
from ngpt.pulse import Pulse
from ngpt.schedule import ScheduleConfig, multiplier
from ngpt.setbacks import AVERAGED, NONFINITE, ON_OOM, Metrics, NonfiniteConfig, Progress, halved
from ngpt.tracker import Tracker, TrackerConfig, finite, settled
from ngpt.written import named_settings
from ngpt.yamlfile import parse_assignment, read_yaml

log = logging.getLogger(__name__)


class TrainConfig(Config, frozen=True):
    """Everything that decides a run. Sub-configs belong to the files that implement them."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # initial weights and order of the data
    steps: Count = 200  # optimizer updates
    batch_size: Count = 16  # sequences per step
    micro_batch_size: Count | None = None  # sequences at once; null: the whole batch
    project_every: Count = 1  # steps between projections onto the sphere
    eval_every: Count = 50  # steps; the start and the end are always evaluated
    eval_tokens: Count = 16_384  # the same first tokens of the validation split for every trial
    # no memory: split the micro-batch in two, or the batch too, as seed 000 has it (the result is another); or give up
    on_oom: Annotated[str, one_of(ON_OOM, "policy")] = added("split", alike=("fail",))
    dtype: Annotated[str, one_of(DTYPES, "dtype")] = "float32"  # of matrix products; weights and norms stay float32
    compile: bool = False  # the blocks and the loss, with torch.compile: worth its half minute in long runs
    device: Annotated[str, one_of(DEVICES, "device")] = runtime("auto")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    nonfinite: NonfiniteConfig = NonfiniteConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracker: TrackerConfig = TrackerConfig()

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.block_size

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            text = f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            raise invalid(text, "micro_batch_size", "batch_size")
        if reason := unfit(self.optim, self.model):
            raise invalid(reason, "optim.name", "model.residual")
        return self


@dataclass(frozen=True)
class RunResult:
    """What remains of a run: `finished`, or `diverged` when a loss or gradient stopped being finite."""

    status: str
    steps: int
    metrics: Metrics = field(default_factory=dict)
    data: dict[str, str | int] = field(default_factory=dict)  # hashes of the corpus and of the evaluation tokens


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` with `model.vocab_size` filled in from the tokenizer.

    Raises:
        ConfigError: the model's vocabulary is smaller than the tokenizer's.
    """
    needed = corpora.vocab_size(config.data)
    given = config.model.vocab_size
    if given is not None and given < needed:
        raise ConfigError(f"model.vocab_size {given} is smaller than the {needed} tokens of the data")
    return override(config, {"model.vocab_size": needed}) if given is None else config


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
    progress: Progress
    clock: "Clock"
    upcoming: tuple[int, tuple[Tensor, Tensor]] | None = None  # the next batch by its number, where it is made already

    @property
    def batch_size(self) -> int:
        """Sequences in a step: as the config says, unless memory ran out and the policy is to halve it."""
        return max(1, self.config.batch_size >> self.progress.halvings)

    @property
    def micro_batch_size(self) -> int:
        """Sequences at once in training: as the config says, halved for each time that memory ran out."""
        given = self.config.micro_batch_size or self.config.batch_size
        return min(self.batch_size, halved(given, self.progress.splits))

    @property
    def eval_rows(self) -> int:
        """Sequences at once in evaluation: what fits while training fits there, or else less."""
        return halved(self.micro_batch_size, self.progress.eval_splits)

    @property
    def autocast(self) -> torch.autocast:
        return mixed_precision(self.device, self.config.dtype)


def train(
    config: TrainConfig, out_dir: Path, *, resume: str | None = None, dataset: Dataset | None = None
) -> Generator[Metrics, None, RunResult]:
    """Trains one model; yields its metrics at each evaluation and returns the result.

    Two runs of one config on one CPU with one number of threads agree bit for bit, and so do a run and one that was
    stopped at any step and resumed: weights and order of the data depend on (seed, step) only.

    Args:
        config: what to do.
        out_dir: gets `metrics.jsonl` and `checkpoints/`.
        resume: `"latest"` continues from the newest intact checkpoint in `out_dir`, if there is one.
        dataset: the opened corpus, where the caller has it; else it is opened, and prepared if need be.

    Raises:
        ConfigError: the data do not fit the model, or the checkpoint is of another config.
        RuntimeError, MemoryError: there is not enough memory for a single sequence, or `on_oom` is fail.
    """
    run = set_up(resolved(config), out_dir, resume=resume, dataset=dataset)
    while (result := (yield from stretch(run))) is None:  # it has gone back to an earlier step
        pass
    return result


def stretch(run: Run, *, together: bool = False) -> Generator[Any, Any, RunResult | None]:
    """Trains from where the run is to its end; or until it has gone back to an earlier step, and then returns None.

    The rows of steps that are gone go with them, as after a kill. It yields the metrics of evaluations. If its steps
    are made `together` with those of other runs (ngpt/vectorised.py), it yields None for each and is sent its metrics.
    """
    config, progress = run.config, run.progress
    resumed_at = progress.step or None

    tracker = Tracker(config.tracker, run.out_dir, settings=flatten(config), keep_until=resumed_at)
    pulse = Pulse(run.out_dir, began=progress.step)
    with tracker, pulse, saved_when_stopped(run, tracker, pulse):
        if skipped := run.dataset.manifest["skipped"]:
            tracker.note({"skipped_shards": [f"{shard['name']}: {shard['reason']}" for shard in skipped]})
        while True:
            # ---- now and then ------------------------------------------------------------------
            last = progress.step == config.steps  # one turn more than steps, so that the end is evaluated and saved
            if progress.step != resumed_at:
                if due(progress.step, config.eval_every, last=last):
                    histograms = measure(run, last=last)
                    tracker.log(progress.last_eval)
                    tracker.log_histograms(progress.step, histograms)
                    yield progress.last_eval
                    if progress.last_eval["val_loss"] is None:  # only an earlier state can help
                        goes_back = config.nonfinite.policy == "rollback" and may_go_on(run)
                        return None if goes_back else finish("diverged", run)
                if progress.step and due(progress.step, config.checkpoint.every, last=last):
                    save_or_go_without(run, tracker, last=last)
            if last:
                return finish("finished", run)
            pulse.beat(progress.step)
            if pulse.is_asked_to_stop():  # whoever asked drives this run, and closes it here
                yield progress.last_eval

            # ---- one step ----------------------------------------------------------------------
            before = progress.step
            step_metrics = (yield None) if together else train_step(run)
            is_finite = all(math.isfinite(value) for value in step_metrics.values())
            diverged = not is_finite and not may_go_on(run)
            if progress.step <= before:
                return None
            if not is_finite or due(progress.step, config.tracker.log_every, last=progress.step == config.steps):
                mean = {"train_loss": progress.train_loss} if is_finite else {}
                tracker.log(position(run) | step_metrics | mean)
            if diverged:
                return finish("diverged", run)


@contextlib.contextmanager
def saved_when_stopped(run: Run, tracker: Tracker, pulse: Pulse) -> Iterator[None]:
    """Saves a run where it is when it is closed because somebody asked it to stop; it then goes on from there.

    Not where a checkpoint would change what follows: a diverged state, or one that a rollback would return to.
    """
    try:
        yield
    except GeneratorExit:
        step, scores = run.progress.step, run.progress.last_eval
        is_there = step == 0 or any(
            path.name == f"step_{step:07d}" for path in checkpoint_folders(run.out_dir / "checkpoints")
        )
        is_sound = scores.get("step") != step or scores["val_loss"] is not None
        is_regular = run.config.nonfinite.policy != "rollback" or due(step, run.config.checkpoint.every)
        if pulse.is_asked_to_stop(now=True) and is_sound and is_regular and not is_there:
            save_or_go_without(run, tracker, last=False)
        raise


def set_up(config: TrainConfig, out_dir: Path, *, resume: str | None, dataset: Dataset | None) -> Run:
    """Model, optimizers and data at the first step, or as the newest intact checkpoint left them."""
    if resume not in (None, "latest"):
        raise ConfigError(f"resume must be 'latest', got {resume!r}")
    if resume is None and checkpoint_folders(out_dir / "checkpoints"):
        raise ConfigError(f"{out_dir} holds checkpoints of an earlier run: resume it, or choose another folder")
    device = pick_device(config.device)
    ask_for_huge_pages()
    reset_peak_memory(device)
    dataset = dataset or open_dataset(config.data)
    validation = eval_set(
        dataset, tokens=config.eval_tokens, batch_size=config.batch_size, block_size=config.model.block_size
    )
    model = GPT(config.model, seed=config.seed).to(device)
    if config.compile:
        model.compile_parts()
    optimizers = build_optimizers(model, config.optim)
    progress = Progress()
    clock = Clock(progress, warmup=min(5, config.steps // 2))
    carried = tokenizer_model(config.data, dataset)
    run = Run(config, out_dir, device, dataset, carried, validation, model, optimizers, progress, clock)
    if resume and (checkpoint := newest_checkpoint(out_dir / "checkpoints")):
        restore(run, checkpoint)
    return run


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Puts weights, moments and progress where the checkpoint left them."""
    state = load_checkpoint(checkpoint, run.model, identity=identity(run.config, run.dataset))
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    run.progress.become(Progress(**state["progress"]))


def go_back(run: Run) -> None:
    """Returns to the newest intact checkpoint, or to the start where there is none."""
    run.model.zero_grad(set_to_none=True)
    run.optimizers = build_optimizers(run.model, run.config.optim)  # without moments
    free_memory(run.device)
    if checkpoint := newest_checkpoint(run.out_dir / "checkpoints"):
        restore(run, checkpoint)
    else:
        run.model.load_state_dict(GPT(run.config.model, seed=run.config.seed).state_dict())
        run.progress.become(Progress())


def may_go_on(run: Run) -> bool:
    """What the policy says to a loss or gradient that is not finite; it may send the run back to an earlier step."""
    policy = run.config.nonfinite
    return NONFINITE[policy.policy](run.progress, policy.max, lambda: go_back(run))


def train_step(run: Run) -> dict[str, float]:
    """One optimizer update; a gradient that is not finite is never applied. Returns loss, gradient norm and rates.

    Where memory runs out it is tried again with half as many sequences at once.
    """
    config, progress = run.config, run.progress
    with run.clock.step(run.batch_size * config.model.block_size):
        run.model.prepare_step(progress.step, config.steps, seed=config.seed)
        set_rates(run.optimizers, multiplier(progress.step, config.steps, config.schedule))
        number = progress.step + progress.passed_over
        loss, norm = retry_smaller(lambda: gradients(run, number), lambda: shrink(run), run.device)
        progress.step += 1
        progress.left_out += config.batch_size - run.batch_size
        progress.recent = [*progress.recent, loss][-AVERAGED:]
        if math.isfinite(loss) and math.isfinite(norm):
            update(run)
    return {"train_loss": loss, "grad_norm": norm} | rates(run)


def rates(run: Run) -> dict[str, float]:
    """The learning rate of each kind of parameter in this step, by the name of its setting."""
    groups = (group for optimizer in run.optimizers for group in optimizer.param_groups)
    return {"lr" if group["kind"] == "matrices" else f"lr_{group['kind']}": group["lr"] for group in groups}


def gradients(run: Run, number: int) -> tuple[float, float]:
    """Fills the gradients for a batch of the data, clips them, and returns the loss and their norm before that.

    The one place of a step that waits for a GPU: no gradient is applied before it is known to be finite.
    """
    idx, targets = run.upcoming[1] if run.upcoming and run.upcoming[0] == number else batch(run, number)
    with counted_once(run.model):
        # A halved batch is the first half, so that the order of the data stays what it is.
        loss = backward(run, idx[: run.batch_size], targets[: run.batch_size])
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optim.grad_clip or math.inf)
        run.upcoming = number + 1, batch(run, number + 1)  # made while a GPU computes
        loss, norm = torch.stack((loss, norm)).tolist()
        return loss, norm


def batch(run: Run, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T) of a step, on the device."""
    config = run.config
    parts = train_batch(
        run.dataset,
        seed=config.seed,
        step=number,
        batch_size=config.batch_size,
        block_size=config.model.block_size,
        order=config.data.order,
        reservoir=config.data.reservoir,
    )
    if run.device.type == "cuda":  # only from pinned memory does a copy go on beside the computation
        parts = (part.pin_memory() for part in parts)
    idx, targets = (part.to(run.device, non_blocking=True) for part in parts)
    return idx, targets


@contextlib.contextmanager
def counted_once(model: GPT) -> Iterator[None]:
    """Divisors r that were not finite do not count in a pass that breaks off: it is tried again."""
    counts = [] if model.normalizer is None else [model.normalizer.replaced]
    before = [count.clone() for count in counts]
    try:
        yield
    except BaseException:
        for count, old in zip(counts, before, strict=True):
            count.copy_(old)
        raise


def backward(run: Run, idx: Tensor, targets: Tensor) -> Tensor:
    """Fills the gradients of the mean loss over the batch, one micro-batch at a time, and returns that loss."""
    run.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    size = run.micro_batch_size
    for idx_part, targets_part in zip(idx.split(size), targets.split(size), strict=True):
        with run.autocast:
            loss = run.model(idx_part, targets_part)
        share = len(idx_part) / len(idx)
        (loss * share).backward()
        total += loss.detach() * share
    return total


def update(run: Run) -> None:
    """Lets the optimizers take their steps, and projects where it is due.

    An optimizer that memory runs out in has changed some weights and moments and not others. Nothing is left to try
    the step again with, so the run goes back to its newest checkpoint, with smaller micro-batches.
    """
    progress = run.progress
    try:
        with run.autocast:  # Muon's matrix products are in the precision of the others
            for optimizer in run.optimizers:
                optimizer.step()
        if due(progress.step, run.config.project_every):
            project_weights(run.model)
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not shrink(run):
            raise
    splits, halvings = progress.splits, progress.halvings
    log.warning("no memory for the optimizer's step %d: going back to the newest checkpoint", progress.step)
    go_back(run)
    progress.splits, progress.halvings = splits, halvings


def shrink(run: Run) -> bool:
    """Does what the policy says when memory has run out in training; False if that is nothing."""
    give_way, rows = ON_OOM[run.config.on_oom], run.micro_batch_size
    if give_way is None or rows == 1:
        return False
    give_way(run.progress)
    run.model.zero_grad(set_to_none=True)
    run.clock.leave_out()
    now = f"{run.micro_batch_size} sequences at once, in batches of {run.batch_size}"
    log.warning("step %d: out of memory with %d sequences at once; from here on %s", run.progress.step, rows, now)
    return True


def shrink_evaluation(run: Run) -> bool:
    """Halves the sequences at once in evaluation, which changes no result; False if it cannot, or should not."""
    if ON_OOM[run.config.on_oom] is None or run.eval_rows == 1:
        return False
    run.progress.eval_splits += 1
    log.warning("step %d: out of memory in evaluation; now %d sequences at once", run.progress.step, run.eval_rows)
    return True


def measure(run: Run, *, last: bool) -> dict[str, Tensor]:
    """Evaluates into `progress.last_eval` and returns what is worth a histogram: alphas and divisors, by name.

    The drift off the sphere is measured before the last projection. A number that is not finite becomes None. Where
    memory runs out it is tried again with half as many sequences at once.
    """
    drift, r = retry_smaller(lambda: look(run), lambda: shrink_evaluation(run), run.device)
    if last:  # the finished model lies on the sphere, however lazy the projection was
        project_weights(run.model)
    scores = retry_smaller(lambda: scored(run), lambda: shrink_evaluation(run), run.device)
    metrics = position(run) | {"train_loss": run.progress.train_loss} | scores | drift | replaced_divisors(run)
    run.progress.last_eval = {name: finite(value) for name, value in metrics.items()}
    return step_lengths(run.model) | r


def scored(run: Run) -> Metrics:
    """The validation loss, on as many sequences at once as fit."""
    with counted_once(run.model):
        return evaluate(run.model, run.validation.cut(run.eval_rows), autocast=run.autocast)


def look(run: Run) -> tuple[Metrics, dict[str, Tensor]]:
    """How far the model is off the sphere, and its divisors, by name; on one validation sequence."""
    idx = run.validation.batches[0][0][:1].to(run.device)
    r = divisors(run.model, idx)
    drift: Metrics = {
        "weight_norm_error": weight_norm_error(run.model),
        "activation_norm_error": activation_norm_error(run.model, idx),
    }
    return drift | divisor_statistics(r), r


def replaced_divisors(run: Run) -> Metrics:
    """`r_replaced`: how many divisors were not finite so far, in training and evaluation; each rise is a warning."""
    if run.model.normalizer is None:
        return {}
    replaced = int(run.model.normalizer.replaced)
    if replaced > (run.progress.last_eval.get("r_replaced") or 0):
        log.warning("step %d: %d divisors r were not finite and became 1", run.progress.step, replaced)
    return {"r_replaced": replaced}


def position(run: Run) -> Metrics:
    """The step, the tokens seen, and the throughput so far (None before it has been measured)."""
    progress = run.progress
    speed = progress.timed_tokens / progress.timed_seconds if progress.timed_seconds else None
    return {
        "step": progress.step,
        "tokens": progress.step * run.config.tokens_per_step - progress.left_out * run.config.model.block_size,
        "tokens_per_second": speed,
    }


def finish(status: str, run: Run) -> RunResult:
    """The result of a run that stops here. A diverged one has no validation loss: its last finite one would flatter."""
    scores = {name: value for name, value in run.progress.last_eval.items() if name != "step"}
    metrics = scores | position(run) | {"steps": run.progress.step, "train_loss": run.progress.train_loss}
    del metrics["step"]
    if status == "diverged":
        metrics |= {"val_loss": None, "val_bpb": None}
    metrics["peak_memory_bytes"] = peak_memory(run.device)
    metrics["n_params"] = sum(parameter.numel() for parameter in run.model.parameters())
    # What became of it: fewer sequences than the config says if memory ran out, steps that were not finite.
    metrics |= {"batch_size": run.batch_size, "micro_batch_size": run.micro_batch_size}
    metrics |= {"skipped_steps": run.progress.skipped, "rollbacks": run.progress.rollbacks}
    data = {
        "data_sha256": run.dataset.manifest["content_sha256"],
        "eval_sha256": run.validation.sha256,
        "eval_tokens": run.validation.n_tokens,
    }
    return RunResult(status, run.progress.step, {name: finite(value) for name, value in metrics.items()}, data)


def save_or_go_without(run: Run, tracker: Tracker, *, last: bool) -> None:
    """Saves rows and state. A run can do without any one of its checkpoints but the last, which is tried twice.

    Where there is no memory for it, any one is tried twice. A run that may go back to a checkpoint needs them all: its
    numbers depend on where it can go back to.

    Raises:
        RuntimeError, MemoryError: no memory for the last checkpoint, or for any if `on_oom` is fail.
        OSError: the disk does not take the last checkpoint, or any if `nonfinite.policy` is rollback.
    """
    gives_up, step = ON_OOM[run.config.on_oom] is None, run.progress.step
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
    latest = run.progress.last_eval
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    save_checkpoint(
        run.out_dir / "checkpoints",
        model=run.model,
        state={"progress": asdict(run.progress), "optimizers": optimizers},
        step=run.progress.step,
        val_loss=latest["val_loss"] if latest.get("step") == run.progress.step else None,
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


def rollback_settings(config: TrainConfig) -> dict[str, Any]:
    """What decides where a run returns to that meets a number that is not finite; empty for the other policies."""
    return {"checkpoint.every": config.checkpoint.every} if config.nonfinite.policy == "rollback" else {}


def due(step: int, every: int, *, last: bool = False) -> bool:
    """Whether something that happens every so many steps happens at `step`; always at the `last`."""
    return last or step % every == 0


class Clock:
    """Adds the time of training steps to `progress`, without the process's first `warmup` ones (allocation, caches)."""

    def __init__(self, progress: Progress, *, warmup: int) -> None:
        self._progress, self._skip = progress, warmup
        self._tokens = 0
        self._start = 0.0

    def step(self, tokens: int) -> Self:
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
        self._progress.timed_seconds += time.perf_counter() - self._start
        self._progress.timed_tokens += self._tokens


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ngpt.train", description="Train one model.")
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings")
    modes = f"what divides the residual's step: {', '.join(NORM_MODES)}; short for --set norm_mode=..."
    parser.add_argument("--norm-mode", "--norm_mode", metavar="MODE", help=modes)
    parser.add_argument("--out", type=Path, default=Path("runs/default"), help="folder for metrics and checkpoints")
    parser.add_argument("--resume", choices=["latest"], help="continue from the newest intact checkpoint in --out")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, options.set)
        if options.norm_mode is not None:
            config = override(config, {"model.norm_mode": options.norm_mode})
        config = config.model_copy(update={"tracker": settled(config.tracker, options.out)})
        run = train(config, options.out, resume=options.resume)
        result = print_progress(run)
    except (ConfigError, CorruptShardError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 74
    print(json.dumps({"status": result.status} | result.metrics, indent=1, allow_nan=False))
    return 0 if result.status == "finished" else 4


def read_config(path: Path | None, assignments: list[str]) -> TrainConfig:
    """Defaults, then the YAML file, then `name=value` assignments.

    Raises:
        ConfigError: whatever is wrong, with the position in the file.
    """
    config = TrainConfig()
    if path is not None:
        document = read_yaml(path)
        given, problems = named_settings(TrainConfig, document.data, folder=path.parent)
        if problems:
            raise ConfigError("\n".join(map(document.describe, problems)))
        try:
            config = build(TrainConfig, {name: value for name, (value, _) in given.items()})
        except ConfigError as error:
            problems = [located(problem, given) for problem in error.problems]
            raise ConfigError("\n".join(map(document.describe, problems))) from None
    given, problems = named_settings(TrainConfig, dict(map(parse_assignment, assignments)))
    if problems:
        raise ConfigError(problems)
    return override(config, {name: value for name, (value, _) in given.items()})


def located(problem: Problem, given: Mapping[str, tuple[Any, Location]]) -> Problem:
    """A problem at `optim.betas[0]`, moved to where the file gives `betas`, which may be a bare name."""
    location = problem.location
    for end in range(len(location), 0, -1):
        name = dotted(location[:end])
        if name in given:
            return Problem((*given[name][1], *location[end:]), problem.message)
    return problem


def print_progress(run: Generator[Metrics, None, RunResult]) -> RunResult:
    """Runs to the end with a line on stderr per evaluation."""
    while True:
        try:
            metrics = next(run)
        except StopIteration as stop:
            return stop.value
        shown = {name: metrics[name] for name in ("train_loss", "val_loss", "tokens_per_second")}
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        print(f"step {metrics['step']}  {numbers}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
