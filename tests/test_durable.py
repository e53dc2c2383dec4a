"""Writes that survive a crash."""

import json
import os
from pathlib import Path

import pytest

from ngpt.durable import append_line, commit_folder, make_folder, write_atomic, write_json


@pytest.fixture
def disk_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("data", [b"\x00\xff\n", "naïve ∑\r\n", "", b""])
def test_what_is_written_is_read_back(tmp_path: Path, data: bytes | str) -> None:
    write_atomic(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, disk_full: None) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "a").symlink_to(target)
    write_atomic(tmp_path / "a", "new")
    assert target.read_text() == "mine" and (tmp_path / "a").read_text() == "new"


def test_the_file_and_then_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_atomic(tmp_path / "a", "x")
    assert Path(synced[0]).parent == tmp_path and synced[0].endswith(".tmp")
    assert synced[1:] == [str(tmp_path)]


def test_json_is_sorted_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None], "a": 0.1})
    assert json.loads(path.read_text()) == {"a": 0.1, "b": [1, None]}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["a"] == 0.1


def test_appended_lines_are_on_disk_before_the_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("a") as file:
        append_line(file, "one")
        append_line(file, "two")
        assert (tmp_path / "log").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("line", ["a\nb", "a\r"])
def test_a_line_with_a_line_break_is_refused(tmp_path: Path, line: str) -> None:
    with (tmp_path / "log").open("a") as file, pytest.raises(ValueError, match="line break"):
        append_line(file, line)
    assert (tmp_path / "log").read_text() == ""


def test_a_committed_folder_has_all_its_files_and_no_other_name(tmp_path: Path) -> None:
    temp = tmp_path / "temp"
    (temp / "inner").mkdir(parents=True)
    (temp / "inner" / "a").write_text("x")
    commit_folder(temp, tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"]
    assert (tmp_path / "final" / "inner" / "a").read_text() == "x"


def test_a_folder_that_cannot_be_synced_is_not_committed(tmp_path: Path, disk_full: None) -> None:
    (tmp_path / "temp").mkdir()
    with pytest.raises(OSError, match="No space"):
        commit_folder(tmp_path / "temp", tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_folder_is_never_committed_over_another(tmp_path: Path) -> None:
    for name in ("temp", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    with pytest.raises(OSError):
        commit_folder(tmp_path / "temp", tmp_path / "final")
    assert os.listdir(tmp_path / "final") == ["final"]


def test_a_folder_is_made_with_its_parents_and_each_name_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 3


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "a" / "b")
