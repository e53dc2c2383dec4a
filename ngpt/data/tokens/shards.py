"""Token shards: the public GPT-2 `.bin` format, with a CRC and the vocabulary size in header words it leaves free.

A shard is 256 little-endian int32 words, then uint16 tokens. Words 0 to 2 are magic, version and token count, as in
llm.c and modded-nanogpt, which ignore the other words. Here these are

    3  CRC32 of the token bytes          4  vocabulary size
    5  CRC32 of words 0 to 4, made odd: never zero, so it also tells "the CRC is 0" from "there is no CRC"

A file without the magic number is a plain array of uint16 tokens, as nanoGPT writes it.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ngpt.config.base import UserError
from ngpt.system.atomic_files import write_atomic

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_VOCAB = 1 << 16  # of uint16 tokens


class CorruptShardError(UserError, ValueError):
    """A damaged shard: the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both arguments, so that the error can be pickled
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Shard:
    """One shard on disk. `tokens` (N,) uint16 is memory-mapped read-only."""

    path: Path
    tokens: np.memmap
    vocab_size: int | None
    crc32: int | None
    has_header: bool


def write_shard(path: Path, tokens: np.ndarray, *, vocab_size: int) -> Shard:
    """Writes `tokens` (N,), integers in [0, vocab_size), atomically and returns the shard. ValueError for others."""
    if not 0 < vocab_size <= MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab_size} does not fit uint16 tokens (1 to {MAX_VOCAB})")
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be some integers in a row, got {tokens.dtype} {tokens.shape}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside of a vocabulary of {vocab_size}")
    data = tokens.astype("<u2").tobytes()
    header = np.zeros(HEADER_WORDS, "<u4")
    header[:5] = MAGIC, VERSION, tokens.size, zlib.crc32(data), vocab_size
    header[5] = _header_check(header)
    write_atomic(path, header.tobytes() + data)
    return read_shard(path)


def read_shard(path: Path) -> Shard:
    """Maps a shard with or without a header. Checks header and size, not the tokens; raises CorruptShardError."""
    if not path.is_file():
        raise CorruptShardError(path, "is not a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    header = np.frombuffer(start, "<u4") if len(start) == HEADER_BYTES else None
    if not _is_header(path, start, header):
        header = None
    offset = 0 if header is None else HEADER_BYTES
    count = size // 2 if header is None else int(header[2])
    if size % 2 and header is None:
        raise CorruptShardError(path, f"has an odd number of bytes, {size}: not uint16 tokens")
    if size != offset + 2 * count:
        raise CorruptShardError(path, f"has {size} bytes, its header says {offset + 2 * count}")
    if count == 0:
        raise CorruptShardError(path, "is empty")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,))
    crc32, vocab_size = map(int, header[3:5]) if header is not None and header[5] != 0 else (None, None)
    return Shard(path, tokens, vocab_size=vocab_size, crc32=crc32, has_header=header is not None)


def verify_shard(path: Path, *, vocab_size: int) -> Shard:
    """Reads a whole shard and checks its CRC, if it has one, and every token against the vocabulary."""
    shard = read_shard(path)
    if shard.crc32 is not None and token_crc(shard.tokens) != shard.crc32:
        raise CorruptShardError(path, "CRC mismatch: its tokens are not those that were written")
    largest = int(shard.tokens.max())
    if largest >= vocab_size:
        raise CorruptShardError(path, f"token id {largest} is out of vocabulary ({vocab_size} tokens)")
    return shard


def token_crc(tokens: np.ndarray) -> int:
    """CRC32 of the bytes of `tokens` (N,) uint16."""
    return zlib.crc32(np.ascontiguousarray(tokens, "<u2").data)


def _is_header(path: Path, start: bytes, header: np.ndarray | None) -> bool:
    """Whether the file starts with a header. Raises CorruptShardError if the header is damaged."""
    if start[:4] != MAGIC.to_bytes(4, "little"):
        # Otherwise a flipped bit in the magic number would turn the header into 512 random tokens.
        if header is not None and header[5] != 0 and header[5] == _header_check(header):
            raise CorruptShardError(path, "damaged header: the magic number is wrong")
        return False
    if header is None:
        raise CorruptShardError(path, "is shorter than its header")
    if header[1] != VERSION:
        raise CorruptShardError(path, f"has version {header[1]}, this reads version {VERSION}")
    if header[5] != 0 and header[5] != _header_check(header):
        raise CorruptShardError(path, "damaged header: its check word is wrong")
    if header[5] != 0 and header[6:].any():  # `write_shard` leaves the rest zero
        raise CorruptShardError(path, "damaged header: the words after the check word are not zero")
    return True


def _header_check(header: np.ndarray) -> int:
    """Returns the value of word 5: an odd checksum of words 0 to 4, assuming the correct magic number."""
    words = np.array([MAGIC, *header[1:5]], "<u4")
    return zlib.crc32(words.tobytes()) | 1
