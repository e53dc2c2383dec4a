"""Token shards: the public `.bin` formats of llm.c, with a CRC and the vocabulary size in header words they leave free.

A shard is 256 little-endian int32 words, then the tokens: uint16, or uint32 for vocabularies above 65,536. Words 0 to 2
are magic, version and token count, as in llm.c and modded-nanogpt, which ignore the other words. Here these are

    3  CRC32 of the token bytes          4  vocabulary size
    5  CRC32 of words 0 to 4, made odd: never zero, so it also tells "the CRC is 0" from "there is no CRC"

Files of other programs are read as well, see formats.py.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ngpt.data.tokens.formats import (
    HEADER_WORDS,
    MAGIC,
    VERSION,
    WIDE_MAGIC,
    WIDE_VERSION,
    CorruptShardError,
    find_layout,
    header_check,
    token_dtype,
)
from ngpt.system.atomic_files import write_atomic

MAX_VOCAB = 1 << 31  # so that an id fits int32, too


@dataclass(frozen=True)
class Shard:
    """One shard on disk. `tokens` (N,), integers as wide as in the file, is memory-mapped read-only."""

    path: Path
    tokens: np.memmap
    vocab_size: int | None
    crc32: int | None
    has_header: bool
    format: str  # see formats.py

    @property
    def words(self) -> np.ndarray:
        """The bytes of the tokens as uint16, which checksums are made of."""
        return self.tokens if self.tokens.itemsize == 1 else self.tokens.view("<u2")


def write_shard(path: Path, tokens: np.ndarray, *, vocab_size: int) -> Shard:
    """Writes `tokens` (N,), integers in [0, vocab_size), atomically and returns the shard. ValueError for others."""
    if not 0 < vocab_size <= MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab_size} does not fit 31 bits (1 to {MAX_VOCAB})")
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be some integers in a row, got {tokens.dtype} {tokens.shape}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside of a vocabulary of {vocab_size}")
    dtype = token_dtype(vocab_size)
    magic, version = (MAGIC, VERSION) if dtype.itemsize == 2 else (WIDE_MAGIC, WIDE_VERSION)
    data = tokens.astype(dtype).tobytes()
    header = np.zeros(HEADER_WORDS, "<u4")
    header[:5] = magic, version, tokens.size, zlib.crc32(data), vocab_size
    header[5] = header_check(header, magic)
    write_atomic(path, header.tobytes() + data)
    return read_shard(path)


def read_shard(path: Path, bare_dtype: str | None = None) -> Shard:
    """Maps a shard of any format of formats.py. Checks header and size, not the tokens; raises as `find_layout`."""
    found = find_layout(path, bare_dtype)
    tokens = np.memmap(path, dtype=found.dtype, mode="r", offset=found.offset, shape=(found.count,))
    header = found.header
    crc32, vocab_size = map(int, header[3:5]) if header is not None and header[5] != 0 else (None, None)
    is_headed = header is not None
    return Shard(path, tokens, vocab_size=vocab_size, crc32=crc32, has_header=is_headed, format=found.format)


def verify_shard(path: Path, *, vocab_size: int, bare_dtype: str | None = None) -> Shard:
    """Reads a whole shard and checks its CRC, if it has one, and every token against the vocabulary."""
    shard = read_shard(path, bare_dtype)
    if shard.crc32 is not None and token_crc(shard.words) != shard.crc32:
        raise CorruptShardError(path, "CRC mismatch: its tokens are not those that were written")
    largest = int(shard.tokens.max())
    if largest >= vocab_size:
        raise CorruptShardError(path, f"token id {largest} is out of vocabulary ({vocab_size} tokens)")
    if shard.tokens.dtype.kind == "i" and (smallest := int(shard.tokens.min())) < 0:
        raise CorruptShardError(path, f"token id {smallest} is negative")
    return shard


def token_crc(tokens: np.ndarray) -> int:
    """CRC32 of the bytes of `tokens` (N,) uint16, or the `words` of a shard."""
    return zlib.crc32(np.ascontiguousarray(tokens, "<u2").data)
