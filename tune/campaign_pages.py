"""The pages of `serve`: an index of the campaigns in a results folder, and the report of each as of now.

Nothing is written. A campaign is read again when its journal has changed and somebody looks: once for all browsers, and
no more often than its cost allows, since the machine may be training. Results may come from somebody else, so a
campaign that cannot be read is a row with the reason, and links out of the folder are not followed.
"""

import errno
import hashlib
import html
import importlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ngpt.config.base import ConfigError, UserError
from ngpt.system.atomic_files import describe_os_error
from ngpt.system.cli import print_line
from tune import format as fmt
from tune.campaign_rows import campaign_row
from tune.report import overview
from tune.report.html import Live, page_text, render_html
from tune.report.overview import CampaignRow
from tune.report.server import POLICY, Page, describe, redirect
from tune.results.phase_summary import summarize_phase
from tune.results.snapshot import Snapshot
from tune.results.status import STARTING, read_progress
from tune.storage.activity import ACTIVITY
from tune.storage.journal import JOURNAL
from tune.storage.links import refuse_links
from tune.storage.lock import is_locked
from tune.storage.names import folder_problem
from tune.storage.state import CampaignState
from tune.storage.summaries import RUNNING

MAX_CAMPAIGNS = 300  # newest first; others are counted, and have a page
READ_SECONDS = 1.5  # for the rows of one answer; further campaigns are read for the next one
REST = 10.0  # what took a second of computing is kept for at least so many seconds
PROGRESS_SECONDS = 5  # the row of a running campaign is made anew after this time, although its journal is the same
REPORTS_KEPT = 4  # in memory, some megabytes each
NOT_READ = "not read yet"
CHANGING = (RUNNING, STARTING, NOT_READ)  # states of a campaign that a browser asks about more often

T = TypeVar("T")
Fingerprint = tuple[Any, ...]  # changes with what a page shows
SCRIPT = "text/javascript; charset=utf-8"


