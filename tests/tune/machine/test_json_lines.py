"""Records in the cache survive a torn write and anything else that a line may hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from tune.machine.json_lines import append_json_lines, read_json_lines


def shape_of(line: str) -> Any:
    record = json.loads(line)
    if not isinstance(record, dict) or "shape" not in record:
        raise ValueError
    return record


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speeds.jsonl"
    assert read_json_lines(path, shape_of) == []
    append_json_lines(path, [{"shape": "a"}, {"shape": "b", "note": "é"}])
    append_json_lines(path, [])
    append_json_lines(path, [{"shape": "c"}])
    assert read_json_lines(path, shape_of) == [{"shape": "a"}, {"shape": "b", "note": "é"}, {"shape": "c"}]


def test_a_torn_last_line_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "speeds.jsonl"
    path.write_text('{"shape": "a"}\n{"sha')
    append_json_lines(path, [{"shape": "b"}])
    assert path.read_text() == '{"shape": "a"}\n{"sha\n{"shape": "b"}\n'
    assert read_json_lines(path, shape_of) == [{"shape": "a"}, {"shape": "b"}]


@pytest.mark.parametrize("line", ["", "[1]", "3", '{"other": 1}', "{", "\x00\x00", '"shape"'])
def test_a_line_that_is_not_such_a_record_is_skipped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "speeds.jsonl"
    path.write_bytes(line.encode() + b'\n\xff\n{"shape": "b"}\n')
    assert read_json_lines(path, shape_of) == [{"shape": "b"}]


def test_lines_of_another_version_are_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "speeds.jsonl"
    path.write_text('{"shape": "a"}\n{"other": 1}\n\n[1]\n{"shape": "b"}\n')
    for _ in range(2):
        assert read_json_lines(path, shape_of) == [{"shape": "a"}, {"shape": "b"}]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: ignored what cannot be used: line 2, and 1 more: ")
