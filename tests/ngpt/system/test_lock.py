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
