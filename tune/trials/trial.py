"""The body of one trial: the same under Ray, inline, and in a test. It never raises: a dead trial is a record, too."""

import contextlib
import functools
import gc
import os
import platform
import socket
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ngpt.config.base import flatten
from ngpt.config.secrets import redacted
from ngpt.data.dataset import DataConfig, Dataset, open_dataset
from ngpt.system import atomic_files as durable
from ngpt.system.device import pick_device
from ngpt.system.memory import peak_memory
from ngpt.training.config import TrainConfig
from ngpt.training.loop import train
from ngpt.training.state import Metrics

CONTEXT = 768 << 20  # bytes that a process takes of a GPU besides those of its tensors
SOURCES = {".py", ".cpp", ".h"}


@dataclass(frozen=True)
class TrialSpec:
    """What a worker needs to run a trial; paths are absolute, since Ray changes the working directory."""

    trial_id: str
    phase: str
    arm: str
    seed: int
    config: TrainConfig
    folder: Path
    threads: int
    attempt: int
    packed: int = 1  # trials that share its device, this one included

    @property
    def name(self) -> str:
        """For people: `alpha/alpha=0.28 seed 1`."""
        return f"{self.phase}/{self.arm} seed {self.seed}"


@dataclass(frozen=True)
class TrialResult:
    """What came of one attempt. `status` is finished, diverged, failed or stopped; the last two say why in `error`."""

    status: str
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    started_at: str | None = None  # UTC
    seconds: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)


def run_trial(spec: TrialSpec) -> Generator[TrialResult, None, TrialResult]:
    """Trains; yields at each evaluation what there is to say if it were stopped there, and returns what came of it.

    It continues from the newest intact checkpoint that an interrupted attempt left in `spec.folder`.
    """
    torch.set_num_threads(spec.threads)
    started_at, start = datetime.now(UTC).isoformat(timespec="milliseconds"), time.perf_counter()
    status, metrics, error, data = "failed", {}, None, {}

    def interim() -> TrialResult:
        place = {"pid": os.getpid(), "packed": spec.packed}
        provenance = data | describe_machine(spec.config.device, spec.threads) | place
        return TrialResult(status, metrics, error, started_at, time.perf_counter() - start, provenance)

    try:
        prepare_trial_folder(spec.folder, spec.config)
        limit_gpu_memory(pick_device(spec.config.device), spec.packed)
        dataset = open_cached_dataset(spec.config.data)
        with contextlib.closing(train(spec.config, spec.folder, resume="latest", dataset=dataset)) as run:
            status, data = "stopped", {"data_sha256": dataset.manifest["content_sha256"]}
            try:
                while True:
                    metrics = partial_metrics(next(run), spec.config)
                    yield interim()
            except StopIteration as stop:
                status, metrics, data = stop.value.status, stop.value.metrics, stop.value.data
    except Exception as exception:
        # The one place where a trial's death becomes a record; the rest of the campaign goes on.
        status, metrics, data = "failed", {}, {}
        text = redacted("".join(traceback.format_exception(exception)))
        error = text[-4000:]
        with contextlib.suppress(OSError):  # the disk may be full; the record has it, too
            durable.write_atomic(spec.folder / "error.txt", text)
    result = interim()
    freeze_loaded_objects()
    return result


@functools.cache
def freeze_loaded_objects() -> None:
    """After the first trial of a process: what was imported for it stays, and is not looked through for garbage again.

    torch, its compiler and Ray are half a million objects, a tenth of a second and more at each collection, and every
    trial begins with one.
    """
    gc.collect()
    gc.freeze()


def limit_gpu_memory(device: torch.device, packed: int) -> None:
    """Holds this process to its share of a GPU that so many trials are on: it runs out of memory before they do."""
    if device.type == "cuda" and packed > 1:
        total = torch.cuda.mem_get_info(device)[1]
        # Of the current GPU: unlike its neighbours in torch, this function does not know `cuda` without a number.
        torch.cuda.set_per_process_memory_fraction(max(0.01, 1 / packed - CONTEXT / total))


def prepare_trial_folder(folder: Path, config: TrainConfig) -> None:
    """Makes a trial's folder with the files that every trial has, however early it ends."""
    durable.make_folder(folder)
    durable.sweep(folder)
    with contextlib.suppress(OSError):  # the tracker makes it as well, if this was a fault that passes
        (folder / "metrics.jsonl").touch()  # its name gets to disk with that of the next file
    durable.write_json(folder / "config.json", flatten(config))


def partial_metrics(evaluation: Metrics, config: TrainConfig) -> Metrics:
    """The metrics of a record, from those of an evaluation before the end; the parameters were not counted."""
    scores = {name: value for name, value in evaluation.items() if name != "step"}
    peak = peak_memory(pick_device(config.device))
    return scores | {"steps": evaluation["step"], "peak_memory_bytes": peak, "n_params": None}


@functools.lru_cache(maxsize=8)
def open_cached_dataset(config: DataConfig) -> Dataset:
    """A corpus, kept mapped by the worker from trial to trial."""
    return open_dataset(config)


@functools.cache
def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Where a result comes from, as far as its numbers may depend on it."""
    kind = pick_device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else f"{kind.type} {platform.machine()}"
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    return {"device": name, "threads": threads, "host": socket.gethostname(), **versions, "code_sha256": code_hash()}


@functools.cache
def code_hash(folder: Path | None = None) -> str:
    """Digest of the library's sources, Python and C++: trials of one phase should agree on it."""
    import hashlib

    import ngpt

    folder = folder or Path(ngpt.__path__[0])
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
