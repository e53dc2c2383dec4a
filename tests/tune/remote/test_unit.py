"""What belongs to a unit of the results, and what a store may say about it."""

from pathlib import Path

import pytest

from tune.remote.store import ObjectStore
from tune.remote.unit import (
    DamagedUnit,
    complete_lines,
    is_checkpoint,
    read_digests,
    read_stamps,
    scan,
    write_digests,
    write_stamps,
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_files_of_trials_locks_and_temporary_files_do_not_belong_to_the_root(tmp_path: Path) -> None:
    write(tmp_path, "journal.jsonl", "alpha/summary.json", "trials/a/metrics.jsonl", "discarded/b/x", "campaign.lock")
    write(tmp_path, ".probe-1/token", ".summary.json.1.tmp", "alpha/.x.tmp")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert scan(tmp_path, is_root=True).keys() == {"journal.jsonl", "alpha/summary.json"}


def test_a_heartbeat_and_an_unfinished_checkpoint_do_not_belong_to_a_trial(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", "heartbeat", "stop", "checkpoints/.tmp-1/state.pt", "checkpoints/step_1/state.pt")
    found = scan(tmp_path, is_root=False)
    assert found.keys() == {"metrics.jsonl", "checkpoints/step_1/state.pt"}
    assert [path for path in found if is_checkpoint(path)] == ["checkpoints/step_1/state.pt"]


def test_a_folder_that_has_gone_has_no_files(tmp_path: Path) -> None:
    assert scan(tmp_path / "gone", is_root=False) == {}
    assert complete_lines(tmp_path / "gone") == b""


def test_a_line_that_is_being_written_is_not_complete(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b'{"a": 1}\n{"b"')
    assert complete_lines(tmp_path / "journal.jsonl") == b'{"a": 1}\n'


def test_digests_and_stamps_are_read_as_they_were_written(tmp_path: Path, store: ObjectStore) -> None:
    write_digests(store, "trials/a", {"x": ["1", "2"]})
    assert read_digests(store, "trials/a") == {"x": ["1", "2"]}
    assert read_digests(store, "trials/b") is None
    (tmp_path / "trials/a").mkdir(parents=True)
    write_stamps(tmp_path, "trials/a", {"x": (1, 2), "only/there": None})
    assert read_stamps(tmp_path, "trials/a") == {"x": (1, 2), "only/there": None}


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "trials/b/x", ".bashrc", "a//b", ""])
def test_a_path_that_leads_out_of_its_unit_is_ignored(store: ObjectStore, path: str) -> None:
    """Whoever may write to the store could have written it."""
    write_digests(store, "", {path: ["1"], "journal.jsonl": ["2"]})
    assert read_digests(store, "") == {"journal.jsonl": ["2"]}


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"[" * 100_000, b'{"format": 1}', b'{"format": 1, "files": [1]}', b'{"format": 2}', b"\xff"]
)
def test_digests_that_make_no_sense_are_an_error(store: ObjectStore, raw: bytes) -> None:
    """Else a campaign would begin anew in the place of one that is there."""
    store.write("trials/a/.digests.json", raw)
    with pytest.raises(DamagedUnit, match=r"trials/a/\.digests\.json is damaged, or written by another version"):
        read_digests(store, "trials/a")
