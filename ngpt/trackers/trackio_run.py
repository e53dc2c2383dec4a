"""trackio: project CAMPAIGN, run PHASE/ARM/seed N, in a local database, on a trackio server or on a Space.

The server or Space is the one in trackio's own variables, TRACKIO_SERVER_URL or TRACKIO_SPACE_ID. A campaign probes it
once; if it does not answer, the runs are logged to the local database, in TRACKIO_DIR.
"""

import contextvars
import os
from collections.abc import Callable, Mapping
from typing import Any

from ngpt.system.cli import print_line
from ngpt.trackers.base import Ending, Histogram, TrackedRun, Writer
from ngpt.trackers.run_id import run_id
from ngpt.trackers.sender import Sender
from ngpt.trackers.server import PROBE_TIMEOUT, server_problem

TRACKIO_MODES = ("auto", "local", "disabled")
SERVER, SPACE = "TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"
HUB = "https://huggingface.co"


def resolve_mode(mode: str, report: Callable[[str], None] = print_line) -> str:
    """Returns auto if the server or Space of the environment answers, local without one, or disabled."""
    if mode != "auto":
        return mode
    space, server = os.environ.get(SPACE), os.environ.get(SERVER)
    if not space and not server:
        report(f"trackio: local, since neither {SERVER} nor {SPACE} is set; look at it with: trackio show")
        return "local"
    problem = server_problem(HUB if space else server or "", timeout=PROBE_TIMEOUT)
    if problem is not None:
        report(f"trackio: local, since {problem}; look at it with: trackio show")
        return "local"
    report(f"trackio: online, {'the Hugging Face hub' if space else 'the server'} answers")
    return "auto"


class TrackioRun(Writer):
    """A run of trackio, whose own threads send its rows. A resumed run continues, and gets no row twice."""

    is_broken = False  # shared by all runs of the process, so that it is said once

    def __init__(self, run: TrackedRun, mode: str, rows: Callable[[], list[dict[str, Any]]]) -> None:
        """`rows` reads the rows that the run has logged before: a new run of trackio gets them all."""
        self.repeated, self._run = dict(run.repeated), None
        _, is_new = run_id(run.folder)
        self._sender = Sender(self._give_up)
        self._sender.has_failed = TrackioRun.is_broken
        self._sender.send(lambda: self._begin(run, mode, "never" if is_new else "allow"))
        for row in rows() if is_new else ():
            self._sender.send(lambda row=row: self._log(dict(row)))

    def _begin(self, run: TrackedRun, mode: str, resume: str) -> None:
        trackio = _quiet_trackio()
        hidden = {name: os.environ.pop(name) for name in (SERVER, SPACE) if mode == "local" and name in os.environ}
        options = {"project": project_name(run.group or run.project), "name": "/".join(run.path), "resume": resume}
        options |= {"group": run.phase or None, "config": dict(run.parameters), "embed": False}
        try:
            # In a context of its own, since trackio would end the run that another `init` has begun in this one.
            call = contextvars.Context().run
            self._run = call(trackio.init, **options, auto_log_gpu=False, auto_log_cpu=False)
        finally:
            os.environ.update(hidden)

    def log(self, row: Mapping[str, Any]) -> None:
        if values := self.new_values(int(row["step"]), row):
            self._sender.send(lambda: self._log({"step": row["step"], **values}))

    def _log(self, row: dict[str, Any]) -> None:
        step = int(row.pop("step"))
        assert self._run is not None, "rows are sent after the start"
        self._run.log({name: value for name, value in row.items() if value is not None}, step=step)

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Sends histograms that trackio does not have yet."""
        new = self.new_values(step, histograms)

        def send() -> None:
            trackio = _quiet_trackio()
            self._log({"step": step} | {n: trackio.Histogram(np_histogram=(h.counts, h.edges)) for n, h in new.items()})

        if new:
            self._sender.send(send)

    def end(self, ending: Ending, metrics: Mapping[str, Any]) -> None:
        if ending in ("finished", "diverged"):
            steps = int(metrics.get("steps") or 0)
            final = {f"final/{name}": value for name, value in metrics.items() if value is not None}
            self._sender.send(lambda: self._log({**final, "step": steps}))

    def __exit__(self, *_: object) -> None:
        self._sender.send(self._finish)
        self._sender.close()

    def _finish(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _give_up(self, error: Exception) -> None:
        if not TrackioRun.is_broken:
            TrackioRun.is_broken = True
            print_line(f"trackio: no more rows from here on, since {error}; metrics.jsonl has them all")


def project_name(name: str) -> str:
    """A name that trackio accepts as a project."""
    return name.replace("/", "-")


def _quiet_trackio() -> Any:
    """Imports trackio, and keeps it from printing: a campaign owns the terminal, and stdout may be data."""
    import trackio
    import trackio.run
    import trackio.utils

    for module in (trackio, trackio.run, trackio.utils):  # not by another sys.stdout, which all threads share
        vars(module)["print"] = lambda *args, **options: None
    return trackio
