"""What a run does before, between and after its trials, in the file `campaign.activity` of its results directory.

The journal says how far the trials are. Before the first one, a run prepares data, starts Ray and measures speeds, and
`status` reads from this file what it is at. The run removes the file when it ends; if it is killed, the file remains
and names the process that is gone.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from ngpt.data.text.progress import Log, Progress, progress_of
from ngpt.system.atomic_files import read_regular, write_atomic
from ngpt.system.heartbeat import host_name
from tune.storage.event_fields import MAX_ROWS, MAX_SECONDS, Time

ACTIVITY = "campaign.activity"
WRITE_EVERY = 0.5  # seconds between two writes, at least
MAX_BYTES = 1 << 16  # the file may come from somebody else
MAX_TEXT = 200  # characters of a name or detail
MOST_ACTIVITIES = 20

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Count = Annotated[int, Field(ge=0, le=MAX_ROWS)]


@dataclass(frozen=True)
class Activity:
    """One thing that a run does now."""

    name: Text  # such as `preparing data`
    since: Time  # of its start, UTC
    detail: Text = ""  # its newest line
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None  # of it that is done
    seconds_left: Annotated[float, Field(ge=0, le=MAX_SECONDS)] | None = None


@dataclass(frozen=True)
class RunActivity:
    """The process that runs a campaign, and what it does."""

    campaign: Text
    pid: Annotated[int, Field(ge=1, le=2**31)]
    host: Text
    started: Time  # UTC
    written: Time  # of this state, UTC
    smoke: bool = False
    trials: Count | None = None  # as far as they are known
    phases: Count | None = None
    begun: bool = False  # whether the journal has the start of this session
    activities: Annotated[tuple[Activity, ...], Field(max_length=MOST_ACTIVITIES)] = ()


class ActivityFile:
    """Context manager of a run that keeps the file. Disk errors are ignored: only the display depends on it."""

    def __init__(
        self, root: Path, *, campaign: str, smoke: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._clock = root / ACTIVITY, clock
        now = _now()
        self._run = RunActivity(campaign, os.getpid(), host_name(), now, now, smoke)
        self._lock = threading.Lock()
        self._written_at = -WRITE_EVERY
        self._timer: threading.Timer | None = None
        self._is_open = False

    def __enter__(self) -> "ActivityFile":
        with self._lock:
            self._is_open = True
            self._write()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_open = False
            if self._timer is not None:
                self._timer.cancel()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Names what the run does until the context closes; several things may go on at once."""
        with self._lock:
            self._run = replace(self._run, activities=(*self._run.activities, Activity(name, _now())))
            self._write()
        try:
            yield
        finally:
            with self._lock:
                rest = tuple(each for each in self._run.activities if each.name != name)
                self._run = replace(self._run, activities=rest)
                self._write()

    def change(self, **fields: Any) -> None:
        """Changes fields of the run."""
        with self._lock:
            self._run = replace(self._run, **fields)
            self._write()

    def update(self, name: str, **fields: Any) -> None:
        """Changes fields of the activity `name`, if it goes on. The file follows at most twice a second."""
        with self._lock:
            rows = (replace(each, **fields) if each.name == name else each for each in self._run.activities)
            self._run = replace(self._run, activities=tuple(rows))
            self._write_soon()

    @property
    def run(self) -> RunActivity:
        """What the run does now."""
        return self._run

    def log(self, name: str, log: Log) -> Log:
        """Returns a log for the activity `name`, which passes everything on to `log`."""
        return _ActivityLog(self, name, log)

    def _write_soon(self) -> None:
        wait = self._written_at + WRITE_EVERY - self._clock()
        if wait <= 0:
            self._write()
        elif self._timer is None:
            self._timer = threading.Timer(wait, self._write_later)
            self._timer.daemon = True
            self._timer.start()

    def _write_later(self) -> None:
        with self._lock:
            self._timer = None
            self._write()

    def _write(self) -> None:
        if self._is_open:
            self._written_at = self._clock()
            self._run = replace(self._run, written=_now())
            text = json.dumps(asdict(self._run), indent=1)
            with contextlib.suppress(OSError):
                write_atomic(self._path, f"{text}\n", durable=False)


class _ActivityLog:
    """A log that keeps the newest line and progress of an activity in the file."""

    def __init__(self, file: ActivityFile, name: str, log: Log) -> None:
        self._file, self._name, self._log = file, name, log
        self._show = progress_of(log)

    def __call__(self, text: str) -> None:
        self._file.update(self._name, detail=text[:MAX_TEXT], fraction=None, seconds_left=None)
        self._log(text)

    def progress(self, progress: Progress) -> None:
        left = None if progress.seconds_left is None else min(progress.seconds_left, MAX_SECONDS)
        self._file.update(self._name, detail=progress.name[:MAX_TEXT], fraction=progress.fraction, seconds_left=left)
        self._show(progress)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_activity(root: Path) -> RunActivity | None:
    """What the run in a results directory does, or did when it was killed; None if nothing is known."""
    try:
        data = read_regular(root / ACTIVITY)
        return _CHECKED.validate_json(data, strict=True) if len(data) <= MAX_BYTES else None
    except (OSError, pydantic.ValidationError):
        return None


_CHECKED = pydantic.TypeAdapter(RunActivity)
