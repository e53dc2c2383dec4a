"""Runs one trial, with the same code under Ray, inline and in tests. An exception becomes a failed result."""

import contextlib
import functools
import gc
import json
import os
import platform
import socket
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ngpt.code.digest import current_code
from ngpt.code.plugins import Source
from ngpt.config.base import ConfigError, flatten, printable
from ngpt.config.secrets import redact
from ngpt.data.dataset import DataConfig, Dataset, open_dataset
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.downstream.config import DownstreamTasks
from ngpt.plugins.load import load_sources
from ngpt.plugins.records import used_plugins
from ngpt.plugins.tables import PluginError
from ngpt.system import gpus
from ngpt.system.atomic_files import make_folder, read_regular, remove_temporary_files, write_atomic, write_json
from ngpt.system.device import pick_device
from ngpt.system.memory import peak_memory
from ngpt.training.checkpoint import checkpoint_folders
from ngpt.training.config import TrainConfig
from ngpt.training.loop import train
from ngpt.training.run import TIMES, RunResult
from ngpt.training.state import Metrics
from tune.storage.names import ELSEWHERE
from tune.trials.evaluation import evaluate_trial

# GPU memory that a process uses in addition to its tensors, at most this share of its part of the GPU.
CUDA_CONTEXT_BYTES, CUDA_CONTEXT_SHARE = 768 << 20, 0.25
MAX_ERROR_LENGTH = 4000  # characters; a record keeps the start of a longer message, the end of a longer traceback


@dataclass(frozen=True)
class TrialSpec:
    """Everything a worker needs to run a trial. Paths are absolute, since Ray changes the working directory."""

    trial_id: str
    phase: str
    arm: str
    seed: int
    config: TrainConfig
    folder: Path
    threads: int
    attempt: int
    packed: int = 1  # number of trials that may share its device, including itself
    ranks: int = 1  # processes that train it together (tune/ranks), each with `threads`
    plugins: tuple[Source, ...] = ()  # loaded by the process of the campaign
    evaluation: DownstreamTasks | None = None  # set if it has been trained, and only runs downstream tasks
    corpus: str | None = None  # fingerprint of the corpus that the campaign began with; None: any is right

    @property
    def name(self) -> str:
        """Display name, like `alpha/alpha=0.28 seed 1`."""
        return f"{self.phase}/{self.arm} seed {self.seed}"


@dataclass(frozen=True)
class TrialResult:
    """Result of one attempt at a trial. `error` is the reason if `status` is failed or stopped.

    Of an exception, `error` is its type and message.
    """

    status: str  # finished, diverged, failed or stopped
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    started_at: str | None = None  # UTC
    seconds: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)
    eval_blocks: dict[str, Any] | None = None  # loss by block of the evaluation text, see ngpt/training/text_blocks.py
    traceback: str | None = None  # its end, of an exception


class Attempt:
    """Builds the results of one attempt at a trial, which starts now. `marks` are added to their provenance."""

    def __init__(self, spec: TrialSpec, **marks: Any) -> None:
        # Read before the training, since a file may be edited meanwhile.
        used = [{name: each[name] for name in ("name", "digest")} for each in used_plugins(flatten(spec.config))]
        code = {"code_sha256": current_code().digest} | ({"plugins": used} if used else {})
        self._spec, self._marks = spec, code | marks
        self._started_at, self._start = datetime.now(UTC).isoformat(timespec="milliseconds"), time.perf_counter()

    def result(self, run: RunResult, error: str | None = None) -> TrialResult:
        """The result of a run that has ended."""
        process = {"pid": os.getpid(), "packed": self._spec.packed} | self._marks
        provenance = run.data | describe_machine(self._spec.config.device, self._spec.threads) | process
        seconds = time.perf_counter() - self._start
        return TrialResult(run.status, run.metrics, error, self._started_at, seconds, provenance, run.eval_blocks)

    def interim(self, evaluation: Metrics, dataset: Dataset) -> TrialResult:
        """The result if the trial is stopped at this evaluation. `n_params` is not known yet."""
        metrics = {name: value for name, value in evaluation.items() if name not in ("step", *TIMES)} | {
            "steps": evaluation["step"],
            "peak_memory_bytes": peak_memory(pick_device(self._spec.config.device)),
            "n_params": None,
        }
        return self.result(RunResult("stopped", 0, metrics, {"data_sha256": dataset.manifest["content_sha256"]}))

    def failure(self, exception: Exception) -> TrialResult:
        """The result of a trial that raised. The traceback, with secrets redacted, is also written to `error.txt`."""
        text = redact("".join(traceback.format_exception(exception)))
        reason = redact(f"{type(exception).__name__}: {exception}".removesuffix(": "))
        with contextlib.suppress(OSError):  # the disk may be full; the record also has the error
            write_atomic(self._spec.folder / "error.txt", text)
        result = self.result(RunResult("failed", 0), reason[:MAX_ERROR_LENGTH])
        return replace(result, traceback=text[-MAX_ERROR_LENGTH:])


def run_trial(spec: TrialSpec, **marks: Any) -> Generator[TrialResult, None, TrialResult]:
    """Trains a trial from the newest intact checkpoint in `spec.folder`, if there is one. Never raises.

    At each evaluation, yields the result that counts if the trial is stopped there. Returns the final result.
    """
    problem = plugin_problem(spec.plugins)  # before the attempt notes which code it runs
    attempt = Attempt(spec, **marks)
    try:
        if problem is not None:
            raise problem
        if spec.evaluation is not None:
            final = yield from evaluate_trained(spec, spec.evaluation, attempt)
        else:
            final = yield from train_trial(spec, attempt)
    except Exception as exception:  # becomes the result of the trial, so that the others go on
        final = attempt.failure(exception)
    freeze_loaded_objects()
    return final


