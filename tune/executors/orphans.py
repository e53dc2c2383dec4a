"""The processes that a campaign started, found again by a mark that each of them carries, and ended.

Ray starts a dozen processes and a worker for each slot; some of them outlive a killed parent for a minute, and a worker
that outlives its campaign would go on to write into the results. A list of process ids has holes (what was started
last) and goes stale (numbers are given again). So what a campaign starts inherits a variable with the path of its
results, and is known by that, whatever it is called and whoever its parent has become. Only the holder of the results'
lock may end what carries their mark.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

MARK = "NGPT_CAMPAIGN_RESULTS"  # the variable; its value is the resolved path of the results directory
PATIENCE = 10.0  # seconds for killed processes to be gone


@contextlib.contextmanager
def mark_children(root: Path) -> Iterator[None]:
    """What is started in this block carries the mark of the results in `root`, and so does all that it starts."""
    os.environ[MARK] = str(root.resolve())
    try:
        yield
    finally:
        del os.environ[MARK]


def marked_processes(root: Path) -> list[psutil.Process]:
    """The living processes of this user that carry the mark of `root`, but for this one itself, and all below them.

    A process may have written its title over its environment, as those of Ray's dashboard do. Only what has started it
    says then whose it is, and only as long as that lives.
    """
    mark, found = str(root.resolve()), dict[int, psutil.Process]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if is_alive(process)]


def kill_marked(root: Path, also: Iterable[psutil.Process] = ()) -> int:
    """Kills every process that carries the mark of `root`, and waits until they are gone; says how many there were.

    Those in `also` are ended as well: found by `marked_processes` while what has started them was alive.
    """
    ended = 0
    known = list(also)
    while processes := {*marked_processes(root), *filter(is_alive, known)}:  # again, for those that were being started
        known.clear()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil tells a process from a later one of that number
                process.kill()
        ended += len(processes)
        until = time.monotonic() + PATIENCE
        while any(map(is_alive, processes)):  # a zombie is gone: whether its parent ever takes note is not ours
            if time.monotonic() > until:  # in the kernel, behind a dead disk or driver; nobody can end those
                return ended
            time.sleep(0.02)
    return ended


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs: it is neither gone nor a zombie, and its number has not become another's."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
