"""Documents from Parquet, JSON lines and text, and the identity of files."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from ngpt.data.sources import text_corpus
from ngpt.data.text import documents, json_documents, streams, tables
from ngpt.data.text.documents import (
    files_identity,
    find_files,
    holds_documents,
    read_documents,
    select_files,
    text_size,
)

TEXTS = ["one\n", "\r\n two \u2028 three", "caf\u00e9 \U0001f600" * 50, '"quoted"\\n']


def write_parquet(path: Path, texts: list[Any], *, column: str = "text", rows: int = 2) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), column: texts, "meta": [{"text": "not this"}] * len(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


COMPRESS: dict[str, Any] = {
    ".gz": gzip.compress,
    ".zst": lambda data: bytes(pyarrow.compress(data, codec="zstd", asbytes=True)),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def write_json_lines(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"meta": {}, "text": text}) + "\n" for text in texts).encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return path


def write_arrow(path: Path, texts: list[Any], *, rows: int = 2, kind: Any = pyarrow.ipc.new_stream) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())})
    with kind(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write(path: Path, texts: list[str]) -> Path:
    """Writes documents in the format of the name; `array` and `pretty` in it are layouts of JSON."""
    if path.suffix == ".parquet":
        return write_parquet(path, texts)
    if path.suffix in (".arrow", ".feather"):
        return write_arrow(
            path, texts, kind=pyarrow.ipc.new_file if path.suffix == ".feather" else pyarrow.ipc.new_stream
        )
    if "array" not in path.name:
        return write_json_lines(path, texts)
    indent = 2 if "pretty" in path.name else None
    path.write_bytes(
        COMPRESS.get(path.suffix, bytes)(json.dumps([{"text": text} for text in texts], indent=indent).encode())
    )
    return path


NAMES = [
    *("a.parquet", "a.arrow", "a.feather"),
    *("a.jsonl", "a.jsonl.gz", "a.JSONL.zst", "a.ndjson", "a.json", "a.json.gz", "a.json.xz", "a.ndjson.bz2"),
    *("a.txt", "a.txt.zst", "a", "array.json", "array_pretty.json.gz", "array_pretty.txt"),
]


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_read_unchanged(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [TEXTS[0], "", *TEXTS[1:]])
    assert holds_documents(path)
    assert list(read_documents([path])) == TEXTS  # empty documents are dropped


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=30
)
@given(texts=st.lists(st.text(max_size=20), max_size=6))
def test_every_format_holds_the_same_documents(tmp_path: Path, texts: list[str]) -> None:
    texts = [text.encode(errors="ignore").decode() for text in texts]
    # The name says what it is, since no text at all is also no JSON.
    for name in ("a.parquet", "a.arrow", "a.jsonl", "a.jsonl.zst", "array.json", "array_pretty.json.gz"):
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


def test_links_to_folders_are_followed_and_no_file_is_read_twice(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    write_json_lines(corpus / "b" / "own.jsonl", ["own"])
    write_json_lines(tmp_path / "elsewhere" / "deep" / "linked.jsonl", ["linked"])
    (corpus / "part").symlink_to(tmp_path / "elsewhere")
    (corpus / "a").symlink_to("b")  # is read as b, whichever name comes first
    (corpus / "b" / "loop").symlink_to(corpus)
    assert find_files(corpus) == [corpus / "b" / "own.jsonl", corpus / "part" / "deep" / "linked.jsonl"]


@pytest.mark.parametrize("kind", ["link", "hard link", "compressed"])
def test_a_text_that_would_be_read_twice_is_refused(tmp_path: Path, kind: str) -> None:
    text = b"once upon a time\n" * 50
    first, second = tmp_path / "a.txt", tmp_path / ("a.txt.gz" if kind == "compressed" else "latest.txt")
    first.write_bytes(text)
    if kind == "compressed":
        second.write_bytes(gzip.compress(text))
    elif kind == "link":
        second.symlink_to("a.txt")
    else:
        second.hardlink_to(first)
    (tmp_path / "A.txt").write_bytes(b"a name in other letters")
    with pytest.raises(ConfigError, match=rf"a\.txt and .*{second.name} are one text.*: remove one of them"):
        text_corpus(tmp_path)
    second.unlink()
    assert text_corpus(tmp_path).size() == len(text) + 23


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
        (
            write_parquet(tmp_path / "d.parquet", ["a"], column="body"),
            "has no text under 'text'; it has id, body, meta.text",
        ),
        (write_parquet(tmp_path / "e.parquet", [1]), "holds int64, not text"),
        (broken(tmp_path / "a.jsonl", b'{"text": "a"}\n\n{"text": '), "line 3 is not JSON: "),
        (broken(tmp_path / "b.jsonl", b'{"body": "a"}\n'), "line 1 has no text under 'text'; it has body"),
        (broken(tmp_path / "c.jsonl", b'{"text": 7}\n'), "line 1 has no text under 'text'; it is 7"),
        (broken(tmp_path / "d.jsonl", b'["text"]\n'), "item 1 has no text under 'text'; it is 'text'"),
        (broken(tmp_path / "e.jsonl", b'{"text": "\xff"}\n'), "line 1 is not UTF-8 text: .* at byte 10 of the file"),
        (broken(tmp_path / "g.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 100_000), "line 2 is nested too deeply"),
        (broken(tmp_path / "a.json", b'[{"text": "a"}, {"text": ' + b"[" * 100_000), "item 2 is nested too deeply"),
        (broken(tmp_path / "b.json", b'[{"text": "a"},\n {"text": "b"'), "item 2: "),
        (broken(tmp_path / "c.json", b'[{"text": "a"}, ]'), "item 2: "),
        (broken(tmp_path / "d.json", b'[{"text": "a"} {"text": "b"}]'), "item 1: no comma after it"),
        (broken(tmp_path / "e.json", b'[{"text": "a"}]\n[{"text": "b"}]'), "goes on after the end of its array"),
        (broken(tmp_path / "f.json", b'{\n "text": "a",\n "meta": }'), "is not JSON: .* line 3"),
        (
            broken(tmp_path / "f.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n'),
            "line 2 is not valid text: surrogates not allowed",
        ),
        (broken(tmp_path / "a.jsonl.gz", b"plain"), "not compressed as its name says"),
        (broken(tmp_path / "a.txt", b"\xff"), "is not UTF-8 text: .* at byte 0"),
        (broken(tmp_path / "b.txt", b"\xff\xfea\0b\0"), "is UTF-16 text"),
        (broken(tmp_path / "c.txt", "a tarball".encode("utf-16-le")), "has zero bytes in it"),
        (broken(tmp_path / "a.arrow", write_arrow(tmp_path / "x", ["a"] * 9).read_bytes()[:-8]), "is incomplete"),
        (broken(tmp_path / "b.arrow", b"nothing that ends well" + b"\xff\xff\xff\xff\0\0\0\0"), "cannot be read"),
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


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    for name, content in (("a.txt", b"one"), ("a.jsonl", b'{"text": "one"}'), ("a.json", b' [{"text": "one"}]')):
        assert list(read_documents([broken(tmp_path / name, mark + content)])) == ["one"]


def save_to_disk(folder: Path, files: dict[str, list[str]]) -> Path:
    """The layout of `datasets.Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    for name, texts in files.items():
        write_arrow(folder / name, texts)
    state = {"_data_files": [{"filename": name} for name in files], "_indices_data_files": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}, indent=2))
    return folder


def test_a_data_set_that_was_saved_to_disk_is_read_without_what_is_derived_from_it(tmp_path: Path) -> None:
    folder = save_to_disk(
        tmp_path / "set", {"data-00000-of-00002.arrow": ["a", "b", "c"], "data-00001-of-00002.arrow": ["d"]}
    )
    write_arrow(folder / "cache-6f1e.arrow", ["A", "B", "C"])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    documents, texts, left_out = select_files(find_files(folder))
    assert list(read_documents(documents)) == ["a", "b", "c", "d"] and texts == []
    assert [path.name for path in left_out] == [
        "cache-6f1e.arrow",
        "dataset_dict.json",
        "dataset_info.json",
        "state.json",
    ]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"has no data-00001-of-00002\.arrow, which its state\.json names"):
        select_files(find_files(folder))


def choose(folder: Path, files: dict[str, str], column: str = "text") -> tuple[list[str], list[str], list[str]]:
    for name, content in files.items():
        (folder / name).write_text(content)
    documents, texts, left_out = select_files(find_files(folder), column)
    return [file.name for file in documents], [file.name for file in texts], [file.name for file in left_out]


ROW, OTHER = '{"text": "a"}\n', '{"body": "a"}\n'


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({"a.jsonl": ROW, "README.md": "about"}, (["a.jsonl"], [], ["README.md"])),
        ({"a.json": ROW, "info.json": OTHER, "b.json": f"[{ROW}]"}, (["a.json", "b.json"], [], ["info.json"])),
        ({"a.txt": ROW * 2, "b.txt": ROW}, (["a.txt", "b.txt"], [], [])),
        (
            {"a.py": "x = {}", "package.json": OTHER, "b.json": '{\n"x": 1}'},
            ([], ["a.py", "b.json", "package.json"], []),
        ),
        ({"a.txt": '{"text": "a"} is an example\n'}, ([], ["a.txt"], [])),
        ({"a.txt": ROW + "said the file\n"}, ([], ["a.txt"], [])),
        ({"a.txt": "[{...}] is how\n"}, ([], ["a.txt"], [])),
    ],
)
def test_documents_are_told_from_texts_and_from_files_about_them(
    tmp_path: Path, files: dict[str, str], chosen: tuple[list[str], list[str], list[str]]
) -> None:
    assert choose(tmp_path, files) == chosen


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": ROW, "b.txt": "text"}, r"a\.txt holds documents and .*b\.txt text: move them"),
        (
            {"a.json": OTHER * 2, "README.md": "about"},
            r"a\.json has no text under 'text'; it has body; data\.text_column",
        ),
        ({"a.txt": OTHER}, r"a\.txt has no text under 'text'; it has body"),
        ({"a.json": '{\n "version": 1,\n "data": []}'}, r"a\.json has no text under 'text'; it has data, version"),
    ],
)
def test_files_that_may_be_meant_as_documents_or_as_text_are_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(tmp_path, files)


# ---- small files with a large content --------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit of one mebibyte, so that a test needs little time; the real one is 64."""
    limit = 1 << 20
    for module in (streams, json_documents, tables, documents):
        monkeypatch.setattr(module, "MAX_DOCUMENT", limit)
    return limit


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.json.gz", "a.ndjson"])
def test_a_line_that_is_too_long_is_refused_before_it_fills_the_memory(
    name: str, tmp_path: Path, small_limit: int
) -> None:
    line = b'{"text": "' + b"x" * (40 * small_limit) + b'"}\n'
    (tmp_path / name).write_bytes(COMPRESS.get(Path(name).suffix, bytes)(b'{"text": "a"}\n' + line))
    del line
    texts = read_documents([tmp_path / name])
    tracemalloc.start()
    try:
        assert next(texts) == "a"
        with pytest.raises(ConfigError) as caught:
            next(texts)
        assert tracemalloc.get_traced_memory()[1] < 16 * small_limit
    finally:
        tracemalloc.stop()
    assert str(caught.value) == f"{tmp_path / name}, line 2 is too large: a document has at most 1 MiB"


def test_an_item_of_an_array_and_a_whole_object_are_bounded(tmp_path: Path, small_limit: int) -> None:
    text = "x" * (3 * small_limit)
    (tmp_path / "array.json").write_text(json.dumps([{"text": "a"}, {"text": text}]))
    (tmp_path / "object.json").write_text(json.dumps({"text": text}, indent=1))
    with pytest.raises(ConfigError, match=r"array\.json, item 2 is too large"):
        list(json_documents.read_json_array(tmp_path / "array.json", "text"))
    with pytest.raises(ConfigError, match=r"object\.json is too large"):
        list(json_documents.read_json_object(tmp_path / "object.json", "text"))


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_deep_nesting_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    deep = '{"text": "b", "meta": ' + "[" * 200_000 + "]" * 200_000 + "}"
    content = f"[{deep}]" if name.endswith(".json") else f'{{"text": "a"}}\n{deep}\n'
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=r"deep\.jsonl?, (line 2|item 1) is nested too deeply$"):
        list(read_documents([tmp_path / name]))


def test_a_text_that_is_one_document_is_bounded_and_a_corpus_of_one_line_is_not(
    tmp_path: Path, small_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("x" * (3 * small_limit))
    with pytest.raises(ConfigError, match=r"a\.txt is too large: a document has at most 1 MiB"):
        list(read_documents([tmp_path / "a.txt"]))
    monkeypatch.setattr(documents, "BLOCK", small_limit // 2)
    monkeypatch.setattr(documents, "MAX_LINE", small_limit)
    pieces = list(documents.read_text(tmp_path / "a.txt"))
    assert sum(map(len, pieces)) == 3 * small_limit and max(map(len, pieces)) <= 2 * small_limit


def test_a_long_text_that_many_rows_repeat_is_in_memory_once(tmp_path: Path) -> None:
    repeated = pyarrow.array(["x" * 1_000_000]).dictionary_encode().take(pyarrow.array([0] * 2000))
    table = pyarrow.table({"text": repeated})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)  # so that it is read as a string
    before = pyarrow.total_allocated_bytes()
    texts = read_documents([tmp_path / "a.parquet"])
    assert len(next(texts)) == 1_000_000
    assert pyarrow.total_allocated_bytes() - before < 100_000_000  # of two billion


def test_a_value_of_a_table_is_bounded(tmp_path: Path, small_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = "x" * (2 * small_limit)
    with pytest.raises(ConfigError, match=r"a\.parquet, row 2 is too large"):
        list(read_documents([write_parquet(tmp_path / "a.parquet", ["a", huge, "b", "c"], rows=4)]))
    with pytest.raises(ConfigError, match=r"a\.arrow, row 2 is too large"):
        list(read_documents([write_arrow(tmp_path / "a.arrow", ["a", huge, "b"])]))
    monkeypatch.setattr(tables, "MAX_UNPACKED", small_limit)
    with pytest.raises(ConfigError, match=r"b\.parquet: [\d,]+ bytes of column 'text' unpack to [\d,]+: not a text"):
        path = tmp_path / "b.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", huge, "b", "c"]}), path, compression="zstd")
        list(read_documents([path]))
