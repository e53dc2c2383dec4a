"""Starts the ranks of a command on this host, as torchrun would, and ends them together (`--ranks`)."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ngpt.distributed.join import LAUNCHER_VARIABLE
from ngpt.distributed.network import INTERFACE_VARIABLE, LOOPBACK, interface_to, open_store
from ngpt.distributed.ranks import EXIT_LATE_OOM, EXIT_RANK_LOST, HALVINGS_VARIABLE
from ngpt.system.cli import EXIT_UNSUCCESSFUL, print_line, print_lines
from ngpt.system.signals import call_on_signal, stop_signals

# Of a run that all ranks end together: diverged, or stopped by a signal.
AGREED_CODES = {EXIT_UNSUCCESSFUL, *(128 + number for number in stop_signals())}
GRACE = 10.0  # seconds that the other ranks have to end by themselves when one has failed
TAIL = 4000  # characters of what a failed rank has printed


def launch(command: Callable[[bool], Sequence[str]], count: int) -> int:
    """Runs `count` ranks of a command to their end; returns the exit code of the first that failed, or 0.

    Signals are passed on to all ranks. Only the first rank prints; of another, what it has printed is shown if it fails
    first. If memory ran out too late for the ranks to agree on smaller micro-batches, they are started again with
    these.

    Args:
        command: returns the command line of a rank; its argument says whether the run has begun before.
    """
    halvings = 0
    while True:
        with tempfile.TemporaryDirectory(prefix="ngpt_ranks") as folder:
            code = _run_once(command(halvings > 0), count, Path(folder), halvings)
        if code != EXIT_LATE_OOM:
            return code
        halvings += 1
        print_line(f"out of memory on a rank: all start again with the micro-batch halved {halvings} x")


def _run_once(command: Sequence[str], count: int, folder: Path, halvings: int) -> int:
    store = open_store()
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_forward_signals(processes))
        for rank in range(count):
            printed = None if rank == 0 else stack.enter_context((folder / f"{rank}").open("wb"))
            processes.append(_start(command, rank, count, store.port, printed, halvings))
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if failed is None:
        return 0
    code = processes[failed].returncode
    if code < 0:
        print_line(f"rank {failed} of {count} was killed by {signal.Signals(-code).name}")
        return 128 - code
    if failed and code not in AGREED_CODES and processes[0].returncode != code:  # else the first rank has said it
        text = (folder / f"{failed}").read_text(errors="replace")[-TAIL:].strip()
        print_lines(f"rank {failed} of {count} ended with code {code}: {text}")
    return code


def _start(
    command: Sequence[str], rank: int, count: int, port: int, printed: IO[bytes] | None, halvings: int
) -> subprocess.Popen[bytes]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    place = {
        "MASTER_ADDR": LOOPBACK,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        HALVINGS_VARIABLE: str(halvings),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    if INTERFACE_VARIABLE not in os.environ and (interface := interface_to(LOOPBACK)):
        place[INTERFACE_VARIABLE] = interface
    environment = os.environ | {name: str(number) for name, number in numbers.items()} | place
    # A session of its own, so that Ctrl-C reaches a rank once: from here.
    return subprocess.Popen(
        command, env=environment, stdout=printed, stderr=printed, stdin=subprocess.DEVNULL, start_new_session=True
    )


@contextlib.contextmanager
def _forward_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int) -> None:
        for process in processes:
            process.send_signal(number)

    with call_on_signal(forward, forward):
        yield


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all ranks have ended, or some time after one has failed; returns the first that failed."""
    failed: list[int] = []
    deadline = float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if (code := process.poll()) and rank not in failed:
                failed.append(rank)
                if code not in AGREED_CODES:  # of a run that diverged, or was stopped, the first rank may still save
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.05)
    failed += [rank for rank, process in enumerate(processes) if process.poll() and rank not in failed]
    causes = [rank for rank in failed if processes[rank].returncode != EXIT_RANK_LOST]
    late = [rank for rank in causes if processes[rank].returncode == EXIT_LATE_OOM]
    return next(iter([*late, *causes, *failed]), None)


def rank_command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of `python -m module` with these arguments, for this interpreter."""
    return [sys.executable, "-m", module, *arguments]
