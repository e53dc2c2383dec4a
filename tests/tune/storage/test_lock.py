"""One run at a time on a results directory; a second one is refused at once."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from tune.storage import lock
from tune.storage.lock import LOCK_FILE, PID_FILE, ResultsLock, ResultsLocked, is_locked, refuse_if_running

MESSAGE = rf"in use by another run \(process {os.getpid()}\)"


def test_a_second_lock_is_refused_at_once_with_the_holders_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ACQUIRE_TIMEOUT", 3600.0)  # so that a test that waits is noticed
    first, second = ResultsLock(tmp_path), ResultsLock(tmp_path)
    first.acquire()
    with pytest.raises(ResultsLocked, match=MESSAGE):
        second.acquire()
    with pytest.raises(ResultsLocked, match=MESSAGE):
        refuse_if_running(tmp_path)
    first.release()
    refuse_if_running(tmp_path)
    second.acquire()
    second.release()


def test_a_lock_without_a_process_id_is_waited_for(tmp_path: Path) -> None:
    reader = FileLock(tmp_path / LOCK_FILE, thread_local=False)
    reader.acquire()
    end = threading.Timer(0.2, reader.release)
    end.start()
    waiting = ResultsLock(tmp_path)
    waiting.acquire()
    waiting.release()
    end.join()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from tune.storage import lock
from tune.storage.lock import ResultsLock
ResultsLock(Path({str(tmp_path)!r})).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert (tmp_path / PID_FILE).exists() and not is_locked(tmp_path)
    refuse_if_running(tmp_path)
    next_run = ResultsLock(tmp_path)
    next_run.acquire()
    assert int((tmp_path / PID_FILE).read_text()) == os.getpid()
    next_run.release()


def test_looking_for_a_lock_creates_nothing(tmp_path: Path) -> None:
    refuse_if_running(tmp_path / "none")
    assert not is_locked(tmp_path / "none") and not (tmp_path / "none").exists()


def test_a_second_command_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("campaign: one\nphases: []\n")
    program = f"""
import sys, run_campaign
code = run_campaign.main([{str(tmp_path / "one.yaml")!r}, "--out", {str(tmp_path)!r}])
print(code, "torch" in sys.modules)
"""
    running = ResultsLock(tmp_path / "one")
    running.acquire()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    running.release()
    assert done.stdout == "3 False\n" and f"(process {os.getpid()})" in done.stderr
