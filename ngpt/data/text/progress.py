"""Progress of long work: a bar on a terminal, elsewhere a line every few seconds, then more rarely.

Who does long work has a `Log`, a function that prints a line. If it also has a method `progress`, a `Meter` calls that
a few times a second. `TerminalLog` is such a log.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from math import floor

from ngpt.system.cli import has_status_line, print_line, show_status

Log = Callable[[str], None]

EVERY = 5.0  # seconds between two lines, at least
SHARE = 0.1  # of the time since the start, which lies between two lines at least: they become rare
SHOW_EVERY = 0.1  # seconds between two calls of `progress`
MOST_BAR, LEAST_BAR = 30, 6  # columns
UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))


@dataclass(frozen=True)
class Progress:
    """How far some work is."""

    name: str
    done: int  # units since the start
    unit: str
    seconds: float  # since the start
    fraction: float | None = None  # of all work that is done, 0 to 1
    seconds_left: float | None = None
    is_line_due: bool = False  # whether it is time for another line, where lines are printed

    @property
    def percent(self) -> int:
        """The fraction in percent; 100 only at the end."""
        return floor(100 * (self.fraction or 0.0) + 1e-9)

    def line(self) -> str:
        """One line, such as `openwebtext: 12,400,000 tokens, 1,240,000/s, 31 %, 0:00:22 to go`."""
        line = f"{self.name}: {self.done:,} {self.unit}, {self.done / self.seconds:,.0f}/s"
        if self.fraction is not None and self.seconds_left is not None:
            line += f", {self.percent} %, {timedelta(seconds=round(self.seconds_left))} to go"
        return line

    def bar(self, width: int) -> str:
        """The same with a bar, in at most `width` columns; a narrow terminal gets fewer numbers."""
        percent = "" if self.fraction is None else f" {self.percent:3d} %"
        left = [] if self.seconds_left is None else [f"{timedelta(seconds=round(self.seconds_left))} left"]
        facts = [*left, f"{self._short(self.done / self.seconds)}/s", self._amount()]
        room = width - len(self.name) - len(percent) - 1
        while facts and room - sum(len(fact) + 2 for fact in facts) < LEAST_BAR:
            facts.pop()
        size = min(MOST_BAR, room - sum(len(fact) + 2 for fact in facts))
        bar = ""
        if self.fraction is not None and size >= LEAST_BAR:
            full = round(size * self.fraction)
            bar = f" {'━' * full}{'─' * (size - full)}"
        return "  ".join([f"{self.name}{bar}{percent}", *facts])[:width]

    def _amount(self) -> str:
        return self._short(self.done) if self.unit == "bytes" else f"{self._short(self.done)} {self.unit}"

    def _short(self, number: float) -> str:
        """Formats an amount with three digits: `12.4M`, or `12.4 MB` of bytes."""
        unit, size = next(((unit, size) for unit, size in UNITS if number >= size), ("", 1))
        digits = f"{number / size:.3g}" if number < 99.95 * size else f"{number / size:,.0f}"
        return f"{digits} {unit}B" if self.unit == "bytes" else f"{digits}{unit}"


class Meter:
    """Measures the rate of some work and the time that is left, and tells the log."""

    def __init__(self, log: Log, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._name, self._clock = progress_of(log), name, clock
        self._started = self._shown = self._line = clock()  # the last two: when it last was shown, and due as a line

    def update(self, done: int, unit: str, *, fraction: float | None, before: float = 0.0) -> None:
        """Says how far the work is, unless it was said just before.

        `done` units were processed since the start. `fraction` of all work is done, if known; `before` was done before
        the start.
        """
        now = self._clock()
        if now - self._shown < SHOW_EVERY:
            return
        self._shown, seconds = now, now - self._started
        left = None
        if fraction is not None and before < fraction <= 1:
            left = seconds * (1 - fraction) / (fraction - before)
        known = None if fraction is None or not 0 <= fraction <= 1 else fraction  # an estimate may be too small
        is_due = now - self._line >= max(EVERY, SHARE * seconds)
        self._line = now if is_due else self._line
        self._show(Progress(self._name, done, unit, seconds, known, left, is_due))


class TerminalLog:
    """Prints lines on stderr, and progress below them: a bar if stderr is a terminal, otherwise a line now and then.

    Args:
        quiet: whether progress is not shown.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def __call__(self, text: str) -> None:
        print_line(text)

    def progress(self, progress: Progress) -> None:
        """Shows how far some work is."""
        if self._quiet:
            return
        if has_status_line():
            show_status(progress.bar)
        elif progress.is_line_due:
            print_line(progress.line())


def progress_of(log: Log) -> Callable[[Progress], None]:
    """Returns the function that shows progress: the method of the log, or one that logs a line now and then."""

    def as_line(progress: Progress) -> None:
        if progress.is_line_due:
            log(progress.line())

    return getattr(log, "progress", None) or as_line


def silent(message: str, /) -> None:
    """Discards a log message."""
