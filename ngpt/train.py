"""The train loop, and `python -m ngpt.train` for a single run.

python -m ngpt.train --set alpha=0.2 steps=500 --out runs/first
python -m ngpt.train --config model.yaml --out runs/first --resume latest
"""

import argparse
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ngpt.checkpoint import CheckpointConfig, checkpoint_folders, load_checkpoint, newest_checkpoint, save_checkpoint
from ngpt.config import (
    Config,
    ConfigError,
    Location,
    Problem,
    build,
    dotted,
    flatten,
    invalid,
    is_identity,
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
from ngpt.memory import peak_memory, reset_peak_memory
from ngpt.model import GPT, Count, ModelConfig
from ngpt.norm import NORM_MODES
from ngpt.optim import OptimConfig, build_optimizers, set_rates, unfit
from ngpt.projection import project_weights
from ngpt.schedule import ScheduleConfig, multiplier
from ngpt.tracker import Tracker, TrackerConfig, finite, settled
from ngpt.written import named_settings
from ngpt.yamlfile import parse_assignment, read_yaml

AVERAGED = 10  # steps whose mean is the reported training loss
Metrics = dict[str, float | None]
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
    dtype: Annotated[str, one_of(DTYPES, "dtype")] = "float32"  # of matrix products; weights and norms stay float32
    compile: bool = False  # the blocks and the loss, with torch.compile: worth its half minute in long runs
    device: Annotated[str, one_of(DEVICES, "device")] = runtime("auto")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
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


@dataclass
class Progress:
    """What the loop remembers between steps, besides weights and moments; saved with every checkpoint."""

    step: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last `AVERAGED` steps
    timed_tokens: int = 0  # in steps after the warm-up of the process
    timed_seconds: float = 0.0
    last_eval: Metrics = field(default_factory=dict)

    @property
    def train_loss(self) -> float | None:
        """Mean over the last steps, however often rows are logged; None before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else None


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
    device: torch.device
    dataset: Dataset
    tokenizer_model: bytes | None  # what a checkpoint carries besides, see `tokenizer_model`
    validation: EvalSet
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    clock: "Clock"

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
    """
    run = set_up(resolved(config), out_dir, resume=resume, dataset=dataset)
    config, progress = run.config, run.progress
    resumed_at = progress.step or None

    with Tracker(config.tracker, out_dir, settings=flatten(config), keep_until=resumed_at) as tracker:
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
                    if progress.last_eval["val_loss"] is None:
                        return finish("diverged", run)
                if progress.step and due(progress.step, config.checkpoint.every, last=last):
                    save(run, out_dir)
            if last:
                return finish("finished", run)

            # ---- one step ----------------------------------------------------------------------
            step_metrics = train_step(run)
            diverged = not all(math.isfinite(value) for value in step_metrics.values())
            if diverged or due(progress.step, config.tracker.log_every, last=progress.step == config.steps):
                tracker.log(position(run) | step_metrics | {"train_loss": progress.train_loss})
            if diverged:
                return finish("diverged", run)


def set_up(config: TrainConfig, out_dir: Path, *, resume: str | None, dataset: Dataset | None) -> Run:
    """Model, optimizers and data at the first step, or as the newest intact checkpoint left them."""
    if resume not in (None, "latest"):
        raise ConfigError(f"resume must be 'latest', got {resume!r}")
    if resume is None and checkpoint_folders(out_dir / "checkpoints"):
        raise ConfigError(f"{out_dir} holds checkpoints of an earlier run: resume it, or choose another folder")
    device = pick_device(config.device)
    reset_peak_memory(device)
    dataset = dataset or open_dataset(config.data)
    rows = config.micro_batch_size or config.batch_size  # what fits while training fits here
    validation = eval_set(dataset, tokens=config.eval_tokens, batch_size=rows, block_size=config.model.block_size)
    model = GPT(config.model, seed=config.seed).to(device)
    if config.compile:
        model.compile_parts()
    optimizers = build_optimizers(model, config.optim)
    progress = Progress()
    if resume and (checkpoint := newest_checkpoint(out_dir / "checkpoints")):
        state = load_checkpoint(checkpoint, model, identity=identity(config, dataset))
        progress = Progress(**state["progress"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    clock = Clock(progress, warmup=min(5, config.steps // 2))
    carried = tokenizer_model(config.data, dataset)
    return Run(config, device, dataset, carried, validation, model, optimizers, progress, clock)


def train_step(run: Run) -> dict[str, float]:
    """One optimizer update; a gradient that is not finite is never applied. Returns loss, gradient norm and rates."""
    config, progress = run.config, run.progress
    with run.clock.step(config.tokens_per_step):
        run.model.prepare_step(progress.step, config.steps, seed=config.seed)
        rate = multiplier(progress.step, config.steps, config.schedule)
        set_rates(run.optimizers, rate)
        block_size = config.model.block_size
        batch = train_batch(
            run.dataset,
            seed=config.seed,
            step=progress.step,
            batch_size=config.batch_size,
            block_size=block_size,
            order=config.data.order,
            reservoir=config.data.reservoir,
        )
        loss = backward(run, *batch)
        norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.optim.grad_clip or math.inf))
        progress.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in run.optimizers:
                optimizer.step()
            if due(progress.step, config.project_every):
                project_weights(run.model)
    progress.recent = [*progress.recent, loss][-AVERAGED:]
    groups = (group for optimizer in run.optimizers for group in optimizer.param_groups)
    rates = {"lr" if group["kind"] == "matrices" else f"lr_{group['kind']}": group["lr"] for group in groups}
    return {"train_loss": loss, "grad_norm": norm} | rates


def backward(run: Run, idx: Tensor, targets: Tensor) -> float:
    """Fills the gradients of the mean loss over the batch, one micro-batch at a time, and returns that loss."""
    run.model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    size = run.config.micro_batch_size or run.config.batch_size
    for idx_part, targets_part in zip(idx.split(size), targets.split(size), strict=True):
        with run.autocast:
            loss = run.model(idx_part.to(run.device), targets_part.to(run.device))
        share = len(idx_part) / len(idx)
        (loss * share).backward()
        total += loss.detach() * share
    return float(total)


def measure(run: Run, *, last: bool) -> dict[str, Tensor]:
    """Evaluates into `progress.last_eval` and returns what is worth a histogram: alphas and divisors, by name.

    The drift off the sphere is measured before the last projection. A number that is not finite becomes None.
    """
    idx = run.validation.batches[0][0][:1].to(run.device)
    r = divisors(run.model, idx)
    drift: Metrics = {
        "weight_norm_error": weight_norm_error(run.model),
        "activation_norm_error": activation_norm_error(run.model, idx),
        **divisor_statistics(r),
    }
    if last:  # the finished model lies on the sphere, however lazy the projection was
        project_weights(run.model)
    scores = evaluate(run.model, run.validation, autocast=run.autocast)
    metrics = position(run) | {"train_loss": run.progress.train_loss} | scores | drift | replaced_divisors(run)
    run.progress.last_eval = {name: finite(value) for name, value in metrics.items()}
    return step_lengths(run.model) | r


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
        "tokens": progress.step * run.config.tokens_per_step,
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
    data = {
        "data_sha256": run.dataset.manifest["content_sha256"],
        "eval_sha256": run.validation.sha256,
        "eval_tokens": run.validation.n_tokens,
    }
    return RunResult(status, run.progress.step, {name: finite(value) for name, value in metrics.items()}, data)


def save(run: Run, out_dir: Path) -> None:
    """Commits a checkpoint from which the run continues exactly."""
    latest = run.progress.last_eval
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    save_checkpoint(
        out_dir / "checkpoints",
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
    names = (name for name in flatten(config) if is_identity(TrainConfig, name) and not name.startswith("data."))
    data = {"data.fingerprint": dataset.manifest["fingerprint"], "data.order": config.data.order}
    data |= corpora.order_settings(config.data)
    return {name: flatten(config)[name] for name in names} | data


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
