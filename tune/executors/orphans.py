"""Finds and kills the processes that a campaign has started, including those that outlived it.

Some of Ray's processes outlive a killed parent by up to a minute, and a worker would keep writing into the results. A
list of process ids would miss the newest processes, and ids are reused. So every process that a campaign starts
inherits a mark, a variable with the path of its results. Only the process that holds their lock may kill by this mark.
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
    """Marks every process started in this block, and its descendants, as belonging to the results in `root`."""
    before = os.environ.get(RESULTS_VARIABLE)  # set if this process was started by another campaign
    os.environ[RESULTS_VARIABLE] = str(root.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ[RESULTS_VARIABLE]
        else:
            os.environ[RESULTS_VARIABLE] = before


def marked_processes(root: Path) -> list[psutil.Process]:
    """Returns the live processes of this user marked with `root`, and their descendants, except this process.

    A process that overwrites its environment with its title, as Ray's dashboard does, is found as a descendant while
    its parent lives.
    """
    mark, found = str(root.resolve()), dict[int, psutil.Process]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RESULTS_VARIABLE) == mark:
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if is_alive(process)]


def kill_marked(root: Path, also: Iterable[psutil.Process] = ()) -> int:
    """Kills every process marked with `root`, waits until they are gone and returns their number.

    `also` lists more processes to kill: descendants found earlier, whose parents may have died since.
    """
    killed = 0
    others = list(also)
    # Repeats until it finds none, to catch processes that were starting.
    while processes := {*marked_processes(root), *filter(is_alive, others)}:
        others.clear()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # also raised if the process id was reused
                process.kill()
        killed += len(processes)
        deadline = time.monotonic() + KILL_TIMEOUT
        while any(map(is_alive, processes)):
            if time.monotonic() > deadline:  # stuck in the kernel, waiting for a dead disk or driver
                return killed
            time.sleep(0.02)
    return killed


def is_alive(process: psutil.Process) -> bool:
    """Returns whether a process is running: it has not exited, is no zombie, and its id was not reused."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
