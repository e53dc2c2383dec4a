"""The processes of a campaign are found by their mark and killed; no others are."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tune.executors.orphans import RESULTS_VARIABLE, is_alive, kill_marked, mark_children, marked_processes

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# A child in its own session, which outlives its parent and is adopted by another process.
ORPHAN = [sys.executable, "-c", f"import subprocess; subprocess.Popen({SLEEP!r}, start_new_session=True)"]


@pytest.fixture
def popen(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes; none of them outlives the test, also if it fails."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    yield start
    kill_marked(tmp_path)
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[psutil.Process]:
    """A process of the same name with the mark of another directory, whose path begins with the same text."""
    environment = os.environ | {RESULTS_VARIABLE: str(tmp_path.resolve()) + "-other"}
    with subprocess.Popen(SLEEP, env=environment) as process:
        yield psutil.Process(process.pid)
        process.kill()


@pytest.mark.parametrize("mark", [None, "/results/of/another/campaign"])
def test_the_mark_of_this_process_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str | None
) -> None:
    """A campaign may be started by a process of another one."""
    monkeypatch.delenv(RESULTS_VARIABLE, raising=False)
    if mark is not None:
        monkeypatch.setenv(RESULTS_VARIABLE, mark)
    with mark_children(tmp_path):
        assert os.environ[RESULTS_VARIABLE] == str(tmp_path.resolve())
    assert os.environ.get(RESULTS_VARIABLE) == mark


def test_marked_processes_and_their_orphans_are_killed_and_no_others(
    tmp_path: Path, bystander: psutil.Process, popen: Callable[..., subprocess.Popen[bytes]]
) -> None:
    with mark_children(tmp_path):
        child = popen(SLEEP)
        subprocess.run(ORPHAN, check=True)
    assert RESULTS_VARIABLE not in os.environ
    found = marked_processes(tmp_path)
    assert len(found) == 2 and child.pid in {process.pid for process in found}
    assert kill_marked(tmp_path) == 2
    child.wait()
    assert not any(map(is_alive, found)) and marked_processes(tmp_path) == [] and kill_marked(tmp_path) == 0
    assert is_alive(bystander)


# A child without the mark in its environment, like the processes of Ray's dashboard, which overwrite theirs.
UNMARKED = f"import subprocess; subprocess.Popen({SLEEP!r}, env={{}}); print(flush=True); import time; time.sleep(600)"


@pytest.mark.parametrize("parent_lives", [True, False])
def test_a_process_without_its_mark_is_found_through_its_parent(
    tmp_path: Path, popen: Callable[..., subprocess.Popen[bytes]], parent_lives: bool
) -> None:
    with mark_children(tmp_path):
        parent = popen([sys.executable, "-c", UNMARKED], stdout=subprocess.PIPE)
    assert parent.stdout and parent.stdout.readline()
    found = marked_processes(tmp_path)
    assert len(found) == 2
    if not parent_lives:
        parent.kill()
        parent.wait()
        assert marked_processes(tmp_path) == []
    assert kill_marked(tmp_path, found) == (2 if parent_lives else 1)
    parent.wait()
    assert not any(map(is_alive, found))


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    for _ in range(600):
        if not is_alive(process):
            break
        try:
            process.wait(0.05)
        except psutil.TimeoutExpired:
            continue
    assert not is_alive(process)
    child.wait()
    assert not is_alive(process)