class Cached(Generic[T]):
    """What `make` has made for a fingerprint; made anew for another one, unless that was too costly for so soon."""

    def __init__(self, make: Callable[[Fingerprint], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._value: T | None = None
        self._fingerprint: Fingerprint = ()
        self._keep_until = 0.0  # in monotonic seconds

    def current(self, fingerprint: Fingerprint) -> Fingerprint:
        """The fingerprint of what `get` would return now."""
        is_kept = self._fingerprint and time.monotonic() < self._keep_until
        return self._fingerprint if is_kept else fingerprint

    def peek(self) -> T | None:
        """The last value, which may be outdated; None if there is none."""
        return self._value

    def get(self, fingerprint: Fingerprint) -> T:
        """Returns the value. Whoever asks while another thread makes it waits, and gets the same one."""
        with self._lock:
            wanted = self.current(fingerprint)
            if self._value is None or wanted != self._fingerprint:
                start = time.thread_time()  # work, however busy the machine is
                value = self._make(wanted)
                self._value, self._fingerprint = value, wanted
                self._keep_until = time.monotonic() + REST * (time.thread_time() - start)
                return value
            return self._value

    def drop(self) -> None:
        """Forgets the value, to free its memory."""
        self._value = None


class Campaign:
    """A results directory, with what was last read of it. `home` is the path of the index, if there is one."""

    def __init__(self, name: str, folder: Path, home: str | None) -> None:
        self.name, self.folder, self.home = name, folder, home
        self.row = Cached(self._make_row)
        self.report = Cached(self._make_report)

    def fingerprint(self) -> Fingerprint:
        """Changes when the journal does, and when the campaign starts or ends."""
        try:
            state = (self.folder / JOURNAL).lstat()
        except OSError:  # a run is starting, or the folder has gone
            return (is_locked(self.folder),)
        return (is_locked(self.folder), state.st_ino, state.st_size, state.st_mtime_ns)

    def progress_fingerprint(self) -> Fingerprint:
        """Like `fingerprint`; of a running campaign it changes every few seconds, too."""
        known = self.fingerprint()
        return (*known, time.monotonic() // PROGRESS_SECONDS) if known[0] else known

    def _make_row(self, fingerprint: Fingerprint) -> CampaignRow:
        try:
            return campaign_row(self.name, *self._read())
        except Exception as error:  # of results that anybody may have made; the others have rows all the same
            return CampaignRow(self.name, f"/{self.name}/", reason=self._reason(error))

    def _make_report(self, fingerprint: Fingerprint) -> Page:
        live = Live(version_of(fingerprint), "state", self.home)
        try:
            now, state = self._read()
            if state.campaign:
                text = report(self.folder, now, state, live)
            else:
                heading = f"{self.name} {'is starting' if now.alive else 'was stopped before its first trial'}"
                text = overview.render_notice(heading, "Its report appears here once trials are planned.", live)
        except Exception as error:  # as in `_make_row`
            text = overview.render_notice(f"{self.name} cannot be read", self._reason(error), live)
        return html_page(text)

    def _read(self) -> tuple[Snapshot, CampaignState]:
        """The progress of the campaign, and its state; that is empty while its first run is starting.

        Raises:
            OSError: the results cannot be read, or a link is in them.
        """
        journal = self.folder / JOURNAL
        if os.path.lexists(journal) and not stat.S_ISREG(journal.lstat().st_mode):
            raise OSError(errno.ELOOP, "it is a link, or not a file, and serve does not open it", JOURNAL)
        refuse_links(self.folder, "it is a link, and serve does not follow it")
        return read_progress(self.folder)

    def _reason(self, error: Exception) -> str:
        """Why the campaign cannot be read, on one line. What no campaign is known to cause is said on stderr, too."""
        if not isinstance(error, OSError | UserError):
            print_line(f"{fmt.plain(self.name)}: internal error: {describe(error)}")
            return f"internal error: {describe(error)}"
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        return fmt.shorten(fmt.plain(text.replace(f"{self.folder}/", "")), fmt.MAX_REASON)


class Listing(NamedTuple):
    """The campaigns of a results folder."""

    rows: tuple[CampaignRow, ...]
    left_out: int = 0  # campaigns without a row
    problem: str = ""  # why the folder cannot be read

    @property
    def version(self) -> str:
        """Changes with what the page shows."""
        return version_of(self)


class CampaignPages:
    """The pages of a results folder, or of the results directory of one campaign, by path.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise ConfigError(f"{root} {what}; serve shows a folder of campaigns, or the results of one")
        self._root = root.resolve()
        is_one = is_results(self._root)
        name = self._root.name if folder_problem(self._root.name) is None else "campaign"
        self.single = name if is_one else None  # the results directory of one campaign
        self._campaigns: dict[str, Campaign] = {}
        self._recent: list[str] = []  # campaigns whose report is in memory, newest last
        self._lock = threading.Lock()
        self._rendering = threading.Lock()  # one report at a time, so that training keeps its cores
        self._index: tuple[Listing, Page] | None = None

    def __call__(self, path: str) -> Page | None:
        """Returns the page of a path, or None if there is none. Paths are matched as they are, without decoding."""
        match path.split("/"):
            case ["", ""] if self.single is not None:
                return redirect(f"/{self.single}/")
            case ["", ""]:
                return self._index_page(self.listing())
            case ["", "-", "state"] if self.single is None:
                return index_state(self.listing())
            case ["", "-", name]:
                return asset(name)
            case ["", name] if self._find(name):
                return redirect(f"/{name}/")
            case ["", name, ""] if campaign := self._find(name):
                return self._report(campaign)
            case ["", name, "state"] if campaign := self._find(name):
                return self._state(campaign)
        return None

    def listing(self) -> Listing:
        """The rows of all campaigns, last changed first. Reads for `READ_SECONDS` at most; what is missing says so."""
        try:
            with os.scandir(self._root) as entries:
                names = [entry.name for entry in entries if is_results(Path(entry.path))]
        except OSError as error:
            return Listing((), problem=fmt.plain(describe_os_error(error)))
        changed = {name: _changed(self._root / name) for name in names}
        names.sort(key=lambda name: (-changed[name], name))
        end = time.monotonic() + READ_SECONDS
        rows = [self._row(name, may_read=time.monotonic() < end) for name in names[:MAX_CAMPAIGNS]]
        return Listing(tuple(rows), len(names) - len(rows))

    def _row(self, name: str, *, may_read: bool) -> CampaignRow:
        if problem := self._problem(name):
            return CampaignRow(name, reason=problem)
        campaign = self._campaign(name)
        if may_read:
            return campaign.row.get(campaign.progress_fingerprint())
        return campaign.row.peek() or CampaignRow(name, f"/{name}/", NOT_READ, reason="reading follows in a moment")

    def _problem(self, name: str) -> str | None:
        """Why the folder `name` is not shown; None if it can be."""
        if problem := folder_problem(name):
            return f"its folder cannot have this name: {problem}"
        folder = self._root / name
        if folder.is_symlink() and folder.resolve().parent != self._root:
            return "it is a link out of this folder, which serve does not follow; serve the folder that it leads to"
        return None

    def _find(self, name: str) -> Campaign | None:
        """The campaign of a path, if its folder may be shown and has a journal."""
        if self.single is not None:
            return self._campaign(name) if name == self.single else None
        if self._problem(name) or not is_results(self._root / name):
            return None
        return self._campaign(name)

    def _campaign(self, name: str) -> Campaign:
        folder, home = (self._root / name, "/") if self.single is None else (self._root, None)
        with self._lock:
            return self._campaigns.setdefault(name, Campaign(name, folder, home))

    def _index_page(self, listing: Listing) -> Page:
        known = self._index
        if known is None or known[0] != listing:
            live = Live(listing.version, "/-/state")
            rows, problem = listing.rows, listing.problem
            text = overview.render_overview(
                rows, folder=self._root.name, left_out=listing.left_out, problem=problem, live=live
            )
            known = self._index = listing, html_page(text)
        return known[1]

    def _report(self, campaign: Campaign) -> Page:
        importlib.import_module("tune.spec.metrics")  # imports torch; once, so this is no part of a report's cost
        with self._rendering:
            page = campaign.report.get(campaign.fingerprint())
        with self._lock:
            self._recent = [name for name in self._recent if name != campaign.name] + [campaign.name]
            dropped, self._recent = self._recent[:-REPORTS_KEPT], self._recent[-REPORTS_KEPT:]
        for name in dropped:
            self._campaigns[name].report.drop()
        return page

    def _state(self, campaign: Campaign) -> Page:
        """How far a campaign is, and the version of its page."""
        row = campaign.row.get(campaign.progress_fingerprint())
        parts = [row.reason] if row.reason else [part for part in (row.progress, row.detail, row.remaining) if part]
        version = version_of(campaign.report.current(campaign.fingerprint()))
        return state_page(version, row.state, parts, is_changing=row.state in CHANGING)


def report(folder: Path, now: Snapshot, state: CampaignState, live: Live) -> str:
    """The report of a campaign as of now."""
    from tune.results.summary import file_warnings, report_inputs, summarize_campaign

    phases = [summarize_phase(state, phase) for phase in state.phases.values()]
    summary = summarize_campaign(state, phases, file_warnings=file_warnings(folder, state))
    summary = replace(summary, status=RUNNING) if now.alive else summary
    return render_html(summary, *report_inputs(folder, state), live=live)


def index_state(listing: Listing) -> Page:
    """How many campaigns run, and the version of the index."""
    running = sum(row.state in (RUNNING, STARTING) for row in listing.rows)
    parts = [fmt.counted(len(listing.rows) + listing.left_out, "campaign"), f"{running} running"]
    is_changing = any(row.state in CHANGING for row in listing.rows)
    return state_page(listing.version, "live", parts, is_changing=is_changing)


def state_page(version: str, state: str, parts: Sequence[str], *, is_changing: bool) -> Page:
    """What a page asks for: every two seconds while things change, otherwise less often."""
    news = {"version": version, "state": state, "parts": [fmt.plain(part) for part in parts], "changing": is_changing}
    return Page(json.dumps(news).encode(), "application/json")


def html_page(text: str) -> Page:
    """A page with the Content-Security-Policy that its head names, and without frames around it."""
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    policy = f"{html.unescape(found[1])}; frame-ancestors 'none'" if found else POLICY
    return Page(text.encode(), policy=policy)


@cache
def asset(name: str) -> Page | None:
    """A script of the pages."""
    if name == "plotly.js":
        from plotly.offline import get_plotlyjs

        return Page(get_plotlyjs().encode(), SCRIPT)
    if name in ("live.js", "overview.js"):
        return Page(page_text(name).encode(), SCRIPT)
    return None


def version_of(item: object) -> str:
    """A short digest of what a page shows."""
    return hashlib.sha256(repr(item).encode()).hexdigest()[:20]


def is_results(folder: Path) -> bool:
    """Whether a campaign has run in a folder, or is about to."""
    return any(os.path.lexists(folder / name) for name in (JOURNAL, ACTIVITY))


def _changed(folder: Path) -> float:
    """When the journal was last written; now if a run has not begun it."""
    try:
        return (folder / JOURNAL).lstat().st_mtime
    except OSError:
        return time.time()
