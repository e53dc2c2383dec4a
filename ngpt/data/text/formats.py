"""Recognises the format of a text file by its name and its first bytes.

| format        | by its name                       | by its content, whatever its name              |
|---------------|-----------------------------------|------------------------------------------------|
| `parquet`     | `.parquet`                        | starts with PAR1                               |
| `arrow`       | `.arrow`, `.feather`              | starts with ARROW1                             |
| `json_lines`  | `.jsonl`, `.ndjson`, `.jsonlines` | every line of its start is a JSON object       |
| `json_array`  | these and `.json`                 | starts like an array of objects                |
| `json_object` | `.json`                           |                                                |
| `csv`, `tsv`  | `.csv`, `.tsv`                    |                                                |
| `text`        | any other                         |                                                |

Text, JSON, CSV and TSV may be compressed.
"""

import json
import re
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ngpt.data.text.delimited import DELIMITERS, delimited_columns
from ngpt.data.text.json_documents import column_names
from ngpt.data.text.streams import BOM, base_name, open_stream

Format = Literal["parquet", "arrow", "json_lines", "json_array", "json_object", "csv", "tsv", "text"]

PARQUET_MAGIC, ARROW_MAGIC = b"PAR1", b"ARROW1"
CSV: dict[str, Format] = {".csv": "csv", ".tsv": "tsv"}
TABLES: dict[str, Format] = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
JSON = (*JSON_LINES, ".json")
HEAD = 1 << 16  # bytes from which a format is recognised
LONG_HEAD = 1 << 24  # if the first line is longer
SPACE = b" \t\r\n"
OBJECT = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:')  # how an object with a name begins
ARRAY_OF_OBJECTS = re.compile(rb"\[\s*" + OBJECT.pattern)


class FileFormat(NamedTuple):
    """The format of a file, and what its start says of it."""

    kind: Format
    by_name: bool  # whether its name says that it holds documents
    columns: frozenset[str] | None = None  # names in the first line or JSON object, dotted; None if it was not seen
    is_table: bool = True  # whether it holds more than one JSON object

    def has_column(self, column: str) -> bool:
        """Whether it may have a column, as far as its start shows."""
        if self.columns is None:
            return True
        # `meta.text` may also be in the rows after one whose `meta` is null.
        return any(f"{name}.".startswith(f"{column}.") or column.startswith(f"{name}.") for name in self.columns)


def format_of(path: Path) -> FileFormat:
    """Recognises the format of a file; cached in this process while the file does not change."""
    state = path.stat()
    return _format_of(path, state.st_size, state.st_mtime_ns)


@cache
def _format_of(path: Path, size: int, changed: int) -> FileFormat:
    name = base_name(path)
    for suffix, kind in TABLES.items():
        if name.endswith(suffix):
            return FileFormat(kind, by_name=True)
    for suffix, kind in CSV.items():
        if name.endswith(suffix):
            return FileFormat(kind, by_name=False, columns=delimited_columns(path, DELIMITERS[suffix]))
    with open_stream(path) as stream:
        head = stream.read(HEAD)
        is_whole = len(head) < HEAD
        if b"\n" not in head and not is_whole and head.removeprefix(BOM).lstrip(SPACE)[:1] in (b"{", b"["):
            head += stream.read(LONG_HEAD)
            is_whole = len(head) < HEAD + LONG_HEAD
    if head.startswith((PARQUET_MAGIC, ARROW_MAGIC)):
        return FileFormat("parquet" if head.startswith(PARQUET_MAGIC) else "arrow", by_name=False)
    content = head.removeprefix(BOM).lstrip(SPACE)
    if content.startswith(b"[") and (name.endswith(JSON) or ARRAY_OF_OBJECTS.match(content)):
        return _array(content, name)
    if name.endswith(JSON_LINES):
        return FileFormat("json_lines", by_name=True)
    return _lines_or_text(content, is_whole, name)


def _array(content: bytes, name: str) -> FileFormat:
    columns = None
    try:
        row, _ = json.JSONDecoder().raw_decode(content.decode(errors="ignore")[1:].lstrip())
        columns = frozenset(column_names(row)) if isinstance(row, dict) else None
    except (ValueError, RecursionError):  # longer than the start of the file, or invalid, which its reader reports
        pass
    return FileFormat("json_array", name.endswith(JSON_LINES), columns)


def _lines_or_text(content: bytes, is_whole: bool, name: str) -> FileFormat:
    """JSON lines if all lines that are there are objects; else text, or one object over several lines in a .json."""
    is_json = name.endswith(".json")
    if not content.startswith(b"{"):
        return FileFormat("json_lines" if is_json and content else "text", by_name=False)
    lines = content.split(b"\n")
    complete = [line for line in (lines if is_whole else lines[:-1]) if line.strip()]
    if not complete:
        return FileFormat("json_lines" if OBJECT.match(content) else "text", by_name=False)
    rows = list(islice(map(_object, complete), 1 if is_json else None))
    if None not in rows:
        several = len(complete) > 1 or not is_whole
        return FileFormat("json_lines", False, None if rows[0] is True else frozenset(column_names(rows[0])), several)
    if not is_json:
        return FileFormat("text", by_name=False)
    try:
        row: Any = json.loads(content) if is_whole else None
    except (ValueError, RecursionError):  # reported by its reader
        row = None
    columns = frozenset(column_names(row)) if isinstance(row, dict) else None
    return FileFormat("json_object", by_name=False, columns=columns, is_table=False)


def _object(line: bytes) -> dict[str, Any] | Literal[True] | None:
    """Returns the object on a line; True if it is nested too deeply to tell, None if there is no object."""
    try:
        row = json.loads(line.decode())
    except RecursionError:
        return True
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
