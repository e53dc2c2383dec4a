"""Where a run's numbers go: `metrics.jsonl` always, Weights & Biases and TensorBoard when asked.

What a run computes never depends on who watches: neither package is imported before it is asked for, and no setting
here is part of a trial's identity.
"""

import contextlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

from pydantic import Field

from ngpt.config.base import Config, ConfigError, one_of, runtime
from ngpt.system.atomic_files import LineFile, make_folder, write_atomic
from ngpt.training.wandb_tracker import WANDB_MODES, WandbRun, choose_mode, tell

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

log = logging.getLogger(__name__)
BINS = 32
FLOAT32_MAX = 3.4028234663852886e38


class TrackerConfig(Config):
    """Where the numbers of a run go besides `metrics.jsonl`, and under which names."""

    wandb: Annotated[str, one_of(WANDB_MODES, "wandb mode")] = runtime("disabled")  # auto: online where that works
    tensorboard: bool = runtime(False)
    project: str = runtime("ngpt")
    group: str = runtime("")  # a campaign's name, set by the engine
    job_type: str = runtime("train")  # a phase's name, set by the engine
    run_name: str = runtime("")  # a trial's arm and seed, set by the engine; empty: the folder's name
    log_every: Annotated[int, Field(ge=1)] = runtime(10)  # steps


def resolve_tracker(cfg: TrackerConfig, folder: Path, say: Callable[[str], None] = tell) -> TrackerConfig:
    """`cfg` with `auto` decided, and `say` told what was chosen and why. Call it once, before the first run.

    Args:
        cfg: as given.
        folder: of the runs, for people; it may be a pattern.
        say: takes a line of text.

    Raises:
        ConfigError: W&B was asked to be online and cannot be, or TensorBoard is not installed.
    """
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tracker.tensorboard needs a package: pip install 'ngpt-campaign[tensorboard]'")
    return cfg.model_copy(update={"wandb": choose_mode(cfg.wandb, folder, say)})


class Histogram(NamedTuple):
    """Counts of finite values between `edges`, one more than counts; empty when there are none."""

    edges: list[float]
    counts: list[int]
    not_finite: int
    total: float  # sum of the finite values
    squares: float  # sum of their squares


def histogram(values: "ArrayLike | Tensor") -> Histogram:
    """`BINS` equal bins from the smallest to the largest value, at least a thousandth of their size wide together.

    Args:
        values: numbers, or a tensor on any device; those that float32 cannot hold (NaN, infinities) are left out
            and counted.
    """
    import numpy as np

    detach = getattr(values, "detach", None)
    plain = detach().float().cpu() if detach else values  # NumPy takes no tensor of a GPU, and knows no bfloat16
    array = np.asarray(plain, dtype=np.float64)
    finite_ones = array[np.abs(array) <= FLOAT32_MAX]
    lost = array.size - finite_ones.size
    if not finite_ones.size:
        return Histogram([], [], lost, 0.0, 0.0)
    low, high = float(finite_ones.min()), float(finite_ones.max())
    # Equal values are one bar, not noise of the last bits.
    middle, half = (low + high) / 2, max(abs(low), abs(high), 1e-6) * 5e-4
    low, high = min(low, middle - half), max(high, middle + half)
    counts, edges = np.histogram(finite_ones, bins=BINS, range=(low, high))
    return Histogram(edges.tolist(), counts.tolist(), lost, float(finite_ones.sum()), float(finite_ones @ finite_ones))


class Rows:
    """A file of rows that loses none: what a full disk does not take waits in memory for the next row, or for `sync`.

    The file is made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, None
        self._waiting: list[str] = []
        self._synced = True

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows without NaN or infinities; a disk that does not take them is a warning and no error."""
        waited = bool(self._waiting)
        self._waiting += map(_line, rows)
        try:
            self._write()
        except OSError as error:
            if not waited:
                log.warning("%s: %s; its rows wait in memory", self._path, error.strerror or error)

    def sync(self) -> None:
        """Waits until all rows are on disk.

        Raises:
            OSError: the disk; what it did not take still waits.
        """
        self._write()
        if self._file and not self._synced:
            self._file.sync()
            self._synced = True

    def close(self) -> None:
        """Closes the file; rows that still wait in memory are lost."""
        if self._file:
            self._file.close()

    def _write(self) -> None:
        if self._waiting and self._file is None:
            self._file = LineFile(self._path)
        if self._waiting and self._file:
            self._synced = False
            self._file.append(*self._waiting)
            self._waiting.clear()


