"""Recognises token files: which program wrote one, where its tokens start and how wide they are.

| format | recognised by | tokens |
|---|---|---|
| llm.c version 1, modded-nanogpt, our shards | magic 20240520 | uint16 |
| llm.c version 7, our shards of large vocabularies | magic 20240801 | uint32 |
| Megatron | a `.idx` file beside the `.bin` file | as its code says |
| NumPy | `.npy` magic | as its header says |
| a bare array, as nanoGPT writes it | nothing of the above | uint16, unless the content contradicts |

A bare array that is wider than 16 bits would read as twice or four times as many tokens, most of them zero, and one of
8-bit tokens, such as characters, as half as many. Such a file is refused unless the setting `data.token_dtype` says how
wide it is.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ngpt.config.base import ConfigError, UserError

MAGIC, VERSION = 20240520, 1  # uint16
WIDE_MAGIC, WIDE_VERSION = 20240801, 7  # uint32
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
HEADERS = {MAGIC: (VERSION, "<u2"), WIDE_MAGIC: (WIDE_VERSION, "<u4")}
# Other files of llm.c, which may lie beside its tokens under the same suffix.
NOT_TOKENS = {
    20240326: "a model of llm.c",
    20240327: "a debug state of llm.c",
    20240328: "a tokenizer of llm.c",
    20240522: "a multiple-choice evaluation of llm.c",
}
TOKEN_SUFFIXES = (".bin", ".npy", ".idx")
NPY_MAGIC = b"\x93NUMPY"
FOREIGN = {b"PK\x03\x04": "a zip archive, as PyTorch saves models", b"\x1f\x8b\x08": "compressed by gzip"}
FOREIGN |= {b"\x28\xb5\x2f\xfd": "compressed by zstd", b"GGUF": "a GGUF model"}
BARE_DTYPES = {"uint8": "<u1", "uint16": "<u2", "int32": "<i4", "uint32": "<u4", "int64": "<i8", "uint64": "<u8"}

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER_BYTES = 34
# Megatron-LM, megatron/core/datasets/indexed_dataset.py; 9 and 10 are of Megatron-DeepSpeed. 6 and 7 are floats.
MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}

BLOCK = 1 << 20  # bytes of a bare file that are examined at once
# By the largest upper half of 32-bit tokens, for vocabularies up to 2**20: the least number and share of lower halves
# that are larger. A few small tokens, or a rare one, may occur at even positions only by chance.
EVIDENCE = {0: (4, 1 / 64), 1: (16, 1 / 4), 3: (16, 1 / 4), 15: (16, 1 / 4)}
SIGN = 0xFFFF  # the upper half of a small negative number, such as a mask of -100
PRINTABLE = bytes(range(32, 127)) + b"\t\n\r"
ENOUGH = 1000  # 16-bit numbers that tell an array of bytes
MAX_ENTROPY = 6.0  # bits of each byte of text; the lower bytes of tokens of a large vocabulary have about 7
PLENTY = 1000  # larger lower halves that decide without the rest of the file


class CorruptShardError(UserError, ValueError):
    """A damaged shard, or a file of something else: the file and the reason."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both arguments, so that the error can be pickled
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a file are. `format` names the format and width for manifests and identities."""

    format: str
    dtype: np.dtype
    offset: int
    count: int
    header: np.ndarray | None = None  # (256,) uint32 of llm.c


UINT16 = "uint16"  # format of a bare array of nanoGPT
LLM_C = "llm.c 1"
KNOWN_WITHOUT_RECORD = (UINT16, LLM_C)  # what manifests and identities do not mention


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that stores the tokens of a vocabulary: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def find_layout(path: Path, bare_dtype: str | None = None) -> Layout:
    """Recognises the format from header and size. `bare_dtype`, in `BARE_DTYPES`, is the width of files without header.

    Raises CorruptShardError for damaged files and other contents, and ConfigError for a bare array that probably has
    another width than 16 bits if `bare_dtype` is None.
    """
    if not path.is_file():
        raise CorruptShardError(path, "is not a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if start.startswith(NPY_MAGIC):
        return _npy(path, size)
    header = _llm_c_header(path, start)
    if header is not None:
        version, dtype = HEADERS[int(header[0])]
        found = Layout(f"llm.c {version}", np.dtype(dtype), HEADER_BYTES, int(header[2]), header)
        expected = HEADER_BYTES + found.dtype.itemsize * found.count
        if size != expected:
            raise CorruptShardError(path, f"has {size} bytes, its header says {expected}")
    elif path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        found = _megatron(path, path.with_suffix(".idx"), size)
    else:
        found = _bare(path, size, start, bare_dtype)
    if found.count == 0:
        raise CorruptShardError(path, "is empty")
    return found


def header_check(header: np.ndarray, magic: int) -> int:
    """Returns the value of word 5: an odd checksum of words 0 to 4, assuming the correct magic number."""
    words = np.array([magic, *header[1:5]], "<u4")
    return zlib.crc32(words.tobytes()) | 1


def _llm_c_header(path: Path, start: bytes) -> np.ndarray | None:
    """Returns the header, or None if there is none. Raises CorruptShardError if it is damaged."""
    header = np.frombuffer(start, "<u4") if len(start) == HEADER_BYTES else None
    magic = int.from_bytes(start[:4], "little")
    if magic not in HEADERS:
        # Otherwise a flipped bit in the magic number would turn the header into 512 random tokens.
        if header is not None and header[5] != 0 and header[5] in [header_check(header, known) for known in HEADERS]:
            raise CorruptShardError(path, "damaged header: the magic number is wrong")
        return None
    version = HEADERS[magic][0]
    if header is None:
        raise CorruptShardError(path, "is shorter than its header")
    if header[1] != version:
        raise CorruptShardError(path, f"has version {header[1]}, this reads version {version}")
    if header[5] != 0 and header[5] != header_check(header, magic):
        raise CorruptShardError(path, "damaged header: its check word is wrong")
    if header[5] != 0 and header[6:].any():  # `write_shard` leaves the rest zero
        raise CorruptShardError(path, "damaged header: the words after the check word are not zero")
    return header


def _npy(path: Path, size: int) -> Layout:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's parser of headers raises many kinds
        raise CorruptShardError(path, f"cannot be read as .npy: {' '.join(str(error).split())}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise CorruptShardError(path, f"holds {array.dtype} {array.shape}, tokens are integers in one row")
    if array.size == 0:
        raise CorruptShardError(path, "is empty")
    offset = size - array.nbytes
    if offset != array.offset:
        raise CorruptShardError(path, f"has {size} bytes, its header says {array.offset + array.nbytes}")
    return Layout(f"npy {array.dtype.name}", array.dtype, offset, array.size)


def _megatron(path: Path, index: Path, size: int) -> Layout:
    """Reads the index: magic, version, dtype code, counts, then length and position of each sequence."""
    index_size = index.stat().st_size
    with index.open("rb") as file:
        head = file.read(MEGATRON_HEADER_BYTES)
        if head[:8] == b"TNTIDX\x00\x00":
            raise CorruptShardError(path, f"{index.name} is an index of fairseq, which is not read; convert the tokens")
        if not head.startswith(MEGATRON_MAGIC):
            raise CorruptShardError(path, f"has no header, and {index.name} beside it is not an index of Megatron")
        if len(head) < MEGATRON_HEADER_BYTES:
            raise CorruptShardError(path, f"{index.name} is shorter than its header")
        version, code = int.from_bytes(head[9:17], "little"), head[17]
        sequences, documents = int.from_bytes(head[18:26], "little"), int.from_bytes(head[26:34], "little")
        if version != 1:
            raise CorruptShardError(path, f"{index.name} has version {version}, this reads version 1")
        if code not in MEGATRON_DTYPES:
            raise CorruptShardError(path, f"{index.name} says dtype code {code}, which is no integer")
        expected = MEGATRON_HEADER_BYTES + 12 * sequences + 8 * documents
        if index_size == expected + sequences and sequences:
            raise CorruptShardError(path, f"{index.name} is of a multimodal corpus, which is not read")
        if index_size != expected:
            raise CorruptShardError(path, f"{index.name} has {index_size} bytes, its header says {expected}")
        lengths = np.fromfile(file, "<i4", sequences)
        positions = np.fromfile(file, "<i8", sequences)
    dtype = np.dtype(MEGATRON_DTYPES[code])
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if (lengths < 0).any() or not np.array_equal(positions, ends - lengths.astype(np.int64) * dtype.itemsize):
        raise CorruptShardError(path, f"the sequences of {index.name} do not follow each other in the file")
    if size != (total := int(ends[-1]) if sequences else 0):
        raise CorruptShardError(path, f"has {size} bytes, {index.name} says {total}")
    return Layout(f"Megatron {dtype.name}", dtype, 0, size // dtype.itemsize)


def _bare(path: Path, size: int, start: bytes, dtype: str | None) -> Layout:
    if dtype is None:
        for magic, what in FOREIGN.items():
            if start.startswith(magic):
                raise CorruptShardError(path, f"is {what}, not tokens")
        if (first := int.from_bytes(start[:4], "little")) in NOT_TOKENS:
            raise CorruptShardError(path, f"is {NOT_TOKENS[first]}, not tokens")
    found = np.dtype(BARE_DTYPES[dtype or UINT16])
    if size % found.itemsize:
        number = f"an odd number of bytes, {size}" if found.itemsize == 2 else f"{size} bytes"
        raise CorruptShardError(path, f"has {number}: not {found.name} tokens")
    if dtype is None and (doubt := _doubt(path.resolve(), size, path.stat().st_mtime_ns)):
        what, likely = doubt
        raise ConfigError(
            f"{path} has no header and looks like {what}, not like uint16 tokens; "
            f"set data.token_dtype={likely} (--token-dtype {likely}), or uint16 if that is what it holds"
        )
    return Layout(dtype or UINT16, found, 0, size // found.itemsize)


@lru_cache(maxsize=4096)
def _doubt(path: Path, size: int, changed: int) -> tuple[str, str] | None:
    """Returns what a bare file holds if not uint16 tokens, and the dtype to read it with; None without a doubt.

    In a file of 32-bit tokens, every other 16 bits are the upper half of a token, at most 15 for a vocabulary up to a
    million. In one of 16-bit tokens, numbers at odd positions are as large as those at even ones. The file is read
    until this is decided, which is soon for text.
    """
    larger = {} if size % 4 else dict.fromkeys(EVIDENCE, 0)  # by upper half: the number of larger lower halves
    is_int64, is_ascii = size % 8 == 0, size >= 64
    n_low = 0

    def is_evident(limit: int) -> bool:
        least, share = EVIDENCE[limit]
        return larger[limit] >= max(least, share * n_low)

    with path.open("rb") as file:
        are_bytes = _are_bytes(file.read(BLOCK))
        file.seek(0)
        while (data := file.read(BLOCK)) and (larger or is_ascii):
            is_ascii = is_ascii and not data.translate(None, PRINTABLE)
            halves = np.frombuffer(data, "<u2", len(data) // 2)
            low, high = halves[::2], halves[1::2]
            n_low += low.size
            possible = [limit for limit in larger if not ((high > limit) & (high != SIGN)).any()]
            larger = {limit: larger[limit] + int((low > limit).sum()) for limit in possible}
            if is_int64:
                upper = halves.reshape(-1, 4)[:, 2:]
                is_int64 = bool(((upper == 0) | (upper == SIGN)).all())
            if is_ascii or any(count >= PLENTY and is_evident(limit) for limit, count in larger.items()):
                break
    if any(map(is_evident, larger)):
        return ("int64 tokens", "int64") if is_int64 else ("32-bit tokens (int32 or uint32)", "uint32")
    if is_ascii:
        return "text, or bytes", "uint8"
    return ("8-bit tokens (uint8)", "uint8") if are_bytes else None


def _are_bytes(data: bytes) -> bool:
    """Whether both bytes of 16-bit numbers are distributed alike, and not as evenly as in tokens or noise.

    The upper bytes of 16-bit tokens are small: all zero for up to 256 tokens, and mostly small for large vocabularies,
    where the lower ones take all values.
    """
    pairs = np.frombuffer(data, np.uint8, len(data) // 2 * 2).reshape(-1, 2)
    if len(pairs) < ENOUGH:
        return False
    lower, upper = (np.bincount(half, minlength=256) / len(pairs) for half in pairs.T)
    entropy = -float(np.sum(lower * np.log2(lower, where=lower > 0, out=np.zeros(256))))
    is_narrow = entropy < MAX_ENTROPY or not (lower + upper)[200:].any()
    return is_narrow and upper[0] < 3 / 4 and float(np.abs(lower - upper).sum()) < 1 / 2
