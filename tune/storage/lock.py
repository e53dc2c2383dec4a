"""The lock of a results directory: one run at a time, and whoever comes second is told which process has it.

It imports next to nothing: a second run is answered before torch is loaded.
"""

import os
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ngpt.config.base import UserError
from ngpt.system.atomic_files import make_folder, sweep, write_atomic
from ngpt.system.cli import EXIT_BUSY

LOCK_FILE = "campaign.lock"  # held by the process that runs the campaign
HOLDER = "campaign.pid"  # says which it is
PATIENCE = 1.0  # seconds to wait for a lock without a holder: `status` takes it for a moment


class ResultsLocked(UserError):
    """Another process runs a campaign on this results directory."""

    exit_code = EXIT_BUSY


class ResultsLock:
    """Held from `acquire` to `release`. A process that is killed leaves none behind."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, FileLock(root / LOCK_FILE)

    def acquire(self) -> None:
        """Takes the lock; the directory is made if need be, and what killed runs have left of its files is removed.

        Raises:
            ResultsLocked: somebody else has it.
            OSError: the directory cannot be written.
        """
        make_folder(self._root)
        holder = self._root / HOLDER
        try:
            self._lock.acquire(timeout=PATIENCE, poll_interval=0.05, cancel_check=lambda: _pid(self._root) is not None)
        except Timeout:
            raise _busy(self._root) from None
        try:
            write_atomic(holder, f"{os.getpid()}\n")
            for folder in (self._root, *(path for path in self._root.iterdir() if path.is_dir())):
                sweep(folder)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets go."""
        with suppress(OSError):  # the lock counts; the file only says for people who has it
            (self._root / HOLDER).unlink(missing_ok=True)
        self._lock.release()


def is_locked(root: Path) -> bool:
    """Whether a process runs the campaign now: the kernel drops a dead one's lock."""
    if not (root / LOCK_FILE).exists():
        return False
    lock = FileLock(root / LOCK_FILE)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def refuse_if_running(root: Path) -> None:
    """Says early what `acquire` would find: that somebody runs the campaign already.

    Raises:
        ResultsLocked: somebody does.
    """
    if _pid(root) is not None and is_locked(root):
        raise _busy(root)


def _pid(root: Path) -> int | None:
    """The living process that says it holds the lock; None for one that was killed."""
    with suppress(OSError, ValueError):  # not there, or being replaced
        pid = int((root / HOLDER).read_text())
        return pid if psutil.pid_exists(pid) else None
    return None


def _busy(root: Path) -> ResultsLocked:
    return ResultsLocked(f"{root} is in use by another run (process {_pid(root) or 'unknown'})")
