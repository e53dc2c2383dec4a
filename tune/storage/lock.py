"""The lock of a results directory: one run at a time; a second one is refused with the id of the process that runs.

It imports almost nothing, so a second run is refused before torch is loaded.
"""

import os
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ngpt.config.base import UserError
from ngpt.system.atomic_files import make_folder, remove_temporary_files, write_atomic
from ngpt.system.cli import EXIT_BUSY

LOCK_FILE = "campaign.lock"  # locked by the process that runs the campaign
PID_FILE = "campaign.pid"  # has its id
ACQUIRE_TIMEOUT = 1.0  # seconds to wait for a lock without a process id: `status` locks the file for a moment


class ResultsLocked(UserError):
    """Another process runs a campaign on this results directory."""

    exit_code = EXIT_BUSY


class ResultsLock:
    """Held from `acquire` to `release`. The system releases the lock of a process that is killed."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, FileLock(root / LOCK_FILE)

    def acquire(self) -> None:
        """Acquires the lock, or raises `ResultsLocked`. Creates the directory, removes leftovers of killed runs."""
        make_folder(self._root)
        try:
            self._lock.acquire(
                timeout=ACQUIRE_TIMEOUT, poll_interval=0.05, cancel_check=lambda: _holder(self._root) is not None
            )
        except Timeout:
            raise _locked(self._root) from None
        try:
            write_atomic(self._root / PID_FILE, f"{os.getpid()}\n")
            for folder in (self._root, *(path for path in self._root.iterdir() if path.is_dir())):
                remove_temporary_files(folder)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Releases the lock."""
        with suppress(OSError):  # the file is only for messages
            (self._root / PID_FILE).unlink(missing_ok=True)
        self._lock.release()


def is_locked(root: Path) -> bool:
    """Whether a process runs the campaign now; a dead process holds no lock."""
    if not (root / LOCK_FILE).exists():
        return False
    try:
        with FileLock(root / LOCK_FILE).acquire(timeout=0):
            return False
    except Timeout:
        return True


def refuse_if_running(root: Path) -> None:
    """Raises `ResultsLocked`, before anything is loaded, if another process runs the campaign."""
    if _holder(root) is not None and is_locked(root):
        raise _locked(root)


def _holder(root: Path) -> int | None:
    """The id of the process that holds the lock; None if it is not alive."""
    with suppress(OSError, ValueError):  # the file is missing, or being replaced
        pid = int((root / PID_FILE).read_text())
        return pid if psutil.pid_exists(pid) else None
    return None


def _locked(root: Path) -> ResultsLocked:
    return ResultsLocked(f"{root} is in use by another run (process {_holder(root) or 'unknown'})")
