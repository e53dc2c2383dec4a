"""CSV and TSV as people have them: quotes, line ends inside of values, marks of spreadsheets, and what is refused."""

import csv
import gzip
import io
from pathlib import Path

import pyarrow
import pyarrow.csv
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from ngpt.data.text import delimited
from ngpt.data.text.documents import find_files, read_documents, select_files

LONG = "a long text, " * 20_000  # longer than a value may be by default in Python's reader


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.csv", 'id,text\n1,plain\n2,"a, b"\n', ["plain", "a, b"]),
        ("a.csv", 'text\n"two\nlines, \n\nand ""quotes"""\n\nlast', ['two\nlines, \n\nand "quotes"', "last"]),
        ("a.csv", '\ufefftext,id\r\nwindows,1\r\n"a\r\nb",2\r\n', ["windows", "a\r\nb"]),
        ("a.csv", b'\xef\xbb\xbf"text","id"\nfrom a spreadsheet,1\n', ["from a spreadsheet"]),
        ("a.csv", "id;text;price\n1;divided, by semicolons;1,5\n", ["divided, by semicolons"]),
        ("a.csv", "text,id\nfirst,1\n,2\nthird,3\n", ["first", "third"]),
        ("a.csv", 'it is 5" wide,text\n1,2\n', ["2"]),
        ("A.TSV", 'id\ttext\n1\ta, "b" and c\n2\t"tab\there"\n', ['a, "b" and c', "tab\there"]),
        ("a.csv.gz", gzip.compress(b"text\npacked\n", mtime=0), ["packed"]),
        ("a.csv", f"id,text\n1,{LONG.replace(',', '')}\n", [LONG.replace(",", "")]),
        ("a.csv", "text\n\u3042\u2028b\x0cc\x85d\n", ["\u3042\u2028b\x0cc\x85d"]),  # these end no line
    ],
)
def test_a_table_holds_the_documents_of_its_column(
    tmp_path: Path, name: str, content: str | bytes, documents: list[str]
) -> None:
    path = write(tmp_path / name, content)
    assert select_files([path]).documents == [path]
    assert list(read_documents([path])) == documents


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
@given(
    st.lists(st.text(st.sampled_from('a,;\t"\n\u3042 '), min_size=1, max_size=8), min_size=1, max_size=5),
    st.sampled_from([(".csv", ","), (".csv", ";"), (".tsv", "\t")]),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_others_write_is_read_as_they_read_it(
    tmp_path: Path, texts: list[str], kind: tuple[str, str], quoting: int, end: str
) -> None:
    written = io.StringIO()
    writer = csv.writer(written, delimiter=kind[1], quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
    writer.writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    path = write(tmp_path / f"a{kind[0]}", written.getvalue())
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(delimiter=kind[1], newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={"text": pyarrow.string()}),
    )
    assert list(read_documents([path])) == table.column("text").to_pylist() == texts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("id,body\n1,a\n", "has no text under 'text'; it has body, id; data.text_column"),
        ("no header, but a text\nand another\n", "has no text under 'text'; it has  but a text, no header"),
        ("", "has no text under 'text'; it has nothing"),
        ("text,text\na,b\n", "has 2 columns 'text'"),
        ("id,text\n1,a\n2,b,c\n", "line 3 has 3 columns, the first line 2"),
        ('id,text\n1,"a\nb"\n2\n', "line 4 has 1 columns, the first line 2"),
        ('id,text\n1,"a\n2,b\n', "line 2 is not a row of CSV: a quote is not closed"),
        ('id,text\n1,"a"b\n', "line 2 is not a row of CSV: ',' expected after"),
        ('"id,text\n1,a\n', "line 1 is not a row of CSV: a quote is not closed"),
        (b"text\na\nb\xff\n", "is not UTF-8 text: .* at byte 8"),
        (b"\xff\xfet\0e\0x\0t\0", "is UTF-16 text"),
        (b"text\na\0b\n", "line 2 is not text: it has zero bytes in it"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(ConfigError, match=reason) as caught:
        list(read_documents(select_files([path]).documents))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_and_a_line_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit(1000)
    monkeypatch.setattr(delimited, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr("ngpt.data.text.streams.MAX_DOCUMENT", 2000)
    try:
        for name, content in (("a.csv", 'text\n"' + "a\n" * 600 + '"\n'), ("b.csv", "text\n" + "b" * 2100 + "\n")):
            with pytest.raises(ConfigError, match=r"\.csv, line 2 is too large"):
                list(read_documents([write(tmp_path / name, content)]))
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"a.csv": "text\na\n", "README.md": "about"}, ["a.csv"]),
        ({"a.csv": "text\na\n", "labels.csv": "id,label\n1,2\n", "b.jsonl": '{"text": "b"}\n'}, ["a.csv", "b.jsonl"]),
    ],
)
def test_tables_are_documents_among_other_files(tmp_path: Path, files: dict[str, str], chosen: list[str]) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    found = select_files(find_files(tmp_path))
    assert [path.name for path in found.documents] == chosen and found.texts == []
    assert {path.name for path in found.left_out} == files.keys() - set(chosen)


def test_a_table_without_the_column_is_never_read_as_text(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a text\n")
    write(tmp_path / "b.csv", "id,title\n1,c\n")
    with pytest.raises(ConfigError, match=r"b\.csv has no text under 'text'; it has id, title"):
        select_files(find_files(tmp_path))
    assert [path.name for path in select_files(find_files(tmp_path), "title").documents] == ["b.csv"]
