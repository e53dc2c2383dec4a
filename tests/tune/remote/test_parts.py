"""What a worker sends of the files of its trial is, on the host of the run, what it has."""

import os
from pathlib import Path

import pytest

from tests.helpers.stored_results import write
from tune.remote.parts import FilePart, PartReader, write_parts


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder of the trial on the worker's host."""
    write(tmp_path / "there/metrics.jsonl", "row 1\n")
    return tmp_path / "there"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


def test_logs_grow_by_what_is_new(there: Path, here: Path) -> None:
    reader = PartReader(there)
    write_parts(here, reader.read(everything=False))
    with (there / "metrics.jsonl").open("a") as file:
        file.write("row 2\nhalf a ro")
    assert reader.read(everything=False) == [FilePart("metrics.jsonl", 6, b"row 2\n")]
    assert reader.read(everything=False) == []
    with (there / "metrics.jsonl").open("a") as file:
        file.write("w\n")
    (part,) = reader.read(everything=False)
    write_parts(here, [FilePart("metrics.jsonl", 6, b"row 2\n"), part])
    assert (here / "metrics.jsonl").read_text() == (there / "metrics.jsonl").read_text() == "row 1\nrow 2\nhalf a row\n"


def test_a_log_that_was_rewritten_is_sent_whole(there: Path, here: Path) -> None:
    """As when a run rolls back and drops rows."""
    reader = PartReader(there)
    write(there / "metrics.jsonl", "row 1\nrow 2\n")
    write_parts(here, reader.read(everything=False))
    write(there / "new", "row 1\nother row 2\nrow 3\n")
    os.replace(there / "new", there / "metrics.jsonl")
    write_parts(here, reader.read(everything=False))
    assert (here / "metrics.jsonl").read_text() == "row 1\nother row 2\nrow 3\n"


def test_everything_is_all_but_checkpoints_and_signs_of_life(there: Path, here: Path) -> None:
    for name in ("config.json", "wandb/run-1/run.wandb", "checkpoints/step_0000010/state.pt", "heartbeat", ".owner"):
        write(there / name, name)
    write_parts(here, PartReader(there).read(everything=True))
    found = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert found == {"config.json", "metrics.jsonl", "wandb/run-1/run.wandb"}


def test_rows_without_those_before_them_are_an_error(here: Path) -> None:
    with pytest.raises(OSError, match="its first 6 bytes have not come"):
        write_parts(here, [FilePart("metrics.jsonl", 6, b"row 2\n")])
