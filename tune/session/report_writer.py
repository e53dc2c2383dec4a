"""Rewrites the report while a campaign runs, in a thread, so that trials need not wait for it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from ngpt.config.base import ConfigError
from tune.results.summary import write_report_so_far

SECONDS_BETWEEN = 30.0  # two reports; a campaign that is over sooner writes its last report only


class ReportWriter:
    """Writes `report.html` and `report.md` of a running campaign when it is asked to.

    Reports are at least `seconds_between` apart: a request that comes sooner waits, and one report answers all
    requests that wait. The thread reads the journal from disk, so it shares no state with the session.

    Args:
        root: the results directory.
        message: prints a line, if the report cannot be written; the campaign goes on.
    """

    def __init__(self, root: Path, message: Callable[[str], None], *, seconds_between: float = SECONDS_BETWEEN) -> None:
        self._root, self._message, self._seconds_between = root, message, seconds_between
        self._last = time.monotonic()
        self._is_requested, self._is_closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def request(self) -> None:
        """Asks for a report of what the journal holds by the time it is written; does not wait for it."""
        self._is_requested.set()
        if self._thread is None and not self._is_closed.is_set():
            self._thread = threading.Thread(target=self._run, name="report", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Drops requests that wait, and returns once no report is being written."""
        self._is_closed.set()
        self._is_requested.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            self._is_requested.wait()
            if self._is_closed.wait(max(0.0, self._last + self._seconds_between - time.monotonic())):
                return
            self._is_requested.clear()
            try:
                write_report_so_far(self._root)
            except (OSError, ConfigError) as error:
                self._message(f"the report is not rewritten while the campaign runs: {error}")
            self._last = time.monotonic()
