"""The place of the cache, what is said if it cannot be used, and which code in it is trusted."""

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from ngpt.system import cache
from ngpt.system.cache import cache_folder, code_folder, code_folder_problem
from ngpt.system.cli import EXIT_IO, run_command


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, still empty; temporary folders go beside it."""
    folder, temporary = tmp_path / "cache", tmp_path / "tmp"
    for path in (folder, temporary):
        path.mkdir()
        path.chmod(0o755)
    monkeypatch.setenv("NGPT_CACHE", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    cache._code_folder.cache_clear()
    yield folder
    cache._code_folder.cache_clear()


def test_code_is_kept_in_a_folder_of_the_cache_that_only_its_user_can_enter(shared: Path) -> None:
    before = os.umask(0)
    try:
        assert code_folder("native") == shared / "native"
    finally:
        os.umask(before)
    assert (shared / "native").stat().st_mode & 0o777 == 0o700


def close_to_others(folder: Path, place: str) -> Path:
    """Makes one part of the cache writable by others; returns it."""
    path = {"cache": folder, "folder": folder / "native", "file": folder / "native" / "a.so"}[place]
    (folder / "native").mkdir(mode=0o755)
    (folder / "native" / "a.so").touch(0o644)
    path.chmod(0o777)
    return path


@pytest.mark.parametrize("place", ["cache", "folder", "file"])
def test_code_that_others_could_have_written_is_not_used_and_the_reason_is_said_once(
    place: str, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = close_to_others(shared, place)
    with caplog.at_level(logging.WARNING):
        folder = code_folder("native")
        assert code_folder("native") == folder
    assert folder.parent == shared.parent / "tmp" and folder.stat().st_mode & 0o777 == 0o700
    (line,) = caplog.messages
    assert line.startswith(f"{path} can be written by other users (mode 0777): ") and "set NGPT_CACHE" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize("place", ["cache", "folder", "file"])
def test_code_that_belongs_to_another_user_is_not_used(place: str, shared: Path) -> None:
    path = close_to_others(shared, place)
    path.chmod(0o755)
    os.chown(path, 54321, 54321)
    assert code_folder_problem(shared / "native") == f"{path} belongs to user 54321"
    assert code_folder("native").parent == shared.parent / "tmp"


def test_a_cache_that_cannot_be_written_keeps_no_code(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shared and access(path, mode))
    assert code_folder_problem(shared / "native") == f"{shared} is not writable"
    assert code_folder("native").parent == shared.parent / "tmp"
    assert list(shared.iterdir()) == []


# ---- no home directory -----------------------------------------------------------------------------------------------


def read_only(path: Path) -> int:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.mark.parametrize("failed", ["", ".cache", ".cache/ngpt", ".cache/ngpt/corpus/tokens.bin"])
def test_a_home_that_cannot_be_written_is_an_error_that_names_the_variable(
    failed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NGPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_command(lambda: read_only(tmp_path / failed)) == EXIT_IO
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / failed}: Read-only file system; the cache is {tmp_path}/.cache/ngpt: ")
    assert "set NGPT_CACHE to a folder" in said and said.count("\n") == 1


def test_an_error_outside_the_cache_gives_no_advice_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "data" / "cache"))
    for path in (tmp_path / "data", tmp_path / "results", tmp_path / "data" / "cache2"):
        assert run_command(lambda path=path: read_only(path)) == EXIT_IO
        assert capsys.readouterr().err == f"{path}: Read-only file system\n"


def test_a_user_without_a_home_directory_is_told_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NGPT_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and without an account
    with pytest.raises(ConfigError, match="no home directory for the cache: set NGPT_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("NGPT_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
