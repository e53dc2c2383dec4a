"""The body of one trial: the same under Ray, inline, and in a test. It never raises: a dead trial is a record, too."""

import contextlib
import functools
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

from ngpt.config import flatten
from ngpt.data.corpora import DataConfig, Dataset, open_dataset
from ngpt.durable import write_json
from ngpt.train import Metrics, TrainConfig, pick_device, train


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

    @property
    def name(self) -> str:
        """For people: `alpha/alpha=0.28 seed 1`."""
        return f"{self.phase}/{self.arm} seed {self.seed}"


@dataclass(frozen=True)
class TrialResult:
    """What came of one attempt. `status` is finished, diverged or failed; a failed one has an `error`."""

    status: str
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    started_at: str | None = None  # UTC
    seconds: float = 0.0
    provenance: dict[str, Any] = field(default_factory=dict)


def run_trial(spec: TrialSpec) -> Generator[Metrics, None, TrialResult]:
    """Trains; yields metrics at each evaluation and returns what came of it.

    It continues from the newest intact checkpoint that an interrupted attempt left in `spec.folder`.
    """
    torch.set_num_threads(spec.threads)
    started_at, start = datetime.now(UTC).isoformat(timespec="milliseconds"), time.perf_counter()
    status, metrics, error, data = "failed", {}, None, {}
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
        write_json(spec.folder / "config.json", flatten(spec.config))
        (spec.folder / "metrics.jsonl").touch()  # there is one, however early the trial dies
        result = yield from train(spec.config, spec.folder, resume="latest", dataset=opened(spec.config.data))
        status, metrics, data = result.status, result.metrics, result.data
    except Exception as exception:
        # The one place where a trial's death becomes a record; the rest of the campaign goes on.
        lines = traceback.format_exception(exception)
        error = "".join(lines)[-4000:]
        with contextlib.suppress(OSError):  # the disk may be full; the record has it, too
            (spec.folder / "error.txt").write_text("".join(lines), encoding="utf-8")
    return TrialResult(
        status=status,
        metrics=metrics,
        error=error,
        started_at=started_at,
        seconds=time.perf_counter() - start,
        provenance=data | machine(spec.config.device, spec.threads) | {"pid": os.getpid()},
    )


@functools.lru_cache(maxsize=8)
def opened(config: DataConfig) -> Dataset:
    """A corpus, kept mapped by the worker from trial to trial."""
    return open_dataset(config)


@functools.cache
def machine(device: str, threads: int) -> dict[str, Any]:
    """Where a result comes from, as far as its numbers may depend on it."""
    kind = pick_device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else f"{kind.type} {platform.machine()}"
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    return {"device": name, "threads": threads, "host": socket.gethostname(), **versions, "code_sha256": code_hash()}


@functools.cache
def code_hash() -> str:
    """Digest of the library's sources: trials of one phase should agree on it."""
    import hashlib

    import ngpt

    digest = hashlib.sha256()
    folder = Path(ngpt.__path__[0])
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
