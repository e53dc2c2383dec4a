"""Writes that survive a crash: after each call a reader finds the old content or the new, never a part of it.

The recipe is the usual one for POSIX file systems: write a temporary file in the same folder, fsync it, rename it over
the target, fsync the folder so that the rename itself is on disk.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any, TextIO


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces the content of `path`; text is written as UTF-8. The temporary file is gone whatever happens.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is then as it was.
    """
    # A random name, opened exclusively: nobody can plant a link where we are about to write.
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
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


def append_line(file: TextIO, line: str) -> None:
    """Appends `line` and a newline to an open file, in one write, and waits until it is on disk.

    Raises:
        ValueError: `line` has a line break in it and would read back as two.
    """
    if "\n" in line or "\r" in line:
        raise ValueError(f"a line may not contain a line break: {line!r}")
    file.write(line + "\n")
    file.flush()
    os.fsync(file.fileno())


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
    sync(final.parent)


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


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
