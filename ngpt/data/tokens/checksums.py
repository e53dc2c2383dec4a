"""CRC32 of shards, cached between processes while path, size, inode, mtime and ctime of the file stay the same.

These times are coarse, so nothing is cached for a file that has just changed (the "racy git" problem).
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from ngpt.data.tokens.shards import read_shard, token_crc
from ngpt.system.atomic_files import write_atomic
from ngpt.system.cache import cache_folder, optional_cache

FOLDER = "checked"  # under the cache
SETTLED = 2.0  # seconds since the last change after which the times of a file are reliable


def shard_crc(path: Path, *, bare_dtype: str | None = None, recheck: bool = False) -> int:
    """CRC32 of the tokens of a shard, from the cache unless the file has changed or `recheck` is set."""
    path = path.resolve()
    before, record = _identity(path), _record(path)
    if not recheck:
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # no record, or one that is damaged
            kept, crc = json.loads(record.read_text(encoding="utf-8"))
            if kept == before and isinstance(crc, int):
                return crc
    crc = token_crc(read_shard(path, bare_dtype).words)
    if _identity(path) == before and time.time() - _last_change(path) > SETTLED:
        with optional_cache("checksums"):  # without it, the next process reads the shard again
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(record, json.dumps([before, crc]))
    return crc


def _record(path: Path) -> Path:
    return cache_folder() / FOLDER / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.json"


def _identity(path: Path) -> list[str | int]:
    if not path.is_file():  # the reader reports it
        return [str(path)]
    state = path.stat()
    return [str(path), state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]


def _last_change(path: Path) -> float:
    state = path.stat()
    return max(state.st_mtime, state.st_ctime)
