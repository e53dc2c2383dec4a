"""Ranks as processes of this host, for `--inline`."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from ngpt.system import gpus
from ngpt.system.device import pick_device
from tune.machine.spawn import hide_main_module
from tune.ranks.pool import RankPool
from tune.ranks.rank import Answer, RankRun, Seat

KILL_TIMEOUT = 10.0  # seconds for a killed process to disappear


class ProcessPool(RankPool):
    """Context manager for ranks on this host. They end with this process, and together."""

    def __init__(self, count: int, *, device: str) -> None:
        super().__init__(count)
        self._is_on_gpu = gpus.is_gpu(pick_device(device))
        self._ranks: list[tuple[Any, Connection]] = []  # process and connection of each
        self._busy: set[int] = set()  # ranks that have not answered

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def process_ids(self) -> list[int]:
        """The ids of the processes, in the order of the ranks; empty if there are none now."""
        return [process.pid for process, _ in self._ranks]

    def start(self, count: int) -> None:
        """Starts a process for each rank that has none."""
        context = multiprocessing.get_context("spawn")
        with hide_main_module(), _blocked(signal.SIGINT):
            for index in range(len(self._ranks), count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), name=f"rank {index}", daemon=True)
                process.start()
                theirs.close()
                self._ranks.append((process, ours))

    def seat(self, **about: Any) -> Seat:
        return Seat(**about, gpu=about["index"] if self._is_on_gpu else None)

    def send(self, index: int, method: str, *arguments: Any) -> None:
        self._busy.add(index)
        with contextlib.suppress(OSError):  # it has died, as `receive` will find
            self._ranks[index][1].send((method, arguments))

    def receive(self, seconds: float) -> Iterator[tuple[int, Answer]]:
        """Yields all answers that are here; a process that has ended answers `died`."""
        busy = {self._ranks[index][1]: index for index in self._busy}
        for connection in wait(list(busy), seconds):
            assert isinstance(connection, Connection)
            self._busy.discard(index := busy[connection])
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                process, _ = self._ranks[index]
                process.join(KILL_TIMEOUT)
                answer = Answer("died", reason=_how_it_ended(process.exitcode))
            yield index, answer

    def kill(self) -> None:
        """Kills all processes and waits for their end."""
        for process, connection in self._ranks:
            process.kill()
            connection.close()
        for process, _ in self._ranks:
            process.join(KILL_TIMEOUT)
        self._ranks, self._busy = [], set()


def _how_it_ended(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _blocked(number: int) -> Iterator[None]:
    """Blocks a signal in processes that start in this block: Ctrl-C reaches all, and only this one decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    """Main function of the process of a rank."""
    os.setsid()
    os.dup2(2, 1)  # the parent's stdout is for data
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    run = RankRun()
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the connection
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(run, method)(*arguments))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
