"""One run at a time on a results directory; the second is answered at once."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tune.storage.lock import HOLDER, LOCK_FILE, PATIENCE, ResultsLock, ResultsLocked, is_locked, refuse_if_running

MESSAGE = rf"in use by another run \(process {os.getpid()}\)"


def test_the_second_is_told_who_has_it_and_does_not_wait(tmp_path: Path) -> None:
    first, second = ResultsLock(tmp_path), ResultsLock(tmp_path)
    first.acquire()
    start = time.monotonic()
    with pytest.raises(ResultsLocked, match=MESSAGE):
        second.acquire()
    assert time.monotonic() - start < PATIENCE / 2
    with pytest.raises(ResultsLocked, match=MESSAGE):
        refuse_if_running(tmp_path)
    first.release()
    refuse_if_running(tmp_path)
    second.acquire()
    second.release()


def test_who_only_looks_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    look = FileLock(tmp_path / LOCK_FILE, thread_local=False)
    look.acquire()
    end = threading.Timer(0.2, look.release)
    end.start()
    lock = ResultsLock(tmp_path)
    lock.acquire()
    lock.release()
    end.join()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from tune.storage.lock import ResultsLock
ResultsLock(Path({str(tmp_path)!r})).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert (tmp_path / HOLDER).exists() and not is_locked(tmp_path)
    refuse_if_running(tmp_path)
    lock = ResultsLock(tmp_path)
    lock.acquire()
    assert int((tmp_path / HOLDER).read_text()) == os.getpid()
    lock.release()


def test_a_place_without_a_lock_is_not_made(tmp_path: Path) -> None:
    refuse_if_running(tmp_path / "none")
    assert not is_locked(tmp_path / "none") and not (tmp_path / "none").exists()


def test_a_second_command_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("campaign: one\nphases: []\n")
    program = f"""
import sys, run_campaign
code = run_campaign.main([{str(tmp_path / "one.yaml")!r}, "--out", {str(tmp_path)!r}])
print(code, "torch" in sys.modules)
"""
    lock = ResultsLock(tmp_path / "one")
    lock.acquire()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lock.release()
    assert done.stdout == "3 False\n" and f"(process {os.getpid()})" in done.stderr
