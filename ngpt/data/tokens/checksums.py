"""The CRC32 of shards, computed once: kept from process to process by what tells that a file is still the same.

That is its path, size, inode, and the times of its last change, of content and of attributes. These times tick
coarsely, so of a file that changed just now nothing is kept (the "racy git" problem of git's index).
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from ngpt.data.tokens.shards import read_shard, token_crc
from ngpt.system.atomic_files import write_atomic
from ngpt.system.cache import cache_folder

FOLDER = "checked"  # under the cache
SETTLED = 2.0  # seconds since its last change after which a file's times are believed

Identity = list[str | int]


def shard_crc(path: Path, *, again: bool = False) -> int:
    """CRC32 of a shard's tokens. It is read if it was not, or has changed since; `again` reads it in any case.

    Raises:
        CorruptShardError: it cannot be read as a shard.
    """
    path = path.resolve()
    before, record = _identity(path), _record(path)
    if not again and (known := _known(record, before)) is not None:
        return known
    crc = token_crc(read_shard(path).tokens)
    if _identity(path) == before and time.time() - _last_change(path) > SETTLED:
        with contextlib.suppress(OSError):  # where nothing can be kept, the next process reads the shard again
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(record, json.dumps([before, crc]))
    return crc


def _known(record: Path, identity: Identity) -> int | None:
    try:
        kept, crc = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    return crc if kept == identity and isinstance(crc, int) else None


def _record(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
    return cache_folder() / FOLDER / f"{name}.json"


def _identity(path: Path) -> Identity:
    if not path.is_file():  # said better by who reads it
        return [str(path)]
    state = path.stat()
    return [str(path), state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]


def _last_change(path: Path) -> float:
    state = path.stat()
    return max(state.st_mtime, state.st_ctime)
