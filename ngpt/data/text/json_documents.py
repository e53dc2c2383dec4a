"""Reads documents from JSON: one object a line, an array of objects, or a single object."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ngpt.config.base import ConfigError, printable
from ngpt.data.text.streams import BOM, MAX_DOCUMENT, open_stream, read_lines, too_large, utf8_error

SEPARATOR = "."  # between the names of a nested column
SPACE = " \t\r\n"  # what JSON allows between values
PIECE = 1 << 20  # bytes of an array to read at once


def read_json_lines(path: Path, column: str) -> Iterator[str | None]:
    """Yields the text of each line; None for a null. ConfigError with the line if one is invalid."""
    offset = 0
    with open_stream(path) as stream:
        for number, line in enumerate(read_lines(stream, path), start=1):
            content = line.removeprefix(BOM) if number == 1 else line
            if content.strip():
                yield _text_of(_parse(content, f"{path}, line {number}", offset + len(line) - len(content)), column)
            offset += len(line)


def read_json_array(path: Path, column: str) -> Iterator[str | None]:
    """Yields the text of each object of an array, without reading it all at once."""
    with open_stream(path) as stream:
        for number, item in enumerate(_items(path, stream), start=1):
            yield _text_of((item, f"{path}, item {number}"), column)


def read_json_object(path: Path, column: str) -> Iterator[str | None]:
    """Yields the text of the one object in a file."""
    with open_stream(path) as stream:
        content = stream.read(MAX_DOCUMENT + 1)
    if len(content) > MAX_DOCUMENT:
        raise too_large(path)
    yield _text_of(_parse(content.removeprefix(BOM), str(path), 0), column)


def column_names(row: Any, prefix: str = "", depth: int = 4) -> Iterator[str]:
    """Yields the dotted names of the values in a row, such as `id` and `meta.text`."""
    for name, value in row.items():
        if isinstance(value, dict) and value and depth:
            yield from column_names(value, f"{prefix}{name}{SEPARATOR}", depth - 1)
        else:
            yield f"{prefix}{name}"


def missing_column(where: object, column: str, names: list[str]) -> ConfigError:
    """The error for a file, line or item without the column, which lists what there is."""
    found = printable(", ".join(names)) or "nothing"
    advice = "" if not names else "; data.text_column (--text-column) names another"
    return ConfigError(f"{where} has no text under {column!r}; it has {found}{advice}")


def _items(path: Path, stream: IO[bytes]) -> Iterator[Any]:
    """Yields the items of a JSON array that is too large to parse at once."""
    to_text = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = json.JSONDecoder()
    buffer, at, number, is_first = "", 0, 1, True

    def fill(least: int) -> bool:
        """Reads on, and forgets what was used; returns False at the end of the file."""
        nonlocal buffer, at
        block, more = b" ", ""
        while block and not more:  # a few bytes may be no whole character
            block = stream.read(max(PIECE, least))
            try:
                more = to_text.decode(block, final=not block)
            except UnicodeDecodeError:
                raise utf8_error(path) from None
        buffer, at = buffer[at:] + more, 0
        return bool(more)

    def next_sign() -> str:
        """Skips white space and returns the next character; empty at the end of the file."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in SPACE:
                at += 1
            if at < len(buffer) or not fill(0):
                return buffer[at : at + 1]

    if next_sign() != "[":
        raise ConfigError(f"{path} is not a JSON array")
    at += 1
    while (sign := next_sign()) != "]" or not is_first:
        where = f"{path}, item {number}"
        if not sign:
            raise ConfigError(f"{where}: the file ends before the array does")
        while True:
            try:
                item, end = decoder.raw_decode(buffer, at)
                break
            except RecursionError:
                raise ConfigError(f"{where} is nested too deeply") from None
            except ValueError as error:  # as a rule, the item goes on in what has not been read yet
                if len(buffer) - at > MAX_DOCUMENT:
                    raise too_large(where) from None
                if not fill(len(buffer) - at):
                    raise ConfigError(f"{where}: {_one_line(error)}") from None
        yield item
        at, number, is_first = end, number + 1, False
        if (sign := next_sign()) == "]":
            break
        if sign != ",":
            raise ConfigError(f"{where}: {'no comma' if sign else 'the file ends'} after it")
        at += 1
    at += 1
    if next_sign():
        raise ConfigError(f"{path} goes on after the end of its array")


def _parse(content: bytes, where: str, offset: int) -> tuple[Any, str]:
    """Parses a value that starts at byte `offset` of a file, and returns it with `where`."""
    try:
        return json.loads(content.decode()), where
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text: {error.reason} at byte {offset + error.start} of the file"
    except RecursionError:
        reason = "is nested too deeply"
    except ValueError as error:
        reason = f"is not JSON: {_one_line(error)}"
    raise ConfigError(f"{where} {reason}")


def _text_of(found: tuple[Any, str], column: str) -> str | None:
    """Returns the text under `column`, or under `b` of `a` for a column `a.b`; None if it is null."""
    row, where = found
    if not isinstance(row, dict):
        raise ConfigError(f"{where} has no text under {column!r}; it is {printable(repr(row), 40)}")
    value: Any = row
    for part in [column] if column in row else column.split(SEPARATOR):
        if not isinstance(value, dict) or part not in value:
            raise missing_column(where, column, list(column_names(row)))
        if (value := value[part]) is None:
            return None
    if not isinstance(value, str):
        raise ConfigError(f"{where} has no text under {column!r}; it is {printable(repr(value), 40)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # an escaped half of a surrogate pair
        raise ConfigError(f"{where} is not valid text: {error.reason}") from None
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
