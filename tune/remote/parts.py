"""Files of a trial that trains on another host, in parts: what summaries, curves and the report need of it.

A worker sends them to the run with its reports, through Ray, so that the run has all rows of an evaluation before it
judges it. Checkpoints stay on the worker's host and in the store.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.system.atomic_files import make_folder, sync
from tune.remote.unit import is_checkpoint, scan

LOGS = ("metrics.jsonl", "histograms.jsonl")  # which grow, and are sent while the trial trains


@dataclass(frozen=True)
class FilePart:
    """What a file has from a position on; the file ends with it."""

    path: str  # in the folder of the trial
    start: int
    content: bytes


class PartReader:
    """Reads what the folder of a trial has gained since the last call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sent: dict[str, tuple[int, int]] = {}  # number of the file, and its bytes that were read, by path

    def read(self, *, everything: bool) -> list[FilePart]:
        """The new rows of the logs; with `everything`, all other files as well, apart from checkpoints."""
        paths = [path for path in scan(self._folder, is_root=False) if not is_checkpoint(path)] if everything else LOGS
        return [part for path in paths if (part := self._read(path)) is not None]

    def _read(self, path: str) -> FilePart | None:
        try:
            with (self._folder / path).open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                known, start = self._sent.get(path, (number, 0))
                if known != number or path not in LOGS:  # it was replaced, as when a run rolls back
                    start = 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return None
        if path in LOGS:
            content = content[: content.rfind(b"\n") + 1]
        if path in self._sent and not content and self._sent[path] == (number, start):
            return None
        self._sent[path] = number, start + len(content)
        return FilePart(path, start, content)


def write_parts(folder: Path, parts: Sequence[FilePart]) -> None:
    """Writes parts of files of a trial into its folder on the host of the run, and waits until they are on disk."""
    for part in parts:
        path = folder / part.path
        make_folder(path.parent)
        with path.open("r+b" if path.exists() else "w+b") as file:
            if os.fstat(file.fileno()).st_size < part.start:
                raise OSError(errno.EIO, f"its first {part.start} bytes have not come from the worker", str(path))
            file.truncate(part.start)
            file.seek(part.start)
            file.write(part.content)
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
