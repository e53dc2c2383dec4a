"""Documents from Parquet, JSON lines and text, and the identity of files."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from ngpt.data.text import documents
from ngpt.data.text.documents import files_identity, find_files, holds_documents, read_documents, text_size

TEXTS = ["one\n", "\r\n two \u2028 three", "caf\u00e9 \U0001f600" * 50, '"quoted"\\n']


def write_parquet(path: Path, texts: list[Any], *, column: str = "text", rows: int = 2) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), column: texts, "meta": [{"text": "not this"}] * len(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


def write_json_lines(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"meta": {}, "text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = bytes(pyarrow.compress(data, codec="zstd", asbytes=True))
    path.write_bytes(data)
    return path


def write(path: Path, texts: list[str]) -> Path:
    return write_parquet(path, texts) if path.suffix == ".parquet" else write_json_lines(path, texts)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.JSONL.zst"])
def test_documents_are_read_unchanged(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [TEXTS[0], "", *TEXTS[1:]])
    assert holds_documents(path)
    assert list(read_documents([path])) == TEXTS  # empty documents are dropped


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(texts=st.lists(st.text(max_size=20), max_size=6))
def test_every_format_holds_the_same_documents(tmp_path: Path, texts: list[str]) -> None:
    texts = [text.encode(errors="ignore").decode() for text in texts]
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        assert list(read_documents([write(tmp_path / name, texts)])) == [text for text in texts if text]


def test_missing_values_are_left_out_and_a_text_file_is_one_document(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", None, "b"])
    (tmp_path / "b.txt").write_bytes(b"line\r\nline\n\n")
    assert list(read_documents(find_files(tmp_path))) == ["a", "b", "line\r\nline\n\n"]


def test_files_are_read_by_name_from_all_folders_but_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "z" / ".git").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "z/c.jsonl", "z/.git/d.jsonl", ".e.jsonl"):
        write_json_lines(tmp_path / name, [name])
    assert list(read_documents(find_files(tmp_path))) == ["a.jsonl", "b.jsonl", "z/c.jsonl"]


def test_the_size_of_the_text_is_estimated_without_reading_it(tmp_path: Path) -> None:
    texts = [f"{number} is not {number + 1}, and so on. " * 20 for number in range(500)]
    size = sum(map(len, texts))
    paths = [write_parquet(tmp_path / "a.parquet", texts, rows=500), write_json_lines(tmp_path / "a.jsonl", texts)]
    assert all(0.9 < text_size([path]) / size < 1.1 for path in paths)


def broken(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_that_cannot_be_read_is_named_with_the_reason_in_one_line(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", ["some text"] * 1000).read_bytes()
    middle = bytearray(whole)
    middle[4:400] = bytes(396)
    cases = [
        (broken(tmp_path / "a.parquet", b"nothing"), "is not a Parquet file"),
        (broken(tmp_path / "b.parquet", whole[:-9]), "is not a Parquet file"),
        (broken(tmp_path / "c.parquet", bytes(middle)), "cannot be read"),
        (write_parquet(tmp_path / "d.parquet", ["a"], column="body"), "no column 'text'; it has id, body, meta"),
        (write_parquet(tmp_path / "e.parquet", [1]), "holds int64, not text"),
        (broken(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": '), "line 3: "),
        (broken(tmp_path / "b.jsonl", b'{"body": "a"}\n'), "line 1 has no text under 'text'; it has body"),
        (broken(tmp_path / "c.jsonl", b'{"text": 7}\n'), "line 1 has no text under 'text'; it is 7"),
        (broken(tmp_path / "d.jsonl", b'["text"]\n'), "line 1 has no text under 'text'; it is \\['text'\\]"),
        (broken(tmp_path / "e.jsonl", b'{"text": "\xff"}\n'), "line 1: "),
        (broken(tmp_path / "f.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n'), "line 2: .*surrogates not allowed"),
        (broken(tmp_path / "a.jsonl.gz", b"plain"), "line 1: "),
        (broken(tmp_path / "a.txt", b"\xff"), "is not UTF-8 text"),
    ]
    for path, reason in cases:
        with pytest.raises(ConfigError, match=reason) as caught:
            list(read_documents([path]))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no files in it"):
        find_files(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        find_files(tmp_path / "nowhere")


def test_large_files_are_identified_by_length_edges_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_HASHED_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    seen = set()
    for content in (b"x" * 5000, b"x" * 5001, b"y" + b"x" * 4999, b"x" * 4999 + b"y"):
        path.write_bytes(content)
        seen.add(files_identity(path, [path]))
    assert len(seen) == 4
    copy = tmp_path / "b.jsonl"
    copy.write_bytes(path.read_bytes())
    assert files_identity(copy, [copy]) in seen  # the location does not matter


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = files_identity(path, [path])
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert files_identity(path, [path]) != before
