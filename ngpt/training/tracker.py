"""Writes the metrics of a run to `metrics.jsonl`, and to Weights & Biases and TensorBoard, imported if used."""

import contextlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from ngpt.config.base import Config, ConfigError, one_of, runtime_setting
from ngpt.system.atomic_files import LineFile, describe_os_error, make_folder, naming, write_atomic
from ngpt.system.cli import print_line
from ngpt.training.wandb_tracker import WANDB_MODES, WandbRun, resolve_mode

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

log = logging.getLogger(__name__)
HISTOGRAM_BINS = 32
FLOAT32_MAX = 3.4028234663852886e38


class TrackerConfig(Config):
    """Where metrics go apart from `metrics.jsonl`, and under which names."""

    wandb: Annotated[str, one_of(WANDB_MODES, "wandb mode")] = runtime_setting("disabled")  # auto: online if possible
    tensorboard: bool = runtime_setting(False)
    project: str = runtime_setting("ngpt")
    group: str = runtime_setting("")  # a campaign's name, set by the engine
    job_type: str = runtime_setting("train")  # a phase's name, set by the engine
    run_name: str = runtime_setting("")  # a trial's arm and seed, set by the engine; empty: the folder's name
    log_every: Annotated[int, Field(ge=1, le=10**9)] = runtime_setting(10)  # steps


def resolve_tracker(cfg: TrackerConfig, folder: Path, report: Callable[[str], None] = print_line) -> TrackerConfig:
    """Resolves the W&B mode `auto`, once before the first run; ConfigError if W&B or TensorBoard is not available."""
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tracker.tensorboard needs a package: pip install 'ngpt-campaign[tensorboard]'")
    return cfg.model_copy(update={"wandb": resolve_mode(cfg.wandb, folder, report)})


class Histogram(NamedTuple):
    """Counts of the finite values per bin, and the edges of the bins. Both lists are empty without finite values."""

    edges: list[float]  # one more than `counts`
    counts: list[int]
    not_finite: int
    total: float  # sum of the finite values
    squares: float  # sum of their squares


def histogram(values: "ArrayLike | Tensor") -> Histogram:
    """Sorts values into `HISTOGRAM_BINS` bins of equal width. Those not finite in float32 are counted separately."""
    import numpy as np

    detach = getattr(values, "detach", None)
    array = np.asarray(detach().float().cpu() if detach else values, dtype=np.float64)  # NumPy lacks bfloat16
    finite = array[np.abs(array) <= FLOAT32_MAX]
    not_finite = array.size - finite.size
    if not finite.size:
        return Histogram([], [], not_finite, 0.0, 0.0)
    low, high = float(finite.min()), float(finite.max())
    # The range is at least a thousandth of the values, so that rounding noise falls into one bin.
    middle = (low + high) / 2
    half = max(abs(low), abs(high), 1e-6) * 5e-4
    low, high = min(low, middle - half), max(high, middle + half)
    counts, edges = np.histogram(finite, bins=HISTOGRAM_BINS, range=(low, high))
    return Histogram(edges.tolist(), counts.tolist(), not_finite, float(finite.sum()), float(finite @ finite))


class RowFile:
    """A file of JSON lines, created with its first row. If a write fails, the next `add` or `sync` tries again."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._synced = path, None, True
        self._unwritten: list[str] = []

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows without NaN or infinities. If the write fails, logs a warning and keeps the rows in memory."""
        is_first_failure = not self._unwritten
        self._unwritten += map(_line, rows)
        try:
            self._write()
        except OSError as error:
            if is_first_failure:
                log.warning("%s; its rows wait in memory", describe_os_error(error, self._path))

    def sync(self) -> None:
        """Writes and syncs all rows. If that fails, raises OSError and keeps the rows in memory."""
        self._write()
        if self._file and not self._synced:
            self._file.sync()
            self._synced = True

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self) -> None:
        if self._unwritten and self._file is None:
            self._file = LineFile(self._path)
        if self._unwritten and self._file:
            self._synced = False
            self._file.append(*self._unwritten)
            self._unwritten.clear()


