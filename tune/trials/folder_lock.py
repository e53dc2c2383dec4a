"""Keeps two processes from training one trial, such as one on a node that the cluster has lost sight of."""

import contextlib
from collections.abc import Iterator, Sequence

import filelock

from tune.trials.trial import TrialSpec

LOCK = "worker.lock"  # in the folder of a trial
LOCK_TIMEOUT = 180.0  # seconds; Ray ends the processes of a node that is cut off within 90 s


@contextlib.contextmanager
def hold_folders(specs: Sequence[TrialSpec]) -> Iterator[None]:
    """Waits until no other process trains these trials.

    Raises:
        filelock.Timeout: such a process has not ended in time.
    """
    with contextlib.ExitStack() as locks:
        for spec in specs:
            lock = filelock.FileLock(spec.folder / LOCK, timeout=LOCK_TIMEOUT, thread_local=False)
            try:
                locks.enter_context(lock)
            except filelock.Timeout:
                raise
            except (OSError, NotImplementedError):  # a full disk, or a file system without locks
                continue
        yield
