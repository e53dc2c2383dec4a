"""Where a run's numbers go: `metrics.jsonl` always, Weights & Biases when asked."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field

from ngpt.config import Config, one_of, runtime
from ngpt.durable import write_atomic

WANDB_MODES = ("disabled", "offline", "online")


class TrackerConfig(Config):
    wandb: Annotated[str, one_of(WANDB_MODES, "wandb mode")] = runtime("disabled")
    project: str = runtime("ngpt")
    group: str = runtime("")  # a campaign's name, set by the engine
    job_type: str = runtime("train")  # a phase's name, set by the engine
    log_every: Annotated[int, Field(ge=1)] = runtime(10)  # steps


class Tracker:
    """Appends rows of numbers to `metrics.jsonl` as strict JSON; a number that is not finite is written as null.

    `keep_until` is the step a resumed run continues from: later rows of the interrupted attempt are dropped.
    """

    def __init__(
        self, cfg: TrackerConfig, folder: Path, *, settings: Mapping[str, Any], keep_until: int | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [] if keep_until is None else [row for row in read_metrics(path) if row["step"] <= keep_until]
        write_atomic(path, "".join(map(_line, kept)))
        # Line buffered: a reader next door sees whole rows, and a killed run loses none it has logged.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._wandb = _start_wandb(cfg, folder, settings) if cfg.wandb != "disabled" else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Adds one row; it has a `step`, the rest are numbers or None."""
        clean = {name: finite(value) for name, value in row.items()}
        self._file.write(_line(clean))
        if self._wandb is not None:
            numbers = {name: value for name, value in clean.items() if value is not None}
            self._wandb.log(numbers, step=int(row["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def finite(value: Any) -> Any:
    """`value`, or None for a float that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a killed process left half-written is not one."""
    if not path.is_file():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _start_wandb(cfg: TrackerConfig, folder: Path, settings: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.init(
        project=cfg.project,
        group=cfg.group or None,
        job_type=cfg.job_type,
        name=folder.name,
        # The folder is the run: resuming in it continues it, and another folder of that name is another run.
        id=hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16],
        resume="allow",
        dir=folder,
        mode="offline" if cfg.wandb == "offline" else "online",
        config=dict(settings),
        settings=wandb.Settings(silent=True),
    )
