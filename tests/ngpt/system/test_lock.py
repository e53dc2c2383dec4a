"""One process at a time writes to a folder; a second one is refused at once."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from ngpt.system import lock
from ngpt.system.lock import FolderLock, FolderLocked, is_locked, refuse_if_locked

MESSAGE = rf"in use by another run \(process {os.getpid()}\)"


def test_a_second_lock_is_refused_at_once_with_the_holders_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ACQUIRE_TIMEOUT", 3600.0)  # so that a test that waits is noticed
    first, second = FolderLock(tmp_path, "run"), FolderLock(tmp_path, "run")
    first.acquire()
    with pytest.raises(FolderLocked, match=MESSAGE):
        second.acquire()
    with pytest.raises(FolderLocked, match=MESSAGE):
        refuse_if_locked(tmp_path, "run")
    first.release()
    refuse_if_locked(tmp_path, "run")
    second.acquire()
    second.release()


def test_a_lock_without_a_process_id_is_waited_for(tmp_path: Path) -> None:
    reader = FileLock(tmp_path / "run.lock", thread_local=False)
    reader.acquire()
    end = threading.Timer(0.2, reader.release)
    end.start()
    waiting = FolderLock(tmp_path, "run")
    waiting.acquire()
    waiting.release()
    end.join()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from ngpt.system.lock import FolderLock
FolderLock(Path({str(tmp_path)!r}), "run").acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert (tmp_path / "run.pid").exists() and not is_locked(tmp_path, "run")
    refuse_if_locked(tmp_path, "run")
    next_run = FolderLock(tmp_path, "run")
    next_run.acquire()
    assert int((tmp_path / "run.pid").read_text()) == os.getpid()
    next_run.release()


def test_looking_for_a_lock_creates_nothing(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / "none", "run")
    assert not is_locked(tmp_path / "none", "run") and not (tmp_path / "none").exists()


def test_looking_for_a_lock_needs_no_right_to_write_and_opens_no_link(tmp_path: Path) -> None:
    folder, victim = tmp_path / "results", tmp_path / "bashrc"
    running = FolderLock(folder, "run")
    running.acquire()
    (folder / "run.lock").chmod(0o444)
    assert is_locked(folder, "run")
    running.release()
    assert not is_locked(folder, "run")
    victim.write_text("alias ll='ls -l'\n")
    (folder / "run.lock").unlink()
    (folder / "run.lock").symlink_to(victim)
    assert not is_locked(folder, "run")
    with pytest.raises(OSError, match="it is a link"):
        FolderLock(folder, "run").acquire()
    assert victim.read_text() == "alias ll='ls -l'\n"
    for name in ("run.lock", "run.pid"):  # a plain open would wait for a writer
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    refuse_if_locked(folder, "run")
    assert not is_locked(folder, "run")


def test_a_lock_that_may_not_be_read_is_judged_by_the_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.lock").touch()
    open_any = os.open

    def open_others(path: Path, *more: int) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied")
        return open_any(path, *more)

    monkeypatch.setattr(os, "open", open_others)
    assert not is_locked(tmp_path, "run")
    (tmp_path / "run.pid").write_text(f"{os.getpid()}\n")
    assert is_locked(tmp_path, "run")
    (tmp_path / "run.pid").write_text("9" * 40)
    assert not is_locked(tmp_path, "run")


def test_temporary_files_behind_a_link_stay(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".mine.tmp").touch()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "alpha").symlink_to(tmp_path / "elsewhere")
    with FolderLock(tmp_path / "results", "run"):
        assert (tmp_path / "elsewhere" / ".mine.tmp").exists()
