"""Crash-safe writes: a reader finds the complete old content or the complete new content.

As usual on POSIX: write a temporary file in the same folder, fsync it, rename it over the target, fsync the folder.
"""

import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".*.tmp"  # left behind by a process that was killed in `write_atomic`


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Adds `path` to an OSError without a file name: only calls that open a file name it, a write to a full disk not.

    The error is raised again.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # without a number, the message would not have the name
            error.filename = str(path)
        raise


def describe_os_error(error: OSError, path: object = None) -> str:
    """Returns `a.bin: No space left on device`, with `path` if neither the error nor its message has one."""
    text = error.strerror or str(error)
    place = error.filename or ("" if path is None or text.startswith(str(path)) else path)
    return f"{place}: {text}" if place else text


def write_atomic(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Replaces the content of `path`; text is encoded as UTF-8. If that raises OSError, the old content remains.

    Without `durable`, nothing waits for the disk, and after a power loss the content may be lost.
    """
    # A random name, opened exclusively, so that another user cannot put a symlink there first.
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # matches TEMPORARY
    try:
        with naming(path), temp.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Replaces `path` with strict JSON with sorted keys. Raises ValueError for NaN and infinity."""
    write_atomic(path, json.dumps(obj, allow_nan=False, sort_keys=True, indent=1) + "\n")


class LineFile:
    """Appends lines to a file. A line is written completely or not at all, even on a full disk.

    Writes are unbuffered: lines survive a crash of the process once `append` returns, and a power loss after `sync`.
    """

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._torn = False
        if is_new:
            try:
                sync(path.parent)
            except OSError:  # removed, so that the next process creates it and syncs the folder
                self._file.close()
                path.unlink()
                raise

    def append(self, *lines: str) -> None:
        """Appends all lines, or none if that raises OSError. Raises ValueError for a line with a line break."""
        for line in lines:
            if "\n" in line or "\r" in line:
                raise ValueError(f"a line may not contain a line break: {line!r}")
        self.repair()
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        written = 0
        try:
            with naming(self._path):
                while written < len(data):  # a nearly full disk writes only a part
                    written += self._file.write(data[written:])
        except OSError:
            self._torn = True
            with suppress(OSError):  # the next `append` tries again
                self.repair()
            raise
        self._size += written

    def repair(self) -> None:
        """Truncates the partial lines of a failed `append`; raises OSError if that fails."""
        if self._torn:
            with naming(self._path):
                self._file.truncate(self._size)
            self._torn = False

    def remove_last(self, line: str) -> None:
        """Removes the last line, which must be `line`; if that raises OSError, it may still be there."""
        self._size, self._torn = self._size - len(f"{line}\n".encode()), True
        self.repair()

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file without a `sync`."""
        self._file.close()


def commit_folder(temp: Path, final: Path) -> None:
    """Syncs the folder `temp` and renames it to `final`, which is therefore either complete or absent."""
    for path in (*temp.rglob("*"), temp):
        sync(path)
    _rename(temp, final)


def remove_folder(path: Path, *, aside_name: str) -> None:
    """Removes a folder and its content. After a crash it is complete, or it has the name `aside_name`."""
    aside = path.with_name(aside_name)
    _rename(path, aside)
    shutil.rmtree(aside)
    sync(path.parent)


def move_folder(path: Path, target: Path) -> None:
    """Moves a folder within a file system, creates missing parents, and waits until both names are on disk."""
    make_folder(target.parent)
    path.rename(target)
    sync(target.parent)
    sync(path.parent)


def _rename(path: Path, target: Path) -> None:
    """Renames within a folder and waits until the new name is on disk. Restores the old name if that fails."""
    path.rename(target)
    try:
        sync(target.parent)
    except OSError:
        target.rename(path)
        raise


def make_folder(path: Path) -> None:
    """Creates `path` and its missing parents and syncs their names to disk."""
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in [*reversed(missing), path]:
        is_new = not folder.exists()
        folder.mkdir(exist_ok=True)
        if is_new:
            sync(folder.parent)


def remove_temporary_files(folder: Path) -> None:
    """Removes temporary files of killed processes. No other process may be writing to `folder`."""
    for temp in folder.glob(TEMPORARY):
        temp.unlink(missing_ok=True)


def read_regular(path: Path, *, most: int = -1) -> bytes:
    """Reads a file that may come from somebody else, or its first `most` bytes.

    Raises OSError for a pipe or a device, without waiting for it.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(most)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
