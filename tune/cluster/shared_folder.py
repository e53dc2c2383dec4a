"""Finds out whether hosts share a folder: files written on one are seen on the other, renames and locks work.

The run opens a `FolderProbe`, a folder beside its results. Another host calls `probe_folder` with it, and the run then
checks what this host has left there. Only the standard library is used, since that host may have nothing else yet.
"""

import fcntl
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Self

PREFIX = ".probe-"  # of the folder that a probe makes, and removes at its end
TOKEN, LOCK = "token", "lock"
SETTLE_SECONDS = 5.0  # for a network file system to notice files that another host has just written


class FolderProbe:
    """Context manager for a probe of `root`: makes its folder, writes the files that others look for, holds a lock.

    Raises:
        OSError: this host cannot write, rename or lock files there.
    """

    def __init__(self, root: Path) -> None:
        self.token = uuid.uuid4().hex
        self.folder = root / f"{PREFIX}{self.token}"
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        for stale in self.folder.parent.glob(f"{PREFIX}*"):  # of a killed run
            shutil.rmtree(stale, ignore_errors=True)
        self.folder.mkdir()
        try:
            _replace(self.folder / TOKEN, self.token)
            self._descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        shutil.rmtree(self.folder, ignore_errors=True)

    def offer(self, number: int) -> Path:
        """Writes the file that the host with this number has to replace, and returns its path."""
        path = self.folder / f"host-{number}"
        _replace(path, "")
        return path

    def is_answered(self, number: int) -> bool:
        """Whether this host sees that the other one has replaced its file."""
        return _settles(self.folder / f"host-{number}", f"{self.token} {number}")


def probe_folder(folder: str, token: str, number: int) -> str | None:
    """Probes, on another host, the folder of a `FolderProbe`; returns what is wrong with it, or None.

    Replaces the file that the probe has offered to the host with this number.
    """
    path = Path(folder)
    if not _settles(path / TOKEN, token):
        return "does not see what this run writes there"
    try:
        _replace(path / f"host-{number}", f"{token} {number}")
    except OSError as error:
        return f"cannot write and rename files there ({error.strerror})"
    try:
        own, held = (os.open(path / name, os.O_RDWR | os.O_CREAT, 0o666) for name in (f"lock-{number}", LOCK))
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            return "can lock a file that this run has locked"
        finally:
            os.close(own)
            os.close(held)
    except OSError as error:
        return f"cannot lock files there ({error.strerror})"


def _settles(path: Path, content: str) -> bool:
    """Whether a file has this content, now or once the caches of a network file system are renewed."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _replace(path: Path, content: str) -> None:
    """Replaces a file by a rename, as all files of the results are."""
    temp = path.with_name(f"{path.name}.tmp")
    with temp.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)
