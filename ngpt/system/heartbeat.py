"""Heartbeat and stop request of a run, as two files in its folder.

    heartbeat    host and id of the training process, its first step and its current step
    stop         exists if another process has asked the run to save and stop at its next step

Files need no connection between the processes. The heartbeat is removed when the run ends; it remains if the process
is killed.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ngpt.system.atomic_files import read_regular

HEARTBEAT, STOP = "heartbeat", "stop"
HEARTBEAT_BYTES = 160  # padded, so that each heartbeat overwrites the previous one completely
MAX_HOST_NAME = 64  # characters, as in Linux
CHECK_EVERY = 1.0  # seconds between two checks for a stop request; each is a system call


@dataclass(frozen=True)
class Heartbeat:
    """Progress of the process `pid` on `host`, which started at step `began`. Older versions wrote no host."""

    pid: int
    began: int
    step: int
    host: str = ""

    @property
    def process(self) -> tuple[str, int]:
        """Identifies the process among those of all hosts."""
        return self.host, self.pid


class HeartbeatWriter:
    """Context manager that writes the heartbeat of a run and checks for stop requests. Disk errors are ignored."""

    def __init__(self, folder: Path, *, began: int = 0) -> None:
        self._folder, self._began, self._host = folder, began, json.dumps(host_name())
        self._file = None
        with contextlib.suppress(OSError):
            self._file = (folder / HEARTBEAT).open("wb", buffering=0)
        self._stop_requested = False
        self._last_check = -CHECK_EVERY
        self.beat(began)

    def beat(self, step: int) -> None:
        """Writes the current step; takes a few microseconds."""
        if self._file is None:
            return
        text = f'{{"pid": {os.getpid()}, "began": {self._began}, "step": {step}, "host": {self._host}}}'
        with contextlib.suppress(OSError):
            self._file.seek(0)
            self._file.write(text.ljust(HEARTBEAT_BYTES).encode())

    def stop_requested(self, *, now: bool = False) -> bool:
        """Whether this run should stop. Checks at most once a second, or immediately if `now`."""
        if not self._stop_requested and (now or time.monotonic() - self._last_check >= CHECK_EVERY):
            self._stop_requested = stop_requested(self._folder)
            self._last_check = time.monotonic()
        return self._stop_requested

    def close(self) -> None:
        """Closes the heartbeat file without removing it, so that another writer can take over."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        with contextlib.suppress(OSError):
            (self._folder / HEARTBEAT).unlink()


def read_heartbeat(folder: Path) -> Heartbeat | None:
    """Returns the last heartbeat in a run's folder; None if it is missing or unreadable."""
    try:
        beat = Heartbeat(**json.loads(read_regular(folder / HEARTBEAT)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    numbers = (beat.pid, beat.began, beat.step)
    return beat if all(type(number) is int for number in numbers) and type(beat.host) is str else None


def copy_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Writes the heartbeat of a run on another host, whose own file is not seen here. Disk errors are ignored."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEARTBEAT).write_text(json.dumps(vars(beat)).ljust(HEARTBEAT_BYTES))


def host_name() -> str:
    """The name of this host, as heartbeats have it."""
    return socket.gethostname()[:MAX_HOST_NAME]


def request_stop(folder: Path) -> None:
    """Asks the run in `folder` to save and stop."""
    (folder / STOP).touch()


def stop_requested(folder: Path) -> bool:
    """Whether the run in `folder` should stop."""
    return (folder / STOP).exists()


def clear_heartbeat(folder: Path) -> None:
    """Removes the heartbeat and the stop request of an earlier attempt."""
    for name in (HEARTBEAT, STOP):
        (folder / name).unlink(missing_ok=True)
