"""Reads documents from a column of CSV and TSV files, with quotes as in RFC 4180; the first line names the columns.

A CSV file may also be divided by semicolons, as spreadsheets do where the comma is decimal, or by tabs: by the first of
these that divides its first line.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from ngpt.config.base import ConfigError
from ngpt.data.text.json_documents import missing_column
from ngpt.data.text.streams import BOM, MAX_DOCUMENT, open_stream, read_lines, too_large, utf8_error

DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}  # by suffix: the usual one first


def read_delimited(path: Path, column: str, delimiters: tuple[str, ...]) -> Iterator[str | None]:
    """Yields the text of each row. ConfigError with the line if one is invalid or has another number of columns."""
    delimiter, _ = _first_row(path, delimiters)
    csv.field_size_limit(max(MAX_DOCUMENT, csv.field_size_limit()))  # of the process; the default is 128 KiB
    rows = read_rows(path, delimiter)
    _, names = next(rows, (1, []))
    if column not in names:
        raise missing_column(path, column, names)
    if (count := names.count(column)) > 1:
        raise ConfigError(f"{path} has {count} columns {column!r}")
    index = names.index(column)
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) != len(names):
            raise ConfigError(f"{where} has {len(row)} columns, the first line {len(names)}")
        if "\0" in row[index]:
            raise ConfigError(f"{where} is not text: it has zero bytes in it")
        if len(row[index]) > MAX_DOCUMENT:
            raise too_large(where)
        yield row[index]


def delimited_columns(path: Path, delimiters: tuple[str, ...]) -> frozenset[str] | None:
    """The names of the columns; None if they cannot be read, which reading the file reports."""
    _, names = _first_row(path, delimiters)
    return None if names is None else frozenset(names)


def _first_row(path: Path, delimiters: tuple[str, ...]) -> tuple[str, list[str] | None]:
    """Returns the delimiter and the first row, or None in place of an invalid one."""
    rows = {sign: first_row(path, sign) for sign in delimiters}
    return next(((sign, row) for sign, row in rows.items() if len(row or ()) > 1), (delimiters[0], rows[delimiters[0]]))


def first_row(path: Path, delimiter: str) -> list[str] | None:
    """The first row of a file, which names the columns; None if it is invalid."""
    try:
        return next((row for row in csv.reader(_lines(path), delimiter=delimiter, strict=True) if row), [])
    except csv.Error:
        return None


def read_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the line where each row begins, and the row, without empty lines. ConfigError for one that is invalid."""
    rows, line = csv.reader(_lines(path), delimiter=delimiter, strict=True), 1
    try:
        for row in rows:
            if row:
                yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            raise too_large(f"{path}, line {line}") from None
        reason = "a quote is not closed" if "end of data" in str(error) else str(error)
        raise ConfigError(f"{path}, line {line} is not a row of {_kind(delimiter)}: {reason}") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, without its byte order mark."""
    with open_stream(path) as stream:
        for number, line in enumerate(read_lines(stream, path)):
            try:
                yield (line.removeprefix(BOM) if number == 0 else line).decode()
            except UnicodeDecodeError:
                raise utf8_error(path) from None


def _kind(delimiter: str) -> str:
    return "TSV" if delimiter == "\t" else "CSV"
