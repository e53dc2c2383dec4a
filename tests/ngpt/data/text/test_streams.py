"""Compressed files are read whole or not at all, and bad bytes are counted from their start."""

import os
from pathlib import Path

import pyarrow
import pytest

from ngpt.config.base import ConfigError
from ngpt.data.text.documents import read_documents
from tests.ngpt.data.text.test_documents import COMPRESS, broken, write_json_lines


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_ends_early_is_an_error_and_not_a_shorter_corpus(tmp_path: Path, suffix: str) -> None:
    path = write_json_lines(tmp_path / f"a.jsonl{suffix}", [os.urandom(50).hex() for _ in range(2000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a\.jsonl.*cannot be decompressed: "):
        list(read_documents([path]))


def test_compressed_parts_that_were_joined_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one\n") + compress(b"two\n"))
        assert list(read_documents([path])) == ["one\ntwo\n"]


def test_a_zstd_window_above_128_megabytes_is_read(tmp_path: Path) -> None:
    """One raw block in a frame with the header of `zstd --long=28`, see RFC 8878."""
    text = b'{"text": "far away"}\n'
    block = (1 | len(text) << 3).to_bytes(3, "little") + text  # the last block, raw
    path = broken(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes([0, (28 - 10) << 3]) + block)
    with pytest.raises(OSError), pyarrow.input_stream(str(path), compression="zstd") as stream:
        stream.read()
    assert list(read_documents([path])) == ["far away"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bad_byte_is_counted_from_the_start_of_the_file(tmp_path: Path, suffix: str) -> None:
    data = b"\xef\xbb\xbf" + "caf\u00e9\n".encode() * 1_000_000
    for at in (3, 4_194_303, 5_999_999):  # around the block of text that is read at once
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(COMPRESS.get(suffix, bytes)(data[:at] + b"\xff" + data[at:]))
        with pytest.raises(ConfigError, match=rf"is not UTF-8 text: .* at byte {at}\b"):
            list(read_documents([path]))
