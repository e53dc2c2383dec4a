"""What SIGINT, SIGTERM and SIGHUP do while trials run, in both executors."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tune.session.session import Session

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


@contextlib.contextmanager
def stop_on_signal(session: Session, *, before_exit: Callable[[], object] = lambda: None) -> Iterator[None]:
    """On the first signal, running trials save and stop at their next step; a second one exits at once.

    `before_exit` runs before such an exit. Outside the main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not session.stop_requested:
            session.request_stop(number)
        elif number != HANGUP:  # a closed terminal may send SIGHUP twice, the second time through its shell
            before_exit()
            _report_exit()
            os._exit(128 + number)

    previous = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_signals() -> list[int]:
    """SIGINT and SIGTERM, and SIGHUP unless it is ignored, as under `nohup`."""
    if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, HANGUP]


def _report_exit() -> None:
    """Prints that the run exits at once, and shows the cursor, which the live view has hidden.

    It uses no stream object: the interrupted code may hold its lock.
    """
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, f"{cursor}\nstopped at once; run the same command again to resume\n".encode())
