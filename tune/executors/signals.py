"""Handles the stop signals while trials run, in both executors."""

import contextlib
from collections.abc import Callable, Iterator

from ngpt.system.signals import call_on_signal, exit_at_once
from tune.session.session import Session


@contextlib.contextmanager
def stop_on_signal(session: Session, *, before_exit: Callable[[], object] = lambda: None) -> Iterator[None]:
    """On the first signal, running trials save and stop at their next step; a second signal exits at once.

    `before_exit` runs before an immediate exit. Outside the main thread, where Python allows no signal handlers, this
    does nothing.
    """

    def exit_now(number: int) -> None:
        before_exit()
        exit_at_once(number, "stopped at once; run the same command again to resume")

    with call_on_signal(session.request_stop, exit_now):
        yield
