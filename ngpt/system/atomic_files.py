"""Crash-safe writes: a reader finds the old content or the new content, never a part.

As usual on POSIX file systems: write a temporary file in the same folder, fsync it, rename it over the target, fsync
the folder.
"""

import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".*.tmp"  # left behind by a process that was killed in `write_atomic`


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces the content of `path`; text is written as UTF-8. After an OSError, `path` keeps its old content."""
    # A random name, opened exclusively, so that nobody can plant a link there.
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # as TEMPORARY has it
    try:
        with temp.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Replaces `path` by strict JSON with sorted keys; raises ValueError for a NaN or an infinity."""
    write_atomic(path, json.dumps(obj, allow_nan=False, sort_keys=True, indent=1) + "\n")


class LineFile:
    """A file of lines, open for appending. A line is written completely or not at all, even on a full disk.

    Lines are not buffered: they survive the process once `append` returns, and a power loss once `sync` returns.
    """

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._torn = False
        if is_new:
            try:
                sync(path.parent)
            except OSError:  # so that the next process syncs the folder
                self._file.close()
                path.unlink()
                raise

    def append(self, *lines: str) -> None:
        """Appends all lines, or none if that raises OSError; a line may not contain a line break (ValueError)."""
        for line in lines:
            if "\n" in line or "\r" in line:
                raise ValueError(f"a line may not contain a line break: {line!r}")
        self.repair()
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        written = 0
        try:
            while written < len(data):  # a disk that fills up writes a part first
                written += self._file.write(data[written:])
        except OSError:
            self._torn = True
            with suppress(OSError):  # the next `append` tries again
                self.repair()
            raise
        self._size += written

    def repair(self) -> None:
        """Cuts off what a failed `append` has left; raises OSError if it cannot."""
        if self._torn:
            self._file.truncate(self._size)
            self._torn = False

    def remove_last(self, line: str) -> None:
        """Removes the newest line, which was `line`; after an OSError it may still be there."""
        self._size, self._torn = self._size - len(f"{line}\n".encode()), True
        self.repair()

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file without a `sync`."""
        self._file.close()


def commit_folder(temp: Path, final: Path) -> None:
    """Renames the finished folder `temp` to `final`, which then exists with all its files on disk or not at all."""
    for path in (*temp.rglob("*"), temp):
        sync(path)
    _rename(temp, final)


def remove_folder(path: Path, *, aside_name: str) -> None:
    """Removes a folder and its content. A crash leaves it complete, or renamed to `aside_name`."""
    aside = path.with_name(aside_name)
    _rename(path, aside)
    shutil.rmtree(aside)
    sync(path.parent)


def _rename(path: Path, target: Path) -> None:
    """Renames within a folder; does not return before the new name is on disk, and takes it back if that fails."""
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
    """Removes temporary files of killed processes. Only for a folder that no other process writes to."""
    for temp in folder.glob(TEMPORARY):
        temp.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
