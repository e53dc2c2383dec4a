"""The signals that ask a command to stop: from the keyboard, the system, the terminal and the batch system."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # None on Windows, which has no SIGHUP
# Batch systems announce the end of a job with one of these: Slurm's `--signal=USR1@60`, submitit, Grid Engine.
WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
GRACE = 2.0  # seconds that an interrupted command has to clean up

_installed: dict[int, Handler] = {}  # by this module, innermost block


def stop_signals() -> list[int]:
    """Returns SIGINT, SIGTERM, the warnings of batch systems, and SIGHUP unless it is ignored as under `nohup`.

    A warning that is ignored, or has a handler of another program, keeps its meaning.
    """
    warnings = [each for each in WARNINGS if signal.getsignal(each) in (signal.SIG_DFL, _installed.get(each))]
    hangup = [] if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN else [HANGUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup, *warnings]


class Interrupted(KeyboardInterrupt):
    """A stop signal has ended a command."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """Makes stop signals raise `Interrupted` in the `with` block; a SIGINT that is ignored stays so."""
    is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    with handlers({number: _raise for number in stop_signals() if number != signal.SIGINT or not is_ignored}):
        yield


def end_process_on_signal() -> None:
    """Makes stop signals end this process with one line, from now on. A command calls it before its slow imports.

    Python runs handlers only between its own instructions, so a long call of native code, such as the tokenization of a
    large text, would go on. Therefore a thread ends the process if `Interrupted` has not done so within `GRACE`. What
    the commands write survives a kill at any moment.
    """
    for number in stop_signals():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)
            _installed[number] = _leave
    if HANGUP is None:  # Windows wakes no pipe
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()


def _watch(reader: int) -> None:
    """Ends the process some time after a signal that it does not handle in a way of its own."""
    while data := os.read(reader, 1):
        number = data[0]
        if (handler := signal.getsignal(number)) in (_raise, _leave):
            time.sleep(GRACE)
            is_said = signal.getsignal(number) != handler  # by `run_command`, which has given it back
            exit_at_once(number, "" if is_said else "interrupted")


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _leave(number: int, frame: FrameType | None) -> None:
    exit_at_once(number, "interrupted")


@contextlib.contextmanager
def call_on_signal(first: Callable[[int], object], insists: Callable[[int], object]) -> Iterator[None]:
    """Calls `first` with the number of the first stop signal, and `insists` with that of a later one.

    A signal does not insist if it may come without anybody's impatience: after a warning, SIGTERM follows anyway, and
    closing a terminal may send SIGHUP twice, once from its shell. Restores the previous handlers at the end. Outside
    the main thread, where Python allows no signal handlers, this does nothing.
    """
    last = 0

    def call(number: int, frame: FrameType | None) -> None:
        """The signal handler: the first signal calls `first`, and a later one that insists calls `insists`."""
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
    outer = dict(_installed)
    for number in previous:
        signal.signal(number, new[number])
        _installed[number] = new[number]
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
            _installed.pop(number)
        _installed.update(outer)


def exit_at_once(number: int, message: str) -> None:
    """Ends the process with the exit code of a signal, without clean-up; prints one line, unless it is empty."""
    is_terminal = sys.stderr.isatty()
    start = "\x1b[?25h\n" if is_terminal else ""  # the live view hides the cursor, and the terminal shows `^C`
    if message:
        with contextlib.suppress(OSError):  # the terminal may be closed
            # The interrupted code may hold the lock of `sys.stderr`.
            os.write(2, f"{start}{message}\n".encode())
    os._exit(128 + number)
