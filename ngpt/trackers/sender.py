"""Sends the rows of a run from a thread, so that training never waits for a server."""

import queue
import threading
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]

FINISH_TIMEOUT = 30.0  # seconds that the end of a run waits for its last rows


class Sender:
    """Makes calls one after another in a thread. After the first that raises, the others are dropped.

    `on_failure` gets that exception, in the thread.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._on_failure, self.has_failed = on_failure, False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, call: Call) -> None:
        """Makes a call after those before it."""
        if not self.has_failed:
            self._calls.put(call)

    def close(self, timeout: float = FINISH_TIMEOUT) -> None:
        """Waits until all calls have been made, but not longer than `timeout` seconds."""
        self._calls.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.has_failed:
                continue
            try:
                call()
            except Exception as error:  # a server that is away must not end the run
                self.has_failed = True
                self._on_failure(error)
