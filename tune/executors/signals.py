"""Handles SIGINT, SIGTERM and SIGHUP while trials run, in both executors."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tune.session.session import Session

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # None on Windows, which has no SIGHUP


@contextlib.contextmanager
def stop_on_signal(session: Session, *, before_exit: Callable[[], object] = lambda: None) -> Iterator[None]:
    """On the first signal, running trials save and stop at their next step; a second signal exits at once.

    `before_exit` runs before an immediate exit. Outside the main thread, where Python allows no signal handlers, this
    does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not session.stop_requested:
            session.request_stop(number)
        elif number != HANGUP:  # closing a terminal may send SIGHUP twice, once from its shell
            before_exit()
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the live view hides it
            with contextlib.suppress(OSError):  # the terminal may be closed
                # The interrupted code may hold the lock of `sys.stderr`.
                os.write(2, f"{show_cursor}\nstopped at once; run the same command again to resume\n".encode())
            os._exit(128 + number)

    previous = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_signals() -> list[int]:
    """Returns SIGINT, SIGTERM and, unless it is ignored as under `nohup`, SIGHUP."""
    if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, HANGUP]
