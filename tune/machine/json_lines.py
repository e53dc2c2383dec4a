"""JSON-lines files in the cache. A line that cannot be used loses one measurement and is not an error."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ngpt.system.atomic_files import naming
from ngpt.system.cache import warn_once

Record = TypeVar("Record")


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records to `path`, creating it and its folder. Starts a new line if the last one is incomplete."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            text = "\n" + text
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def read_json_lines(path: Path, parse: Callable[[str], Record]) -> list[Record]:
    """Returns `parse(line)` of each line, oldest first; none if `path` is missing.

    Lines that `parse` refuses with a ValueError are skipped. A process warns once about them.
    """
    if not path.is_file():
        return []
    with naming(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: list[Record] = []
    refused: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            records += [parse(line)] if line else []
        except ValueError:
            refused.append(number)
    if refused:
        others = f", and {len(refused) - 1} more" if refused[1:] else ""
        text = f"line {refused[0]}{others}: not a record of this version; delete the file to be rid of it"
        warn_once(f"{path}: ignored what cannot be used", text)
    return records
