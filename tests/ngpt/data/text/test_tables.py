"""Columns of Parquet and Arrow files hold text in many types."""

from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from ngpt.config.base import ConfigError
from ngpt.data.text.documents import read_documents

KINDS = {
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "string_view": pyarrow.string_view(),
    "large_string": pyarrow.large_string(),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_type_of_text_in_a_column_is_read(tmp_path: Path, name: str) -> None:
    texts = ["one", None, "caf\u00e9", "", "one"]
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()).cast(KINDS[name])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        left_out: Counter[str] = Counter()
        assert list(read_documents([path], left_out=left_out)) == ["one", "caf\u00e9", "one"]
        assert left_out == {"null": 1, "empty": 1}


def test_text_that_is_not_utf_8_is_named_with_its_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"first"] * 2999 + [b"caf\xe9"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3000, raw.buffers())
    for name, values in (("a.parquet", column), ("b.parquet", raw)):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / name, row_group_size=700)
        with pytest.raises(ConfigError, match=rf"{name}, row 3000 is not UTF-8 text: .* at byte 3 of the value$"):
            list(read_documents([tmp_path / name]))
