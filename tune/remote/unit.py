"""Units of a results directory, each uploaded and restored as a whole: a folder of `trials/`, and all the rest.

Beside the files of a unit, the store has `.digests.json` with their SHA-256. It is written last, so a file that is new
counts once it is complete. A file that is replaced has two digests meanwhile, the old and the new one.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ngpt.system import heartbeat
from ngpt.system.atomic_files import read_regular
from tune.remote.store import ObjectStore, StoreError
from tune.storage.activity import ACTIVITY
from tune.storage.journal import JOURNAL, intact_length

DIGESTS = ".digests.json"  # of a unit, in the store
SYNCED = ".synced.json"  # in the local folder of a unit: its files as they are in the store
TRIALS, DISCARDED = "trials", "discarded"
WORKER = ".worker"  # in the folder of a trial in the store: the unit of the worker that trains it elsewhere
ROOT = ""  # the unit of all files outside `TRIALS` and `DISCARDED`
CHECKPOINTS = "checkpoints"
LOCAL_ONLY = {heartbeat.HEARTBEAT, heartbeat.STOP, "campaign.lock", "campaign.pid", "worker.lock", ACTIVITY}
FORMAT = 1
READS, READ_PAUSE = 3, 0.1  # how often, and after how many seconds, digests that make no sense are read again


class DamagedUnit(StoreError):
    """The digests of a unit in the store cannot be read."""


Digests = dict[str, list[str]]  # SHA-256 that a file may have, by its path in the unit
Stamps = dict[str, tuple[int, int] | None]  # size and time in ns, by path; None for a file only in the store


def unit_folder(root: Path, unit: str) -> Path:
    """The local folder of a unit."""
    return root / unit if unit else root


def scan(folder: Path, *, is_root: bool) -> Stamps:
    """The files of a unit and their stamps. Hidden files and links are not part of it."""
    return dict(_scan(folder, "", skipped=LOCAL_ONLY | ({TRIALS, DISCARDED} if is_root else set())))


def _scan(folder: Path | str, inside: str, *, skipped: set[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:  # of all trials, in every upload: one look at each file
        if entry.name.startswith(".") or entry.name in skipped:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _scan(entry.path, f"{inside}{entry.name}/", skipped=LOCAL_ONLY)
        elif entry.is_file(follow_symlinks=False):
            try:
                about = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # removed by the trial
                continue
            yield f"{inside}{entry.name}", (about.st_size, about.st_mtime_ns)


def complete_lines(path: Path) -> bytes:
    """The content of a journal up to its last complete line; empty if there is none."""
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return b""
    return raw[: intact_length(raw)]


def read_digests(store: ObjectStore, unit: str) -> Digests | None:
    """The digests of a unit in the store; None if the store does not have the unit.

    Raises:
        DamagedUnit: they make no sense, or are of another version.
    """
    for _ in range(READS):
        try:
            return _read_digests(store, unit)
        except DamagedUnit:  # a run may be replacing the object: pyarrow reads its size first, then its content
            time.sleep(READ_PAUSE)
    return _read_digests(store, unit)


def _read_digests(store: ObjectStore, unit: str) -> Digests | None:
    if (raw := store.read(object_key(unit, DIGESTS))) is None:
        return None
    try:
        record = json.loads(raw)
        if record["format"] != FORMAT:
            raise ValueError("unknown format")
        files: dict[str, Any] = record["files"]
        return {path: [str(digest) for digest in digests] for path, digests in files.items() if _is_inside(path)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        text = f"{object_key(unit, DIGESTS)} is damaged, or written by another version"
        raise DamagedUnit(store.uri, OSError(text)) from None


def write_digests(store: ObjectStore, unit: str, digests: Mapping[str, list[str]]) -> None:
    """Writes the digests of a unit."""
    text = json.dumps({"format": FORMAT, "files": digests}, sort_keys=True, indent=0)
    store.write(object_key(unit, DIGESTS), text.encode())


def read_stamps(root: Path, unit: str) -> Stamps | None:
    """The files of a unit that are as in the store, as this machine remembers; None if it does not."""
    try:
        found = json.loads(read_regular(unit_folder(root, unit) / SYNCED))
        if found["unit"] != unit:  # the folder was moved
            return None
        files = found["files"].items()
        return {path: None if stamp is None else (int(stamp[0]), int(stamp[1])) for path, stamp in files}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None


def write_stamps(root: Path, unit: str, stamps: Stamps) -> None:
    """Remembers which files of a unit are as in the store. After a crash, more is uploaded than needed."""
    path = unit_folder(root, unit) / SYNCED
    temp = path.with_suffix(".tmp")
    try:
        temp.write_text(json.dumps({"unit": unit, "files": stamps}))
        temp.replace(path)
    except OSError:  # the folder has gone, or the disk is full
        return


def is_checkpoint(path: str) -> bool:
    """Whether a path in a unit belongs to a checkpoint, whose files never change."""
    return path.startswith(f"{CHECKPOINTS}/")


def worker_unit(trial_id: str) -> str:
    """The unit that a worker on another host keeps of its trial, apart from that of the run (tune/remote/worker.py)."""
    return f"{TRIALS}/{trial_id}/{WORKER}"


def newest_step(paths: Iterable[str]) -> int | None:
    """The step of the newest checkpoint among the paths of a unit; None without one."""
    names = (path.split("/")[1] for path in paths if is_checkpoint(path))
    steps = [name.removeprefix("step_") for name in names if name.startswith("step_")]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def object_key(unit: str, path: str) -> str:
    """The key of a file of a unit."""
    return f"{unit}/{path}" if unit else path


def _is_inside(path: str) -> bool:
    """Whether a path from the store leads to a file of its unit: anybody may have written it."""
    parts = path.split("/")
    return all(part and not part.startswith(".") and "\0" not in part for part in parts) and parts[0] not in (
        TRIALS,
        DISCARDED,
    )


def is_journal(unit: str, path: str) -> bool:
    """Whether a path is the journal of the campaign."""
    return unit == ROOT and path == JOURNAL