class Tracker:
    """Appends rows of numbers to `metrics.jsonl` as strict JSON; a number that is not finite is written as null.

    `keep_until` is the step a resumed run continues from: later rows of the interrupted attempt are dropped. Offline
    runs lie in `folder/wandb`, TensorBoard's events in `folder/tensorboard`.

    A reader next door sees whole rows, and a killed run loses none it has logged. A disk that is full does not end a
    run: its rows wait, and there is no checkpoint without the rows before it, see `sync`.

    Raises:
        ModuleNotFoundError: TensorBoard was asked for and is not installed, which `resolve_tracker` says in time.
        OSError: `folder` cannot be written.
    """

    def __init__(
        self, cfg: TrackerConfig, folder: Path, *, settings: Mapping[str, Any], keep_until: int | None = None
    ) -> None:
        make_folder(folder)
        metrics, histograms = folder / "metrics.jsonl", folder / "histograms.jsonl"
        _drop_after(keep_until, metrics)
        if histograms.exists():
            _drop_after(keep_until, histograms)
        with contextlib.ExitStack() as stack:
            self._metrics, self._histograms = Rows(metrics), Rows(histograms)
            for rows in (self._metrics, self._histograms):
                stack.callback(rows.close)
            self._watchers: list[TensorBoard | WandbRun] = []
            if cfg.tensorboard:
                self._watchers.append(stack.enter_context(TensorBoard(folder / "tensorboard", keep_until)))
            mode = choose_mode(cfg.wandb, folder) if cfg.wandb == "auto" else cfg.wandb
            if mode != "disabled":
                run = WandbRun(
                    folder,
                    mode=mode,
                    project=cfg.project,
                    group=cfg.group,
                    job_type=cfg.job_type,
                    name=cfg.run_name or folder.name,
                    settings=settings,
                )
                self._watchers.append(stack.enter_context(run))
            self._open = stack.pop_all()

    def log(self, row: Mapping[str, Any]) -> None:
        """Adds one row; it has a `step`, the rest are numbers or None."""
        clean = {name: finite_or_none(value) for name, value in row.items()}
        self._metrics.add([clean])
        numbers = {name: value for name, value in clean.items() if value is not None}
        for watcher in self._watchers:
            watcher.log(numbers)

    def log_histograms(self, step: int, values: Mapping[str, "ArrayLike | Tensor"]) -> None:
        """Adds the distribution of each of some arrays or tensors; a row per name in `histograms.jsonl`."""
        found = {name: histogram(array) for name, array in values.items()}
        self._histograms.add(
            {"step": step, "name": name, "edges": each.edges, "counts": each.counts, "not_finite": each.not_finite}
            for name, each in found.items()
        )
        if shown := {name: each for name, each in found.items() if each.counts}:
            for watcher in self._watchers:
                watcher.log_histograms(step, shown)

    def sync(self) -> None:
        """Waits until all rows are on disk: a checkpoint must not outlive the rows before it.

        Raises:
            OSError: the disk; what it did not take is tried again with the next row.
        """
        self._metrics.sync()
        self._histograms.sync()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Says things that are true of the whole run, such as skipped shards; values are what JSON can say."""
        clean = {name: finite_or_none(value) for name, value in facts.items()}
        for watcher in self._watchers:
            watcher.note(clean)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._sync_at_last()
        finally:
            self._open.__exit__(kind, error, trace)

    def _sync_at_last(self) -> None:
        """Syncs, with a second try: no row comes after it that could take the others along."""
        try:
            self.sync()
        except OSError as error:
            log.warning("the last rows were not written (%s); trying once more", error.strerror or error)
            self.sync()


def finite_or_none(value: Any) -> Any:
    """`value`, or None for a float that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` or `histograms.jsonl`; a last line that a killed process left half-written is none.

    Nor is one with a zero byte, which a power loss leaves of rows that were not synced. A file that is not there has no
    rows.
    """
    if not path.is_file():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if "\0" not in line]


def _drop_after(step: int | None, path: Path) -> None:
    """Leaves the rows up to `step` in the file, which is there afterwards; None leaves none.

    Rows after the newest checkpoint were never synced, so a power loss can leave anything of them.
    """
    content = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    lines = (content or "").split("\n")[:-1]
    rows = [] if step is None else list(map(_row, lines))
    if None in rows:
        log.warning("%s: %d lines are no rows, and are dropped", path, rows.count(None))
    kept = [row for row in rows if row is not None and step is not None and row["step"] <= step]
    if (wanted := "".join(f"{_line(row)}\n" for row in kept)) != content:  # else it costs each trial two syncs
        write_atomic(path, wanted)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False)


class TensorBoard:
    """Event files for `tensorboard --logdir`; what an interrupted attempt logged after `keep_until` is purged."""

    def __init__(self, folder: Path, keep_until: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = 0 if keep_until is None else keep_until + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def log(self, row: Mapping[str, Any]) -> None:
        """Adds the numbers of one `step`, each as a scalar."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Adds histograms by name, in their own bins; each has at least one finite value."""
        for name, each in histograms.items():
            self._writer.add_histogram_raw(
                name,
                min=each.edges[0],
                max=each.edges[-1],
                num=sum(each.counts),
                sum=each.total,
                sum_squares=each.squares,
                bucket_limits=each.edges[1:],
                bucket_counts=each.counts,
                global_step=step,
            )

    def note(self, facts: Mapping[str, Any]) -> None:
        """Adds facts about the whole run, each as a text in JSON."""
        for name, value in facts.items():
            self._writer.add_text(name, json.dumps(value, allow_nan=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
