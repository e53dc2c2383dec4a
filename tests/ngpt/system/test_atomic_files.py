"""Writes that survive a crash."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ngpt.system.atomic_files import (
    LineFile,
    commit_folder,
    describe_os_error,
    make_folder,
    move_folder,
    naming,
    remove_folder,
    remove_temporary_files,
    sync,
    write_atomic,
    write_json,
)


@pytest.fixture
def disk_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("data", [b"\x00\xff\n", "naïve ∑\r\n", "", b""])
def test_written_content_is_read_back(tmp_path: Path, data: bytes | str) -> None:
    write_atomic(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path: Path, disk_full: None) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_atomic(folder / "a", "x"),
        lambda folder: write_json(folder / "a", {}),
        lambda folder: make_folder(folder / "a"),
        lambda folder: LineFile(folder / "a"),
        lambda folder: sync(folder / "old"),
    ],
)
def test_an_error_of_the_disk_names_the_file_or_its_folder(
    write: Callable[[Path], object], tmp_path: Path, disk_full: None
) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(OSError, match="No space") as caught:
        write(tmp_path)
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert describe_os_error(caught.value, "elsewhere") == f"{caught.value.filename}: No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_line_that_does_not_fit_names_its_file() -> None:
    file = LineFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space") as caught:
        file.append("a line")
    assert caught.value.filename == "/dev/full"
    file.close()


def test_an_error_that_has_a_path_keeps_it() -> None:
    with pytest.raises(FileNotFoundError) as caught, naming("outer"), open("/missing/file"):
        pass
    assert caught.value.filename == "/missing/file"
    assert describe_os_error(OSError("out/x is damaged"), "out") == "out/x is damaged"
    assert describe_os_error(OSError(5, "Input/output error"), "out") == "out: Input/output error"


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


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[LineFile]:
    file = LineFile(tmp_path / "log")
    yield file
    file.close()


def test_an_appended_line_is_in_the_file_at_once(tmp_path: Path, lines: LineFile) -> None:
    lines.append("one")
    lines.append("zwöi")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nzwöi\n"


def test_a_new_file_of_lines_has_its_name_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    file = LineFile(tmp_path / "log")
    file.append("one")
    file.sync()
    file.close()
    assert synced == [str(tmp_path), str(tmp_path / "log")]


@pytest.mark.parametrize("line", ["a\nb", "a\r"])
def test_a_line_with_a_line_break_is_refused(tmp_path: Path, lines: LineFile, line: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        lines.append(line)
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("is_mended", [True, False])
def test_a_disk_that_fills_up_in_the_middle_of_a_line_costs_that_line_only(
    tmp_path: Path, lines: LineFile, monkeypatch: pytest.MonkeyPatch, is_mended: bool
) -> None:
    lines.append("one")
    real = lines._file

    class Full:
        def write(self, data: memoryview) -> int:
            if len(data) < 3:
                raise OSError(28, "No space left on device")
            return real.write(data[:2]) or 0

        def truncate(self, size: int) -> None:
            if not is_mended:
                raise OSError(5, "Input/output error")
            real.truncate(size)

    with monkeypatch.context() as patch:
        patch.setattr(lines, "_file", Full())
        with pytest.raises(OSError, match="No space"):
            lines.append("two")
    assert (tmp_path / "log").read_text() == ("one\n" if is_mended else "one\ntw")
    lines.append("three")
    assert (tmp_path / "log").read_text() == "one\nthree\n"


def test_the_newest_line_can_be_removed(tmp_path: Path, lines: LineFile) -> None:
    for line in ("one", "zwöi", "three"):
        lines.append(line)
    lines.remove_last("three")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nzwöi\n"


@pytest.mark.parametrize("crash_at", range(5))
def test_a_crash_while_a_folder_is_removed_leaves_it_whole_or_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    (tmp_path / "step").mkdir()
    for name in "ab":
        (tmp_path / "step" / name).write_text("x")
    calls = iter(range(9))

    def crashing(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            if next(calls) == crash_at:
                raise OSError(5, "Input/output error")
            real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "fsync", "unlink", "rmdir"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        with pytest.raises(OSError, match="Input/output"):
            remove_folder(tmp_path / "step", aside_name=".gone")
    assert not (tmp_path / "step").exists() or sorted(os.listdir(tmp_path / "step")) == ["a", "b"]


def test_a_folder_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "step" / "inner").mkdir(parents=True)
    (tmp_path / "step" / "inner" / "a").write_text("x")
    remove_folder(tmp_path / "step", aside_name=".gone")
    assert os.listdir(tmp_path) == []


def test_only_temporary_files_of_killed_writes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a.json", "old")
    with monkeypatch.context() as patch:  # as when the process is gone before it can clean up
        patch.setattr(Path, "replace", lambda *_: exit())
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            write_atomic(tmp_path / "a.json", "new")
    assert len(os.listdir(tmp_path)) == 2
    remove_temporary_files(tmp_path)
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_a_folder_whose_new_name_cannot_be_synced_does_not_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temp").mkdir()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path):
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        commit_folder(tmp_path / "temp", tmp_path / "final")
    assert os.listdir(tmp_path) == ["temp"]


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


def test_a_moved_folder_has_its_new_place_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trials" / "one").mkdir(parents=True)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    move_folder(tmp_path / "trials" / "one", tmp_path / "discarded" / "one-7")
    assert (os.listdir(tmp_path / "trials"), os.listdir(tmp_path / "discarded")) == ([], ["one-7"])
    assert synced[-2:] == [str(tmp_path / "discarded"), str(tmp_path / "trials")]


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "a" / "b")
