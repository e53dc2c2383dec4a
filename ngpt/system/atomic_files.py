"""Writes that survive a crash: after each call a reader finds the old content or the new, never a part of it.

The recipe is the usual one for POSIX file systems: write a temporary file in the same folder, fsync it, rename it over
the target, fsync the folder so that the rename itself is on disk.
"""

import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".*.tmp"  # what a process that was killed in `write_atomic` leaves behind


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces the content of `path`; text is written as UTF-8. The temporary file is gone whatever happens.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is then as it was.
    """
    # A random name, opened exclusively: nobody can plant a link where we are about to write.
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
    """Replaces `path` by strict JSON: sorted keys, one space of indentation.

    Raises:
        ValueError: `obj` holds a NaN or an infinity; nothing is written.
        OSError: as `write_atomic`.
    """
    write_atomic(path, json.dumps(obj, allow_nan=False, sort_keys=True, indent=1) + "\n")


class LineFile:
    """A file of lines, open for appending: each is in it as a whole or not at all, also when the disk is full.

    Nothing is held back in this process: what `append` has returned from survives it, and after `sync` also a power
    loss.

    Raises:
        OSError: the file cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        is_new = not path.exists()
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._torn = False
        if is_new:
            try:
                sync(path.parent)
            except OSError:  # the next one to open it shall see that it is new
                self._file.close()
                path.unlink()
                raise

    def append(self, *lines: str) -> None:
        """Adds lines, each with a newline; all of them or, when that fails, none.

        Raises:
            ValueError: one has a line break in it and would read back as two.
            OSError: the disk; nothing was added.
        """
        for line in lines:
            if "\n" in line or "\r" in line:
                raise ValueError(f"a line may not contain a line break: {line!r}")
        self.repair()
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        written = 0
        try:
            while written < len(data):  # a disk that runs full writes a part first
                written += self._file.write(data[written:])
        except OSError:
            self._torn = True
            with suppress(OSError):  # else before the next line
                self.repair()
            raise
        self._size += written

    def repair(self) -> None:
        """Cuts off what a failed `append` has left.

        Raises:
            OSError: the disk; nothing can be added.
        """
        if self._torn:
            self._file.truncate(self._size)
            self._torn = False

    def remove_last(self, line: str) -> None:
        """Cuts the newest line off again, which was `line`.

        Raises:
            OSError: the disk; it may be there still.
        """
        self._size, self._torn = self._size - len(f"{line}\n".encode()), True
        self.repair()

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; lines since the last `sync` outlive the process, and not a loss of power."""
        self._file.close()


def commit_folder(temp: Path, final: Path) -> None:
    """Gives the finished folder `temp` its name: `final` is there with all of its files on disk, or not at all.

    Raises:
        OSError: `final` is a folder with something in it, or on another file system.
    """
    for folder, _, names in os.walk(temp):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    temp.rename(final)
    try:
        sync(final.parent)
    except OSError:
        final.rename(temp)
        raise


def remove_folder(path: Path, *, aside_name: str) -> None:
    """Removes a folder with all that is in it; a crash leaves it whole, or under the name `aside_name`.

    Raises:
        OSError: the disk.
    """
    aside = path.with_name(aside_name)
    path.rename(aside)
    try:
        sync(path.parent)  # before any of its files is gone
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Makes `path` and its parents where they are missing, each with its name on disk.

    Raises:
        OSError: one of them is a file, or the place cannot be written.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in [*reversed(missing), path]:
        is_new = not folder.exists()
        folder.mkdir(exist_ok=True)
        if is_new:
            sync(folder.parent)


def remove_temporary_files(folder: Path) -> None:
    """Removes what killed processes have left of files in `folder`; the caller is the only one that writes there."""
    for temp in folder.glob(TEMPORARY):
        temp.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
