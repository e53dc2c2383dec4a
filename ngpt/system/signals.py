"""The signals that ask a run to save and stop: from the keyboard, the system, the terminal and the batch system."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # None on Windows, which has no SIGHUP
# Batch systems announce the end of a job with one of these: Slurm's `--signal=USR1@60`, submitit, Grid Engine.
WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


def stop_signals() -> list[int]:
    """Returns SIGINT, SIGTERM, the warnings of batch systems, and SIGHUP unless it is ignored as under `nohup`.

    A warning that has a handler already, or is ignored, keeps its meaning.
    """
    warnings = [number for number in WARNINGS if signal.getsignal(number) == signal.SIG_DFL]
    hangup = [] if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN else [HANGUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup, *warnings]


@contextlib.contextmanager
def call_on_signal(first: Callable[[int], object], insists: Callable[[int], object]) -> Iterator[None]:
    """Calls `first` with the number of the first stop signal, and `insists` with that of a later one.

    A signal does not insist if it may come without anybody's impatience: after a warning, SIGTERM follows anyway, and
    closing a terminal may send SIGHUP twice, once from its shell. Restores the previous handlers at the end. Outside
    the main thread, where Python allows no signal handlers, this does nothing.
    """
    last = 0

    def call(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, number
        if not before:
            first(number)
        elif before not in WARNINGS and number not in (HANGUP, *WARNINGS):
            insists(number)

    with handlers(dict.fromkeys(stop_signals(), call)):
        yield


@contextlib.contextmanager
def handlers(new: Mapping[int, Handler]) -> Iterator[None]:
    """Sets signal handlers and restores the previous ones; does nothing outside the main thread."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # A handler that was not set by Python is None here. It could not be restored, so it stays.
        previous = {number: old for number in new if (old := signal.getsignal(number)) is not None}
    for number in previous:
        signal.signal(number, new[number])
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def exit_at_once(number: int, message: str) -> None:
    """Ends the process with the exit code of a signal, without clean-up; prints one line."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the live view hides it
    with contextlib.suppress(OSError):  # the terminal may be closed
        # The interrupted code may hold the lock of `sys.stderr`.
        os.write(2, f"{show_cursor}\n{message}\n".encode())
    os._exit(128 + number)
