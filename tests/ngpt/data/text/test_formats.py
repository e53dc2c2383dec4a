"""The format of a file follows from its name and its first bytes."""

from pathlib import Path

import pytest

from ngpt.data.text.formats import format_of

ROW = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.parquet", b"", "parquet"),
        ("a", b"PAR1...", "parquet"),
        ("a.feather", b"", "arrow"),
        ("a.bin", b"ARROW1..", "arrow"),
        ("a.jsonl", b"not JSON, which its reader reports", "json_lines"),
        ("a.jsonl", b"[" + ROW + b"]", "json_array"),
        ("a.txt", ROW * 9, "json_lines"),
        ("a.txt", b"\xef\xbb\xbf \n" + ROW, "json_lines"),
        ("a.txt", ROW + b"and a word", "text"),
        ("a.txt", ROW * 9000, "json_lines"),  # longer than what is looked at
        ("a.txt", b'{"text": "' + b"a" * 100_000 + b'"}\n', "json_lines"),
        ("a.txt", b"[1] a footnote", "text"),
        ("a.txt", b' [ {"text" : 1}]', "json_array"),
        ("a.json", b'{\n "text": "a"\n}', "json_object"),
        ("a.json", ROW, "json_lines"),
        ("a.json", b"", "text"),
        ("a.py", b"{}.items()\n", "text"),
    ],
)
def test_a_format_follows_from_name_and_content(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert format_of(tmp_path / name).kind == kind


def test_a_column_may_be_inside_one_that_is_null_in_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": 1, "meta": null, "body": {"text": "a", "size": 1}}')
    found = format_of(tmp_path / "a.json")
    assert [found.has_column(name) for name in ("meta.text", "body.text", "body", "text")] == [True, True, True, False]
