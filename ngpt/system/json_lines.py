"""JSON-lines files in the cache, one record a line: a torn or damaged line costs one measurement, never an error."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records to `path`, which is created with its folder. A torn last line is closed first."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_json_lines(path: Path, *, fields: Collection[str]) -> list[dict[str, Any]]:
    """The records of `path` that have all of `fields`, oldest first. Lines that cannot be read are skipped."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.keys() >= set(fields):
            records.append(record)
    return records
