"""JSON is read piece by piece, and its nested columns by their dotted names."""

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ngpt.config.base import ConfigError
from ngpt.data.text import json_documents
from ngpt.data.text.documents import read_documents


def test_a_nested_column_is_named_with_dots_and_a_name_with_a_dot_comes_first(tmp_path: Path) -> None:
    rows = [{"a": {"b": "one", "c": 1}}, {"a": None}, {"a": {"b": None, "c": 2}}, {"a": {"b": "two", "c": 3}}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        left_out: Counter[str] = Counter()
        assert list(read_documents([tmp_path / name], "a.b", left_out)) == ["one", "two"] and left_out == {"null": 2}
        with pytest.raises(ConfigError, match=r"'text'; it has a\.b, a\.c; data\.text_column"):
            list(read_documents([tmp_path / name]))
    dotted = table.append_column("a.b", [["three", "four", None, "five"]])
    pyarrow.parquet.write_table(dotted, tmp_path / "b.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dotted.to_pylist()))
    for name in ("b.parquet", "b.jsonl"):
        assert list(read_documents([tmp_path / name], "a.b")) == ["three", "four", "five"]


def test_an_array_of_large_objects_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_documents, "PIECE", 7)
    texts = ["caf\u00e9 " * number for number in range(1, 40)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts], indent=1), encoding="utf-8")
    assert list(read_documents([path])) == texts
