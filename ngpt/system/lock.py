"""Locks a folder, so that only one process at a time writes to it: a campaign's results, or a single run.

This module imports almost nothing, so a second process is refused before torch is loaded.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import psutil
from filelock import FileLock, Timeout

from ngpt.config.base import UserError
from ngpt.system.atomic_files import make_folder, read_regular, remove_temporary_files, write_atomic
from ngpt.system.cli import EXIT_BUSY

ACQUIRE_TIMEOUT = 1.0  # seconds to wait if no process id is known: `status` locks the file for a moment


class FolderLocked(UserError):
    """Another process writes to this folder."""

    exit_code = EXIT_BUSY


class FolderLock:
    """Lock of a folder, as a context manager. The operating system releases it when its process is killed.

    It consists of two files: `NAME.lock` is locked, and `NAME.pid` holds the id of the process, for messages.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._lock = FileLock(_lock_file(folder, name))

    def acquire(self) -> None:
        """Creates the folder, locks it and removes temporary files of killed processes, or raises `FolderLocked`."""
        folder, name = self._folder, self._name
        make_folder(folder)
        if (path := _lock_file(folder, name)).is_symlink():  # others may have made the folder
            raise OSError(errno.ELOOP, "it is a link, and a run would write to its target", str(path))
        try:
            self._lock.acquire(
                timeout=ACQUIRE_TIMEOUT, poll_interval=0.05, cancel_check=lambda: _holder(folder, name) is not None
            )
        except Timeout:
            raise _locked_error(folder, name) from None
        try:
            with _ignoring_full_disk():  # the file is only used in messages, and `prune` frees a full disk
                write_atomic(_pid_file(folder, name), f"{os.getpid()}\n")
            for each in (folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())):
                remove_temporary_files(each)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Releases the lock and removes the file with the process id."""
        with suppress(OSError):  # the file is only used in messages
            _pid_file(self._folder, self._name).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(folder: Path, name: str) -> bool:
    """Whether a live process holds the lock. Needs no write permission, follows no link and changes nothing."""
    import fcntl  # not on Windows

    try:
        # A shared lock needs no write access, and conflicts with the exclusive lock of a run.
        descriptor = os.open(_lock_file(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except PermissionError:
        return _holder(folder, name) is not None
    except OSError:  # there is none, or a link is in its place
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return _holder(folder, name) is not None
    finally:
        os.close(descriptor)
    return False


def refuse_if_locked(folder: Path, name: str) -> None:
    """Raises `FolderLocked` if another process holds the lock. Call it before slow imports."""
    if _holder(folder, name) is not None and is_locked(folder, name):
        raise _locked_error(folder, name)


@contextmanager
def _ignoring_full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _lock_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.lock"


def _pid_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.pid"


def _holder(folder: Path, name: str) -> int | None:
    """The id of the process that wrote the id file; None if it is unknown or the process has died."""
    with suppress(OSError, ValueError, OverflowError):  # the file is missing, being replaced, or somebody else's
        pid = int(read_regular(_pid_file(folder, name)))
        return pid if psutil.pid_exists(pid) else None
    return None


def _locked_error(folder: Path, name: str) -> FolderLocked:
    return FolderLocked(f"{folder} is in use by another run (process {_holder(folder, name) or 'unknown'})")
