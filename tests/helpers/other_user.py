"""Lets a test read files as another user would: without a right to write them."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def read_only_copy(folder: Path) -> Iterator[Path]:
    """A copy of `folder` that this process cannot write to; root becomes another user meanwhile.

    What the process imports meanwhile must be readable for all, so a test calls its commands once before.
    """
    place = Path(tempfile.mkdtemp())  # the folders of pytest are closed to other users
    place.chmod(0o755)
    copy = place / folder.name
    shutil.copytree(folder, copy)
    try:
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with as_other_user():
            yield copy
    finally:
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(place)


@contextmanager
def as_other_user() -> Iterator[None]:
    """Makes root another user for a while; a process that is not root stays what it is."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
