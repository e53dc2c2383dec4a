"""Stops a run on the stop signals, or when another thread asks for it, in both executors.

A run may be a guest of another program, such as a notebook. Then it gives the signal handlers back and never ends the
process; only the command line, which owns its process, exits at once on a second signal.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

from ngpt.config.base import UserError
from ngpt.system.cli import EXIT_INTERRUPTED
from ngpt.system.signals import call_on_signal, exit_at_once, handlers, stop_signals
from tune.session.session import Session

POLL_SECONDS = 0.2  # between looks at the event that another thread sets


class StoppedEarly(UserError):
    """A stop was requested before the first trial could start."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self) -> None:
        super().__init__("stopped before a trial has started; run the same command again to start")


@contextlib.contextmanager
def stop_on_signal(
    session: Session, *, before_exit: Callable[[], object] = lambda: None, owns_process: bool = False
) -> Iterator[None]:
    """On the first signal, running trials save and stop at their next step; a second signal stops them at once.

    Outside the main thread, where Python allows no signal handlers, this does nothing.

    Args:
        before_exit: called before an immediate exit.
        owns_process: whether a second signal exits the process. In the process of another program it raises
            KeyboardInterrupt or SystemExit instead, so that the program can clean up or go on.
    """

    def exit_now(number: int) -> None:
        """Ends the process, or raises in it what its signal means."""
        if owns_process:
            before_exit()
            exit_at_once(number, "stopped at once; run the same command again to resume")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    with call_on_signal(session.request_stop, exit_now):
        yield


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes stop signals raise SystemExit before and after the trials, so that Ray and the lock are released.

    SIGINT raises KeyboardInterrupt anyway.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handlers(dict.fromkeys({*stop_signals()} - {signal.SIGINT}, leave)):
        yield


@contextlib.contextmanager
def interrupt_blocked() -> Iterator[None]:
    """Blocks Ctrl-C in this thread and in processes that it starts, until they call `discard_interrupt`.

    Python would end a process that is still importing with a traceback on the terminal.
    """
    resource_tracker.ensure_running()  # it starts with the first process, and would unblock Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def discard_interrupt() -> None:
    """Unblocks Ctrl-C in a process that was started under `interrupt_blocked`; one that has come is forgotten."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def stop_on_event(session: Session, event: threading.Event | None) -> Iterator[None]:
    """Once `event` is set, by any thread, running trials save and stop at their next step, as after a first signal."""
    if event is None:
        yield
        return
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            if event.wait(POLL_SECONDS):
                session.request_stop()
                return

    watcher = threading.Thread(target=watch, daemon=True, name="stop request")
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
