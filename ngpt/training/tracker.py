"""Writes the metrics of a run to `metrics.jsonl`, and to the tracking tools (ngpt/trackers)."""

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngpt.system.atomic_files import LineFile, describe_os_error, make_folder, naming, write_atomic
from ngpt.trackers.base import Ending, TrackedRun, Writer, histogram
from ngpt.trackers.config import TrackerConfig
from ngpt.trackers.open import open_writers

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

log = logging.getLogger(__name__)
STOPPED = (GeneratorExit, KeyboardInterrupt, SystemExit)  # what ends a run that can be resumed


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

    A resumed run continues from step `keep_until`; later rows are dropped. Other processes see whole rows only, and a
    killed run loses none. A full disk does not end the run: rows are kept in memory, and must be written before a
    checkpoint (see `sync`).
    """

    def __init__(
        self,
        cfg: TrackerConfig,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        keep_until: int | None = None,
        rolled_back: bool = False,
    ) -> None:
        """`rolled_back`: rows after `keep_until` will have other values than those that are dropped."""
        make_folder(folder)
        metrics, histograms = folder / "metrics.jsonl", folder / "histograms.jsonl"
        dropped = _drop_after(keep_until, metrics)
        dropped += _drop_after(keep_until, histograms) if histograms.exists() else []
        run = _tracked_run(cfg, folder, settings)
        repeated = {} if rolled_back else _last_steps(dropped)
        run = replace(run, keep_until=keep_until, repeated=repeated, rolled_back=rolled_back)
        self._ending: tuple[Ending, Mapping[str, Any]] = ("continues", {})
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(contextlib.closing(RowFile(metrics)))
            self._histograms = stack.enter_context(contextlib.closing(RowFile(histograms)))
            self._writers: list[Writer] = open_writers(cfg, run, lambda: read_metrics(metrics), stack)
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

    def end(self, status: Literal["finished", "diverged"], metrics: Mapping[str, Any]) -> None:
        """Says that the run has ended with these final metrics; without this, it continues in another tracker."""
        self._ending = (status, metrics)

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        ending, final = self._ending
        if kind is not None:
            ending = "stopped" if issubclass(kind, STOPPED) else "failed"
        try:
            if kind is None:
                self._final_sync()
            for writer in self._writers:
                writer.end(ending, final)
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
    lines = [line for line in lines if "\0" not in line]
    intact = parse_rows(lines)
    return intact, len(lines) - len(intact)


def parse_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The rows in lines of a file; damaged lines are left out, and numbers that are not finite become None."""
    return [row for line in lines if "\0" not in line and (row := _row(line)) is not None]


def _tracked_run(cfg: TrackerConfig, folder: Path, settings: Mapping[str, Any]) -> TrackedRun:
    """The run as tracking tools show it. In a campaign, `run_name` is `ARM seed N`, and the job type the phase."""
    seed = settings.get("seed", 0)
    return TrackedRun(
        folder,
        project=cfg.project,
        group=cfg.group,
        phase=cfg.job_type if cfg.group else "",
        arm=cfg.run_name.removesuffix(f" seed {seed}") if cfg.group else "",
        seed=seed,
        name=cfg.run_name,
        settings=settings,
        varied=tuple(cfg.varied.split()),
    )


def _last_steps(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The last step of each metric, and of each histogram, in rows."""
    last: dict[str, int] = {}
    for row in rows:
        names = [row["name"]] if isinstance(row.get("name"), str) else [n for n in row if row[n] is not None]
        for name in names:
            last[name] = max(last.get(name, -1), row["step"])
    return last


def _drop_after(step: int | None, path: Path) -> list[dict[str, Any]]:
    """Drops the rows after `step` (None: all), which a power loss may have damaged; creates a missing file.

    Returns the rows that are dropped.
    """
    content = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    rows = [] if content is None else list(map(_row, content.split("\n")[:-1]))
    if step is not None and None in rows:
        log.warning("%s: dropped %d damaged lines", path, rows.count(None))
    kept = [row for row in rows if row is not None and step is not None and row["step"] <= step]
    if (new_content := "".join(f"{_line(row)}\n" for row in kept)) != content:  # a write costs two syncs
        write_atomic(path, new_content)
    return [row for row in rows if row is not None and (step is None or row["step"] > step)]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63 else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False)
