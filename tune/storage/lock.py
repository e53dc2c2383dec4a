"""Lock of a results directory, so that only one process at a time runs its campaign.

This module imports almost nothing, so a second run is refused before torch is loaded.
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
PID_FILE = "campaign.pid"  # holds the id of that process
ACQUIRE_TIMEOUT = 1.0  # seconds to wait if no process id is known: `status` locks the file for a moment


class ResultsLocked(UserError):
    """Another process runs the campaign in this results directory."""

    exit_code = EXIT_BUSY


class ResultsLock:
    """File lock on a results directory. The operating system releases it when its process is killed."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, FileLock(root / LOCK_FILE)

    def acquire(self) -> None:
        """Creates the directory, locks it and removes temporary files of killed runs, or raises `ResultsLocked`."""
        make_folder(self._root)
        try:
            self._lock.acquire(
                timeout=ACQUIRE_TIMEOUT, poll_interval=0.05, cancel_check=lambda: _holder(self._root) is not None
            )
        except Timeout:
            raise _locked_error(self._root) from None
        try:
            write_atomic(self._root / PID_FILE, f"{os.getpid()}\n")
            for folder in (self._root, *(path for path in self._root.iterdir() if path.is_dir())):
                remove_temporary_files(folder)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Releases the lock and removes the file with the process id."""
        with suppress(OSError):  # the file is only used in messages
            (self._root / PID_FILE).unlink(missing_ok=True)
        self._lock.release()


def is_locked(root: Path) -> bool:
    """Whether a live process holds the lock."""
    if not (root / LOCK_FILE).exists():
        return False
    try:
        with FileLock(root / LOCK_FILE).acquire(timeout=0):
            return False
    except Timeout:
        return True


def refuse_if_running(root: Path) -> None:
    """Raises `ResultsLocked` if another process runs the campaign. Call it before slow imports."""
    if _holder(root) is not None and is_locked(root):
        raise _locked_error(root)


def _holder(root: Path) -> int | None:
    """The id of the process that wrote the id file; None if it is unknown or the process has died."""
    with suppress(OSError, ValueError):  # the file is missing, or being replaced
        pid = int((root / PID_FILE).read_text())
        return pid if psutil.pid_exists(pid) else None
    return None


def _locked_error(root: Path) -> ResultsLocked:
    return ResultsLocked(f"{root} is in use by another run (process {_holder(root) or 'unknown'})")
