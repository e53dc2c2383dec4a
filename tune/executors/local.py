"""The executor without Ray: one trial or group after the other, in this process.

And what a signal means to both executors.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tune.session.session import Session
from tune.trials.trial_group import run_trials

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


def run_inline(session: Session) -> None:
    """Runs every trial in this process. The numbers are those of Ray; it is the debugger's way, and the tests'."""
    with stop_on_signal(session):
        while specs := session.ask():
            with contextlib.closing(run_trials(specs)) as run:
                unwanted: list[str] | None = None
                while not session.stop_requested:
                    try:
                        news = run.send(unwanted)
                    except StopIteration:
                        break
                    for trial_id, result in news.ended.items():
                        session.tell(trial_id, result)
                    unwanted = [name for name, interim in news.interim.items() if session.should_stop(name, interim)]


@contextlib.contextmanager
def stop_on_signal(session: Session, *, at_once: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A signal of `stop_signals` lets running trials save and stop at their next steps; a second one ends the process.

    `at_once` ends what else there is to end in the second case.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if session.stop_requested and number == HANGUP:  # a shell that ends passes on the one that all have had
            return
        if session.stop_requested:
            at_once()
            last_words()
            os._exit(128 + number)
        session.request_stop(number)

    previous = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_signals() -> list[int]:
    """SIGINT, SIGTERM, and SIGHUP where the terminal is to take its processes along when it goes (not with `nohup`)."""
    if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, HANGUP]


def last_words() -> None:
    """Says that the process ends at once, below the live view, and shows the terminal's cursor, which that has hidden.

    It writes without any lock, since the code that was interrupted may hold it.
    """
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{cursor}\nended at once; the same command goes on\n".encode())
