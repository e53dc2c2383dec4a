"""Progress of long work: a line every few seconds."""

import time
from collections.abc import Callable
from datetime import timedelta

Log = Callable[[str], None]

EVERY = 5.0  # seconds


class Meter:
    """Lines such as `openwebtext: 12,400,000 tokens, 1,240,000/s, 31 %, 0:00:22 to go`."""

    def __init__(self, log: Log, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._name, self._clock = log, name, clock
        self._started = self._last = clock()

    def update(self, done: int, unit: str, *, fraction: float, before: float = 0.0) -> None:
        """Logs a line if the last one is at least `EVERY` seconds old.

        `done` units were processed since the start. `fraction` of all work is done; `before` was done before the start.
        """
        now = self._clock()
        if now - self._last < EVERY:
            return
        self._last = now
        seconds = now - self._started
        line = f"{self._name}: {done:,} {unit}, {done / seconds:,.0f}/s"
        if before < fraction <= 1:
            left = timedelta(seconds=round(seconds * (1 - fraction) / (fraction - before)))
            line += f", {100 * fraction:.0f} %, {left} to go"
        self._log(line)


def silent(message: str, /) -> None:
    """Discards a log message."""
