"""Cached checksums: a shard is read once, and again when it may have changed."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ngpt.data.tokens import checksums
from ngpt.data.tokens.checksums import shard_crc
from ngpt.data.tokens.shards import CorruptShardError, token_crc, write_shard

LONG_AGO = time.time() - 1000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The lengths of the shards that were read, with an empty cache."""
    found: list[int] = []

    def read(tokens: np.ndarray) -> int:
        found.append(len(tokens))
        return token_crc(tokens)

    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "token_crc", read)
    monkeypatch.setattr(checksums, "_last_change", lambda path: LONG_AGO)  # a file's ctime cannot be set
    return found


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "a.bin", np.arange(1000) % 50, vocab_size=50).path


def test_a_shard_is_read_once_unless_a_recheck_is_requested(shard: Path, reads: list[int]) -> None:
    crc = token_crc(np.arange(1000) % 50)
    assert [shard_crc(shard) for _ in range(3)] == [crc] * 3 and len(reads) == 1
    assert shard_crc(shard, recheck=True) == crc and len(reads) == 2


def test_a_link_shares_the_record_of_its_file(shard: Path, reads: list[int], tmp_path: Path) -> None:
    (tmp_path / "link.bin").symlink_to(shard)
    assert shard_crc(shard) == shard_crc(tmp_path / "link.bin") and len(reads) == 1


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2] + b"\1\0")


def replaced(path: Path) -> None:
    """Another file of the same size and time under the same name."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    state = path.stat()
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(path)


def rewritten_with_the_old_time(path: Path) -> None:
    state = path.stat()
    time.sleep(0.02)  # the clock of a file's times ticks every few milliseconds
    rewritten(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [rewritten, replaced, rewritten_with_the_old_time])
def test_a_shard_that_changed_is_read_again(change: Any, shard: Path, reads: list[int]) -> None:
    before = shard_crc(shard)
    time.sleep(0.02)
    change(shard)
    assert shard_crc(shard) != before and len(reads) == 2


def test_a_shard_that_has_just_changed_is_not_cached(shard: Path, reads: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr(checksums, "_last_change", lambda path: time.time() - 1)
    assert shard_crc(shard) == shard_crc(shard) and len(reads) == 2


@pytest.mark.parametrize("content", ["", "[]", "null", '[["x"], 1]', "[[1,2,3], null]", "\0"])
def test_a_damaged_cache_record_is_ignored(content: str, shard: Path, reads: list[int], tmp_path: Path) -> None:
    crc = shard_crc(shard)
    (record,) = (tmp_path / "cache" / "checked").iterdir()
    record.write_text(content)
    assert shard_crc(shard) == crc and len(reads) == 2


def test_without_a_writable_cache_the_shard_is_read_each_time(
    shard: Path, reads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "file"))
    assert shard_crc(shard) == shard_crc(shard) and len(reads) == 2


def test_a_file_that_is_not_a_shard_is_reported_by_its_reader(tmp_path: Path, reads: list[int]) -> None:
    with pytest.raises(CorruptShardError, match="is not a file"):
        shard_crc(tmp_path / "nowhere.bin")