class Tracker(contextlib.AbstractContextManager["Tracker"]):
    """Appends rows of numbers to `metrics.jsonl` as strict JSON. Numbers that are not finite are written as null.

    A resumed run continues from step `keep_until`; later rows are dropped. Offline W&B runs go to `folder/wandb`,
    TensorBoard's events to `folder/tensorboard`. Other processes see whole rows only, and a killed run loses none. A
    full disk does not end the run: rows are kept in memory, and must be written before a checkpoint (see `sync`).
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
            self._metrics = stack.enter_context(contextlib.closing(RowFile(metrics)))
            self._histograms = stack.enter_context(contextlib.closing(RowFile(histograms)))
            self._writers: list[TensorBoard | WandbRun] = []
            if cfg.tensorboard:
                self._writers.append(stack.enter_context(TensorBoard(folder / "tensorboard", keep_until)))
            mode = resolve_mode(cfg.wandb, folder) if cfg.wandb == "auto" else cfg.wandb
            if mode != "disabled":
                labels = {"project": cfg.project, "group": cfg.group, "job_type": cfg.job_type}
                name = cfg.run_name or folder.name
                run = WandbRun(folder, mode=mode, name=name, config=dict(settings), **labels)
                self._writers.append(stack.enter_context(run))
            self._open = stack.pop_all()

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a row: a `step`, and metrics by name, which may be None."""
        clean = {name: finite_or_none(value) for name, value in row.items()}
        self._metrics.add([clean])
        numbers = {name: value for name, value in clean.items() if value is not None}
        for writer in self._writers:
            writer.log(numbers)

    def log_histograms(self, step: int, values: Mapping[str, "ArrayLike | Tensor"]) -> None:
        """Appends a histogram of each array or tensor to `histograms.jsonl`."""
        histograms = {name: histogram(array) for name, array in values.items()}
        self._histograms.add(
            {"step": step, "name": name, "edges": each.edges, "counts": each.counts, "not_finite": each.not_finite}
            for name, each in histograms.items()
        )
        if nonempty := {name: each for name, each in histograms.items() if each.counts}:
            for writer in self._writers:
                writer.log_histograms(step, nonempty)

    def sync(self) -> None:
        """Writes and syncs all rows, as is necessary before a checkpoint; raises OSError if that fails."""
        self._metrics.sync()
        self._histograms.sync()

    def note(self, facts: Mapping[str, Any]) -> None:
        """Records facts about the whole run, such as skipped shards. Values are plain JSON."""
        clean = {name: finite_or_none(value) for name, value in facts.items()}
        for writer in self._writers:
            writer.note(clean)

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        try:
            if kind is None:
                self._final_sync()
        finally:
            self._open.__exit__(kind, *details)

    def _final_sync(self) -> None:
        try:
            self.sync()
        except OSError as error:  # no later row will try again
            log.warning("the last rows were not written (%s); trying once more", describe_os_error(error))
            self.sync()


def finite_or_none(value: Any) -> Any:
    """Returns `value`, or None if it is a NaN or an infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file. Ignores a half-written last line, and damaged lines."""
    return read_rows(path)[0]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file, and the number of lines that are none; lines with zero bytes from a power loss are ignored.

    Numbers that are not finite become None. A half-written last line is ignored.
    """
    if not path.is_file():
        return [], 0
    with naming(path):
        *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [_row(line) for line in lines if "\0" not in line]
    intact = [row for row in rows if row is not None]
    return intact, len(rows) - len(intact)


def _drop_after(step: int | None, path: Path) -> None:
    """Drops the rows after `step` (None: all), which a power loss may have damaged; creates a missing file."""
    content = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    rows = [] if step is None or content is None else list(map(_row, content.split("\n")[:-1]))
    if None in rows:
        log.warning("%s: dropped %d damaged lines", path, rows.count(None))
    kept = [row for row in rows if row is not None and step is not None and row["step"] <= step]
    if (new_content := "".join(f"{_line(row)}\n" for row in kept)) != content:  # a write costs two syncs
        write_atomic(path, new_content)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63 else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False)


class TensorBoard(contextlib.AbstractContextManager["TensorBoard"]):
    """Event files for `tensorboard --logdir`. Events of an interrupted attempt after `keep_until` are purged."""

    def __init__(self, folder: Path, keep_until: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=0 if keep_until is None else keep_until + 1, flush_secs=10)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        for name, each in histograms.items():
            self._writer.add_histogram_raw(
                *(name, each.edges[0], each.edges[-1], sum(each.counts), each.total, each.squares),
                bucket_limits=each.edges[1:],
                bucket_counts=each.counts,
                global_step=step,
            )

    def note(self, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            self._writer.add_text(name, json.dumps(value, allow_nan=False))

    def __exit__(self, *_: object) -> None:
        self._writer.close()
