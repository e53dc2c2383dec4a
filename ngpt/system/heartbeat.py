"""Signs of life of a run, for whoever watches it from another process, and the wish that it saves and stops.

    heartbeat    the process that trains here, the step it began at, and the step it is at
    stop         whoever makes this file is waiting for the run to save and to end at its next step

Both lie in the run's folder: files work between processes that share nothing else. A heartbeat is gone when the run has
ended, and stays where its process was killed.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

HEARTBEAT, STOP = "heartbeat", "stop"
WIDTH = 80  # bytes: each beat overwrites the whole of the last one
LISTEN = 1.0  # seconds between two looks for the wish to stop; a look is a system call


@dataclass(frozen=True)
class Beat:
    """How far the process `pid` has come since it began at step `began`."""

    pid: int
    began: int
    step: int


class Heartbeat:
    """Writes the heartbeat of a run and listens for the wish to stop, for as long as the block lasts.

    A run does not end because nobody can be told that it lives: what the disk refuses is left out.
    """

    def __init__(self, folder: Path, *, began: int = 0) -> None:
        self._folder, self._began = folder, began
        self._file = None
        with contextlib.suppress(OSError):
            self._file = (folder / HEARTBEAT).open("wb", buffering=0)
        self._heard, self._listened = False, -LISTEN
        self.beat(began)

    def beat(self, step: int) -> None:
        """Says that the run has come to `step`; some microseconds."""
        if self._file is None:
            return
        text = f'{{"pid": {os.getpid()}, "began": {self._began}, "step": {step}}}'
        with contextlib.suppress(OSError):
            self._file.seek(0)
            self._file.write(text.ljust(WIDTH).encode())

    def stop_requested(self, *, now: bool = False) -> bool:
        """Whether somebody waits for this run to stop, as of the last second or `now`."""
        if not self._heard and (now or time.monotonic() - self._listened >= LISTEN):
            self._heard, self._listened = stop_requested(self._folder), time.monotonic()
        return self._heard

    def close(self) -> None:
        """Leaves the heartbeat as it is: somebody else goes on with it."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        with contextlib.suppress(OSError):
            (self._folder / HEARTBEAT).unlink()


def read_heartbeat(folder: Path) -> Beat | None:
    """The newest heartbeat in a run's folder; None where there is none that can be read."""
    try:
        return Beat(**json.loads((folder / HEARTBEAT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def request_stop(folder: Path) -> None:
    """Asks the run in `folder` to save and stop.

    Raises:
        OSError: there is no such folder, or no room in it.
    """
    (folder / STOP).touch()


def stop_requested(folder: Path) -> bool:
    """Whether somebody waits for the run in `folder` to stop."""
    return (folder / STOP).exists()


def clear(folder: Path) -> None:
    """Forgets the heartbeat and the wish of an attempt that is over."""
    for name in (HEARTBEAT, STOP):
        (folder / name).unlink(missing_ok=True)
