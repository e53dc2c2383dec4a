"""The lock of a results directory: one run at a time, and whoever comes second is told which process has it."""

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ngpt.durable import make_folder, sweep, write_atomic
from tune.status import LOCK_FILE

PATIENCE = 1.0  # seconds to wait for the lock, which `status` also takes for a moment
HOLDER = "campaign.pid"


class Busy(Exception):
    """Another process runs a campaign on this results directory."""


class ResultsLock:
    """Held from `take` to `release`. A process that is killed leaves none behind."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, FileLock(root / LOCK_FILE)

    def take(self) -> None:
        """Takes the lock; the directory is made if need be, and what killed runs have left of its files is removed.

        Raises:
            Busy: somebody else has it.
            OSError: the directory cannot be written.
        """
        make_folder(self._root)
        holder = self._root / HOLDER
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            pid = holder.read_text().strip() if holder.exists() else "unknown"
            raise Busy(f"{self._root} is in use by another run (process {pid})") from None
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
