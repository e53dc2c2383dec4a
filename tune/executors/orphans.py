"""Finds and kills the processes that a campaign has started, also those that outlive it.

Ray starts a dozen processes and one worker per slot. Some outlive a killed parent for a minute, and such a worker would
keep writing into the results. A list of process ids misses those started last, and ids are reused. So everything that a
campaign starts inherits an environment variable with the path of its results. Only the holder of the results' lock may
kill what carries that mark.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

RESULTS_VARIABLE = "NGPT_CAMPAIGN_RESULTS"  # holds the resolved path of the results directory
KILL_TIMEOUT = 10.0  # seconds for killed processes to disappear


@contextlib.contextmanager
def mark_children(root: Path) -> Iterator[None]:
    """Marks every process started in this block, and all that those start, as belonging to the results in `root`."""
    os.environ[RESULTS_VARIABLE] = str(root.resolve())
    try:
        yield
    finally:
        del os.environ[RESULTS_VARIABLE]


def marked_processes(root: Path) -> list[psutil.Process]:
    """The living processes of this user with the mark of `root`, and their descendants, without this process.

    A process may overwrite its environment with its title, as those of Ray's dashboard do. It is then found as a
    descendant, for as long as its parent lives.
    """
    mark, found = str(root.resolve()), dict[int, psutil.Process]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RESULTS_VARIABLE) == mark:
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if is_alive(process)]


def kill_marked(root: Path, also: Iterable[psutil.Process] = ()) -> int:
    """Kills every process with the mark of `root` and waits until they are gone; returns how many there were.

    `also` are further processes to kill: those found while their parents were alive.
    """
    killed = 0
    known = list(also)
    while processes := {*marked_processes(root), *filter(is_alive, known)}:  # again, for those that were starting
        known.clear()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil does not confuse it with a later one of that id
                process.kill()
        killed += len(processes)
        deadline = time.monotonic() + KILL_TIMEOUT
        while any(map(is_alive, processes)):
            if time.monotonic() > deadline:  # stuck in the kernel, behind a dead disk or driver
                return killed
            time.sleep(0.02)
    return killed


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs: neither gone, nor a zombie, nor replaced by another one with its id."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
