"""Token files of other programs: each format is read with the right width, or refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest

from ngpt.config.base import ConfigError
from ngpt.data.tokens.formats import BARE_DTYPES, CorruptShardError, find_layout, token_dtype
from ngpt.data.tokens.shards import Shard, read_shard, verify_shard, write_shard
from tests.helpers.token_files import write_llm_c, write_megatron

TEXT = np.random.default_rng(0).zipf(1.3, 600) % 50_000  # token ids as frequent as in a text
LARGE = TEXT + np.arange(600) % 2 * 70_000  # of a vocabulary of 128k


def read_ids(path: Path, bare_dtype: str | None = None) -> list[int]:
    return verify_shard(path, vocab_size=1 << 31, bare_dtype=bare_dtype).tokens.tolist()


@pytest.mark.parametrize("ids", [TEXT, TEXT % 65, TEXT % 4, LARGE, LARGE + 120_000, np.where(TEXT < 9, -1, LARGE)])
@pytest.mark.parametrize(("dtype", "named"), [("<u4", "32-bit"), ("<i4", "32-bit"), ("<i8", "int64")])
def test_a_wide_array_without_header_is_refused_with_its_width(
    tmp_path: Path, ids: np.ndarray, dtype: str, named: str
) -> None:
    (tmp_path / "a.bin").write_bytes(ids.astype(dtype).tobytes())
    with pytest.raises(
        ConfigError, match=rf"a\.bin has no header and looks like {named}.*set data\.token_dtype="
    ) as caught:
        read_shard(tmp_path / "a.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", BARE_DTYPES)
def test_the_width_of_an_array_without_header_can_be_given(tmp_path: Path, dtype: str) -> None:
    ids = (TEXT % 250).astype(BARE_DTYPES[dtype])
    ids.tofile(tmp_path / "a.bin")
    assert read_ids(tmp_path / "a.bin", dtype) == ids.tolist()
    (tmp_path / "a.bin").write_bytes(ids.tobytes() + b"\0")
    if dtype != "uint8":
        with pytest.raises(CorruptShardError, match=f"bytes.*: not {dtype} tokens"):
            read_shard(tmp_path / "a.bin", dtype)


@pytest.mark.parametrize(
    "ids",
    [TEXT, TEXT % 65, TEXT % 4, TEXT % 2, np.full(1000, 1), np.full(1000, 3), np.zeros(64), np.arange(5), [7, 0, 9, 0]],
    ids=["text", "characters", "DNA", "bits", "ones", "threes", "zeros", "five", "four"],
)
def test_an_array_of_16_bits_is_not_taken_for_a_wider_one(tmp_path: Path, ids: np.ndarray) -> None:
    np.asarray(ids, "<u2").tofile(tmp_path / "a.bin")
    assert read_ids(tmp_path / "a.bin") == np.asarray(ids).tolist()


CHARACTERS = np.random.default_rng(0).geometric(0.08, 4000) % 65  # as frequent as in a text


@pytest.mark.parametrize(
    "ids",
    [
        CHARACTERS,
        CHARACTERS % 4,
        np.frombuffer("".join(f"\u00e9t\u00e9 {n}, \u4e2d\u6587 text. " for n in TEXT).encode(), np.uint8),
    ],
    ids=["characters", "DNA", "UTF-8"],
)
def test_an_array_of_bytes_is_not_read_as_half_as_many_tokens(tmp_path: Path, ids: np.ndarray) -> None:
    ids.astype("u1")[: len(ids) // 2 * 2].tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"looks like 8-bit tokens.*set data\.token_dtype=uint8"):
        read_shard(tmp_path / "a.bin")


@pytest.mark.parametrize("vocab_size", [257, 300, 1500, 50_257, 65_536])
@pytest.mark.parametrize("is_even", [True, False])
def test_an_array_of_16_bits_is_not_taken_for_one_of_bytes(tmp_path: Path, vocab_size: int, is_even: bool) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, 5000) if is_even else rng.zipf(1.2, 5000) % vocab_size
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    assert read_ids(tmp_path / "a.bin") == ids.tolist()


def test_a_wide_array_that_starts_with_padding_is_refused_too(tmp_path: Path) -> None:
    ids = np.concatenate([np.zeros(1 << 19, "<u4"), np.tile(TEXT, 20)])
    ids.astype("<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="looks like 32-bit"):
        read_shard(tmp_path / "a.bin")


@pytest.mark.parametrize(("version", "dtype"), [(1, "<u2"), (7, "<u4")])
def test_both_versions_of_llm_c_are_read(tmp_path: Path, version: int, dtype: str) -> None:
    ids = TEXT if version == 1 else LARGE
    write_llm_c(tmp_path / "a.bin", ids, version=version)
    shard = verify_shard(tmp_path / "a.bin", vocab_size=130_000)
    assert shard.tokens.tolist() == ids.tolist() and shard.tokens.dtype == dtype and shard.format == f"llm.c {version}"


@pytest.mark.parametrize("dtype", ["<u1", "<i1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8"])
def test_megatron_is_read_by_the_dtype_of_its_index(tmp_path: Path, dtype: str) -> None:
    ids = TEXT % 100
    write_megatron(tmp_path / "a.bin", [ids[:100], ids[100:101], ids[101:]], dtype)
    shard = verify_shard(tmp_path / "a.bin", vocab_size=100)
    assert shard.tokens.tolist() == ids.tolist() and shard.format == f"Megatron {np.dtype(dtype).name}"


def broken_index(path: Path, reason: str) -> None:
    data = bytearray(path.read_bytes())
    if reason == "version 2":
        data[9] = 2
    elif reason == "dtype code 7":
        data[17] = 7
    elif reason == "its header says":
        del data[-1]
    elif reason == "multimodal":
        data += bytes(3)
    elif reason == "do not follow each other":
        data[34:38] = struct.pack("<i", 99)
    elif reason == "not an index of Megatron":
        data[:4] = b"ABCD"
    elif reason == "fairseq":
        data[:9] = b"TNTIDX\0\0\0"
    else:
        data = data[:20]
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "reason",
    [
        "version 2",
        "dtype code 7",
        "its header says",
        "multimodal",
        "do not follow each other",
        "not an index of Megatron",
        "fairseq",
        "shorter than its header",
    ],
)
def test_an_index_that_does_not_describe_the_tokens_is_named_with_the_reason(tmp_path: Path, reason: str) -> None:
    write_megatron(tmp_path / "a.bin", [TEXT[:100], TEXT[100:200], TEXT[200:]], "<i4")
    broken_index(tmp_path / "a.idx", reason)
    with pytest.raises(CorruptShardError, match=reason):
        read_shard(tmp_path / "a.bin")


def test_tokens_that_are_longer_or_shorter_than_their_index_are_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a.bin", [TEXT], "<u2")
    data = (tmp_path / "a.bin").read_bytes()
    for changed in (data + b"\0\0", data[:-2]):
        (tmp_path / "a.bin").write_bytes(changed)
        with pytest.raises(CorruptShardError, match=r"a\.idx says 1200"):
            read_shard(tmp_path / "a.bin")


@pytest.mark.parametrize("dtype", ["<u2", "<i4", ">i4", "<u4", "<i8", "u1"])
def test_an_npy_file_is_read_by_its_header(tmp_path: Path, dtype: str) -> None:
    ids = TEXT % 200
    np.save(tmp_path / "a.npy", ids.astype(dtype))
    assert read_ids(tmp_path / "a.npy") == ids.tolist()
    (tmp_path / "a.npy").rename(tmp_path / "a.bin")  # the content counts, not the name
    assert read_ids(tmp_path / "a.bin") == ids.tolist()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 4), np.uint16), r"uint16 \(3, 4\)"),
        (np.zeros(3), "float64"),
        (np.zeros(3, bool), "bool"),
        (np.zeros(0, np.uint16), "empty"),
        (np.array(["a", None], object), r"cannot be read as \.npy"),
        (np.array([-1, 5], np.int32), "token id -1 is negative"),
    ],
)
def test_an_npy_file_without_a_row_of_tokens_is_refused(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(CorruptShardError, match=reason):
        verify_shard(tmp_path / "a.npy", vocab_size=300)


def test_every_truncation_of_an_npy_file_is_found(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", (TEXT % 300).astype("<u4"))
    whole = (tmp_path / "a.npy").read_bytes()
    for kept in [*range(6, 140, 3), len(whole) - 1, len(whole) - 4]:
        (tmp_path / "a.npy").write_bytes(whole[:kept])
        with pytest.raises(CorruptShardError):
            read_shard(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(whole + b"\0\0\0\0")
    with pytest.raises(CorruptShardError, match="its header says"):
        read_shard(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\x03\x04", "zip archive"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"GGUF", "GGUF"),
        (struct.pack("<i", 20240326), "model of llm.c"),
        (struct.pack("<i", 20240328), "tokenizer of llm.c"),
        (struct.pack("<i", 20240522), "evaluation of llm.c"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, start: bytes, what: str) -> None:
    (tmp_path / "a.bin").write_bytes(start + bytes(range(200)) * 10)
    with pytest.raises(CorruptShardError, match=f"is .*{what}.*, not tokens"):
        read_shard(tmp_path / "a.bin")


def test_text_under_the_name_of_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("All work and no play makes Jack a dull boy.\n" * 20)
    with pytest.raises(ConfigError, match="looks like text, or bytes"):
        read_shard(tmp_path / "a.bin")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (1 << 31, "<u4")])
def test_a_vocabulary_above_65536_has_tokens_of_32_bits(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    ids = np.array([0, vocab_size - 1, vocab_size // 2])
    shard = write_shard(tmp_path / "a.bin", ids, vocab_size=vocab_size)
    assert verify_shard(tmp_path / "a.bin", vocab_size=vocab_size).tokens.tolist() == ids.tolist()
    assert shard.tokens.dtype == dtype and shard.vocab_size == vocab_size
    assert find_layout(shard.path).count == 3


def test_llm_c_can_read_our_wide_shards_and_each_flipped_bit_is_found(tmp_path: Path) -> None:
    shard: Shard = write_shard(tmp_path / "a.bin", LARGE, vocab_size=128_256)
    whole = shard.path.read_bytes()
    assert struct.unpack("<3i", whole[:12]) == (20240801, 7, 600)
    assert np.frombuffer(whole[1024:], "<u4").tolist() == LARGE.tolist()
    rng = np.random.default_rng(1)
    for at, bit in [
        *((at, bit) for at in range(24) for bit in range(8)),
        *rng.integers((24, 0), (len(whole), 8), (100, 2)),
    ]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        shard.path.write_bytes(damaged)
        with pytest.raises(CorruptShardError):
            verify_shard(shard.path, vocab_size=128_256)