def train_trial(spec: TrialSpec, attempt: Attempt, ranks: Ranks = ALONE) -> Generator[TrialResult, None, TrialResult]:
    """As `run_trial`, but raises what ends the trial; every rank of it calls this."""
    torch.set_num_threads(spec.threads)
    if ranks.is_first:
        prepare_trial_folder(spec.folder, spec.config)
    limit_gpu_memory(pick_device(spec.config.device), spec.packed)
    dataset = open_trial_dataset(spec)
    with contextlib.closing(train(spec.config, spec.folder, resume="latest", dataset=dataset, ranks=ranks)) as run:
        while True:
            try:
                evaluation = next(run)
            except StopIteration as stop:
                return attempt.result(stop.value)
            yield attempt.interim(evaluation, dataset)


def evaluate_trained(
    spec: TrialSpec, tasks: DownstreamTasks, attempt: Attempt
) -> Generator[TrialResult, None, TrialResult]:
    """Returns a result whose metrics are the scores of a trained trial; its provenance says what was asked.

    Yields after a stop request only; raises what ends the evaluation.
    """
    torch.set_num_threads(spec.threads)
    steps = spec.config.steps
    with contextlib.closing(evaluate_trial(spec.folder, tasks, steps=steps, device=spec.config.device)) as run:
        while True:
            try:
                next(run)
            except StopIteration as stop:
                found = stop.value
                break
            yield attempt.result(RunResult("stopped", steps, {"steps": steps}))
    result = attempt.result(RunResult("finished", steps, dict(found.scores)))
    about = {name: found.about[name] for name in ("asked", "lm_eval", "content") if name in found.about}
    return replace(result, provenance=result.provenance | {"evaluation": about})


def plugin_problem(sources: Sequence[Source]) -> PluginError | None:
    """Loads the plug-ins of a campaign in this process; returns what is wrong with one, such as a later edit."""
    try:
        load_sources(sources)
    except PluginError as error:
        return error
    return None


@functools.cache
def freeze_loaded_objects() -> None:
    """Excludes all objects that exist after the first trial of a process from garbage collection.

    Every trial starts with a collection, which would take 0.1 s or more for the half million objects of torch and Ray.
    """
    gc.collect()
    gc.freeze()


def limit_gpu_memory(device: torch.device, packed: int) -> None:
    """Limits this process to 1/`packed` of the GPU memory, so that it cannot take memory from the other trials.

    A process that runs one trial after another may have had another limit before.
    """
    if gpus.is_gpu(device):
        total = gpus.memory(device)[1]
        gpus.limit_memory(1.0 if packed == 1 else tensor_bytes(total, packed) / total)


def tensor_bytes(total: int, packed: int) -> int:
    """The bytes of tensors that each of `packed` trials may hold on a GPU of `total` bytes.

    The rule by which trials are packed (tune/machine/concurrency_benchmark.py) allows no more.
    """
    share = total / packed
    return int(share - min(CUDA_CONTEXT_BYTES, share * CUDA_CONTEXT_SHARE))


def has_checkpoint(folder: Path) -> bool:
    """Whether the trial in `folder` has a checkpoint, here or in an object store."""
    return bool(checkpoint_folders(folder / "checkpoints")) or (folder / ELSEWHERE).exists()


def origin_of(folder: Path) -> str | None:
    """The campaign that made the checkpoints in the folder of a trial that was never started; None without any."""
    if not checkpoint_folders(folder / "checkpoints"):
        return None
    try:
        name = json.loads(read_regular(folder / "config.json"))["tracker.group"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = None
    return printable(name) if name and isinstance(name, str) else "unknown"


def prepare_trial_folder(folder: Path, config: TrainConfig) -> None:
    """Creates a trial's folder with the files that every trial has, even if it fails immediately."""
    make_folder(folder)
    remove_temporary_files(folder)
    with contextlib.suppress(OSError):  # not fatal: the tracker also creates the file
        (folder / "metrics.jsonl").touch()  # not synced here: `write_json` syncs the folder
    write_json(folder / "config.json", flatten(config))


@functools.lru_cache(maxsize=8)
def open_cached_dataset(config: DataConfig) -> Dataset:
    """Opens a corpus and keeps it mapped for later trials in this worker."""
    return open_dataset(config)


def open_trial_dataset(spec: TrialSpec) -> Dataset:
    """Opens the corpus of a trial; ConfigError if it has been edited since the campaign began."""
    dataset = open_cached_dataset(spec.config.data)
    found = dataset.manifest["fingerprint"]
    if spec.corpus is not None and spec.corpus != found:
        text = (
            f"the corpus {spec.config.data.corpus} has changed since this run began ({spec.corpus} then, {found} now)"
        )
        raise ConfigError(f"{text}; restore it and run the same command again, or choose another --out")
    return dataset


@functools.cache
def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Device, threads, host and versions: the part of the provenance that can affect the numbers."""
    kind = pick_device(device)
    name = gpus.name(kind) if gpus.is_gpu(kind) else f"{kind.type} {platform.machine()}"
    place = {"gpu": gpus.visible_ids()[0]} if gpus.is_gpu(kind) else {}
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    return {"device": name, "threads": threads, "host": socket.gethostname(), **place, **versions}
