"""JSON-lines files in the cache. A damaged line loses one measurement and is not an error."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends records to `path`, creating it and its folder. Starts a new line if the last one is incomplete."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_json_lines(path: Path, *, fields: Collection[str]) -> list[dict[str, Any]]:
    """Returns the records that have all of `fields`, oldest first; none if `path` is missing. Skips damaged lines."""
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
