"""The shard format against hand-made bytes, and every way in which a shard can be broken."""

import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ngpt.data.tokens.shards import CorruptShardError, read_shard, verify_shard, write_shard

some_tokens = arrays(np.uint16, st.integers(1, 300))
# One file per test is enough for all examples: each example overwrites it.
in_one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)


def public_shard(tokens: list[int], *, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """A shard as llm.c writes it."""
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count).ljust(1024, b"\0")
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


@in_one_folder
@given(tokens=some_tokens)
def test_tokens_are_read_as_they_were_written(tmp_path: Path, tokens: np.ndarray) -> None:
    write_shard(tmp_path / "a.bin", tokens, vocab_size=65536)
    shard = verify_shard(tmp_path / "a.bin", vocab_size=65536)
    np.testing.assert_array_equal(shard.tokens, tokens)
    assert shard.vocab_size == 65536 and shard.has_header


def test_public_readers_can_read_our_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([5, 0, 299]), vocab_size=300)
    data = (tmp_path / "a.bin").read_bytes()
    assert struct.unpack("<3i", data[:12]) == (20240520, 1, 3)
    assert struct.unpack("<3H", data[1024:]) == (5, 0, 299)
    assert struct.unpack("<2I", data[12:20]) == (zlib.crc32(data[1024:]), 300)
    assert data[20:24] != bytes(4) and not any(data[24:1024])


def test_a_public_shard_without_crc_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(public_shard([1, 2, 50256]))
    shard = verify_shard(tmp_path / "a.bin", vocab_size=50257)
    assert shard.tokens.tolist() == [1, 2, 50256]
    assert (shard.has_header, shard.crc32, shard.vocab_size) == (True, None, None)


@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 2000])
def test_a_bare_array_as_nanogpt_writes_it_is_read(tmp_path: Path, count: int) -> None:
    np.arange(count, dtype=np.uint16).tofile(tmp_path / "a.bin")
    shard = verify_shard(tmp_path / "a.bin", vocab_size=count)
    assert shard.tokens.tolist() == list(range(count))
    assert (shard.has_header, shard.crc32, shard.vocab_size) == (False, None, None)


def test_a_crc_of_zero_is_still_a_crc(tmp_path: Path) -> None:
    zero = next(data for n in range(1 << 16) if zlib.crc32(data := forge_zero_crc(n)) == 0)
    write_shard(tmp_path / "a.bin", np.frombuffer(zero, "<u2"), vocab_size=65536)
    assert read_shard(tmp_path / "a.bin").crc32 == 0
    damaged = bytearray((tmp_path / "a.bin").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "a.bin").write_bytes(damaged)
    with pytest.raises(CorruptShardError, match="CRC"):
        verify_shard(tmp_path / "a.bin", vocab_size=65536)


def forge_zero_crc(n: int) -> bytes:
    """Six bytes with CRC 0: the last four are solved over GF(2), where CRC is affine."""
    start = n.to_bytes(2, "little")
    base = zlib.crc32(start + bytes(4))
    columns = [(zlib.crc32(start + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit) for bit in range(32)]
    tail, wanted = 0, base
    for bit in reversed(range(32)):
        pivot = next(((effect, flips) for effect, flips in columns if effect >> bit & 1), None)
        if pivot is None:
            continue
        columns = [
            (effect ^ pivot[0], flips ^ pivot[1]) if effect >> bit & 1 else (effect, flips)
            for effect, flips in columns
            if (effect, flips) != pivot
        ]
        if wanted >> bit & 1:
            wanted, tail = wanted ^ pivot[0], tail ^ pivot[1]
    return start + tail.to_bytes(4, "little")


@in_one_folder
@given(tokens=some_tokens, data=st.data())
def test_every_flipped_bit_is_found(tmp_path: Path, tokens: np.ndarray, data: st.DataObject) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, tokens, vocab_size=65536)
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    with pytest.raises(CorruptShardError, match=r"a\.bin"):
        verify_shard(path, vocab_size=65536)


def test_two_hundred_random_bit_flips_are_all_found(tmp_path: Path) -> None:
    path, draw = tmp_path / "a.bin", random.Random(6)
    write_shard(path, np.arange(2000) % 300, vocab_size=300)
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptShardError):
            verify_shard(path, vocab_size=300)


@in_one_folder
@given(tokens=some_tokens, data=st.data())
def test_every_truncation_is_found(tmp_path: Path, tokens: np.ndarray, data: st.DataObject) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, tokens, vocab_size=65536)
    whole = path.read_bytes()
    # Cut inside the magic it is indistinguishable from a bare array of one token.
    kept = data.draw(st.integers(0, len(whole) - 1).filter(lambda size: size != 2))
    path.write_bytes(whole[:kept])
    with pytest.raises(CorruptShardError):
        read_shard(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (public_shard([1, 2], version=2), "version 2"),
        (public_shard([1, 2], count=3), "its header says 1030"),
        (public_shard([1, 2], count=-1), "its header says"),
        (public_shard([1, 2]) + b"\0", "its header says"),
        (public_shard([]), "is empty"),
        (public_shard([1, 2])[:1000], "shorter than its header"),
        (b"", "is empty"),
        (b"abc", "odd number of bytes, 3"),
        (public_shard([1, 300]), "token id 300 is out of vocabulary"),
        (struct.pack("<2H", 299, 300), "token id 300 is out of vocabulary"),
    ],
)
def test_a_broken_shard_is_named_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=reason) as caught:
        verify_shard(path, vocab_size=300)
    assert str(path) in str(caught.value)


def test_a_folder_or_a_dangling_link_is_not_a_shard(tmp_path: Path) -> None:
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "link.bin").symlink_to(tmp_path / "nowhere")
    for name in ("folder.bin", "link.bin", "missing.bin"):
        with pytest.raises(CorruptShardError, match="is not a file"):
            read_shard(tmp_path / name)


def test_the_error_can_be_pickled(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(CorruptShardError(tmp_path / "a.bin", "is empty")))
    assert str(error) == f"{tmp_path / 'a.bin'}: is empty"


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "reason"),
    [
        (np.array([0, 300]), 300, "token id 300"),
        (np.array([-1, 3]), 300, "token id -1"),
        (np.array([5]), (1 << 31) + 1, "does not fit 31 bits"),
        (np.array([], dtype=np.uint16), 300, "integers in a row"),
        (np.array([[1]]), 300, "integers in a row"),
        (np.array([1.0]), 300, "integers in a row"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, tokens: np.ndarray, vocab_size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write_shard(tmp_path / "a.bin", tokens, vocab_size=vocab_size)
    assert not list(tmp_path.iterdir())


def test_a_shard_cannot_be_written_to_through_its_tokens(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.bin", np.arange(10), vocab_size=10)
    with pytest.raises(ValueError, match="read-only"):
        shard.tokens[0] = 1
