"""Results at an address: a campaign runs in a local folder under the cache, which is uploaded meanwhile.

The run starts from what the store has, so the same command on another machine goes on. While the store cannot be
reached, training goes on, and the local folder holds what is to be uploaded.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ngpt.config.base import ConfigError
from ngpt.data.text.progress import Log
from ngpt.system.atomic_files import make_folder
from ngpt.system.cache import cache_folder
from ngpt.system.cli import print_line
from ngpt.system.lock import FolderLock
from tune import format as fmt
from tune.remote.lease import Lease, is_leased
from tune.remote.restore import Wanted, prepare_local, restore
from tune.remote.seeds import merge_ledgers
from tune.remote.store import PROBE, ObjectStore, StoreError, open_store, refusing
from tune.remote.takeover import copy_checkpoints, find_elsewhere, remove_worker_units, take_over
from tune.remote.upload import Uploader
from tune.remote.uri import Uri
from tune.remote.worker import WorkerUploads
from tune.results.snapshot import Snapshot
from tune.storage.journal import JOURNAL
from tune.storage.lock import ResultsLock, ResultsLocked
from tune.storage.state import read_replayed
from tune.terminal.live import open_console

INTERVAL_VARIABLE = "NGPT_UPLOAD_SECONDS"
INTERVAL, LONGEST_INTERVAL = 30.0, 3600.0  # seconds between two uploads
LEASE_INTERVALS = 3  # the lease of a run that is gone is free after so many intervals
LONGEST_PAUSE = 300.0  # seconds until a store that cannot be reached is tried again
FINAL_SECONDS = 120.0  # for which the last upload is tried
POLL_SECONDS = 0.5  # between two looks at the journal


class RemoteResults:
    """Context manager for results at `uri`: restores them into the local folder `root`, uploads it, holds the lease.

    Attributes:
        root: the results directory for the campaign.
        message: prints a line; the live view replaces it.

    Raises:
        ResultsLocked: on entering, another run holds the lease; on leaving, another run has taken it.
        ConfigError: there is no such bucket, or the credentials do not allow to write there.
        StoreError: the store cannot be reached; on leaving, for `FINAL_SECONDS`.
    """

    def __init__(self, uri: Uri, *, stop: threading.Event | None = None, checkpoints: Wanted = "unfinished") -> None:
        self.uri, self.message = uri, print_line
        self.stop = stop or threading.Event()  # set if another run takes the lease
        self._checkpoints: Wanted = checkpoints
        self._interval = upload_interval()
        self._over = threading.Event()
        self._uploading = threading.Lock()
        self._folder = local_folder(uri.parent)
        self.root = self._folder / uri.name
        self._own = self._folder / f".{uri.name}"  # what this machine keeps beside the results
        self._journal_bytes = 0  # that `_has_finished_phase` has seen
        self._failures = 0  # uploads that have failed since the last good one

    def __enter__(self) -> "RemoteResults":
        make_folder(self._folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(FolderLock(self._own, "upload"))
            with refusing():
                self._open(stack)
            self._thread = threading.Thread(target=self._work, daemon=True, name="uploads")
            self._thread.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._stack:
            self._over.set()
            self._thread.join()
            try:
                self._finish()
            except StoreError as error:
                if kind is None:
                    raise
                self.message(str(error))

    @contextlib.contextmanager
    def view(self, snapshot: Callable[[], Snapshot]) -> Iterator[Log]:
        """The live view of a campaign, which then also shows what happens to the uploads."""
        with open_console(snapshot) as log:
            self.message = log
            try:
                yield log
            finally:
                self.message = print_line

    def settle(self, *, workers_upload: bool) -> None:
        """Called before the first trial: makes what trials continue from available to those who train them.

        Args:
            workers_upload: whether workers upload by themselves; otherwise they train in `root`.

        Raises:
            StoreError: the store cannot be reached.
            ConfigError: the credentials do not allow to write there.
        """
        with refusing(), self._uploading:
            if workers_upload:
                self._uploader.upload()  # workers look for checkpoints in the store
            else:
                self._take_over()

    @property
    def workers(self) -> WorkerUploads:
        """How workers that do not share `root` upload by themselves."""
        return WorkerUploads(self.uri.public, self._interval)

    def _take_over(self) -> None:
        discarded = read_replayed(self.root).discarded
        for trial_id in self._elsewhere:
            if trial_id not in discarded:
                take_over(self._store, self.root, trial_id, message=self.message)
        if self._elsewhere:
            self._uploader.upload()
            remove_worker_units(self._store, self._elsewhere)
            self._elsewhere = []

    def _open(self, stack: contextlib.ExitStack) -> None:
        self._beside, self._store = open_store(self.uri.parent), open_store(self.uri)
        seconds = LEASE_INTERVALS * self._interval
        self._lease = Lease(self._store, self._own / "owner", seconds=seconds, on_lost=self.stop.set)
        self._lease.acquire()
        stack.callback(self._release)
        prepare_local(self._store, self.root, checkpoints=self._checkpoints, message=self.message)
        merge_ledgers(self._beside, self._folder)
        self._uploader = Uploader(self.root, self._store, check=self._lease.check)
        everything = self._checkpoints == "all"
        self._elsewhere = find_elsewhere(self._store, self.root, read_replayed(self.root), everything=everything)
        if everything:  # what is set aside is set aside whole
            self._take_over()

    def _release(self) -> None:
        with contextlib.suppress(StoreError):  # it then ends by itself
            self._store.delete(PROBE)  # that the nodes of a cluster look for (tune/cluster/node_store.py)
            self._lease.release()

    def _upload(self) -> None:
        with self._uploading:
            self._uploader.upload()
            merge_ledgers(self._beside, self._folder)
        if self._failures:
            self.message(f"{self.uri}: reached again, all results are uploaded")
        self._failures = 0

    def _work(self) -> None:
        """Uploads every interval and after each phase; says when the store is out of reach, and when it is back."""
        due = time.monotonic() + self._interval
        self._has_finished_phase()  # those of earlier runs
        while not self._over.wait(POLL_SECONDS):
            is_due = self._has_finished_phase() and not self._failures
            if not is_due and time.monotonic() < due:
                continue
            try:
                self._upload()
            except ResultsLocked:
                return
            except OSError as error:
                if not self._failures:
                    text = "training goes on, and the results are uploaded when it is back; until then they are only in"
                    self.message(f"{error}; {text} {self.root}")
                self._failures += 1
            due = time.monotonic() + self._pause()

    def _pause(self) -> float:
        """Seconds until the next upload: the longer, the more have failed."""
        return min(LONGEST_PAUSE, self._interval * 2**self._failures) if self._failures else self._interval

    def _has_finished_phase(self) -> bool:
        """Whether a phase has finished since the last call."""
        with contextlib.suppress(OSError), (self.root / JOURNAL).open("rb") as file:
            file.seek(self._journal_bytes)
            new = file.read()
            self._journal_bytes += len(new)
            return b'"event": "phase_finished"' in new
        return False

    def _finish(self) -> None:
        """Uploads all that is left, and tries for a while."""
        deadline, pause = time.monotonic() + FINAL_SECONDS, 1.0
        while True:
            self._lease.check()
            try:
                return self._upload()
            except StoreError as error:
                if time.monotonic() + pause > deadline:
                    text = f"the results are in {self.root}; run the same command again to upload them"
                    raise StoreError(str(self.uri), OSError(f"{error.reason}; {text}")) from None
                self._failures += 1
                self.message(f"{error}; trying again for {fmt.duration(deadline - time.monotonic())}")
            time.sleep(pause)
            pause *= 2


def local_folder(uri: Uri) -> Path:
    """The folder under the cache in which the campaigns of one address run on this machine."""
    digest = hashlib.sha256(str(uri).rstrip("/").encode()).hexdigest()[:16]
    return cache_folder() / "remote" / digest


@contextlib.contextmanager
def local_copy(uri: Uri, *, checkpoints: Wanted = "none", required: bool = True) -> Iterator[Path]:
    """A copy of the results at `uri`, to be read only; removed at the end.

    Raises:
        ConfigError: they cannot be read with these credentials, or there are none although they are `required`.
    """
    make_folder(folder := cache_folder() / "remote")
    with contextlib.ExitStack() as stack:
        temp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="copy-", dir=folder)))
        root = temp / (uri.name or "results")
        with refusing():
            store: ObjectStore = open_store(uri)
            found = restore(store, root, checkpoints=checkpoints, message=print_line)
            if required and not found:
                raise ConfigError(f"{uri} is not a results directory: it has no {JOURNAL} with a campaign in it")
            if found and checkpoints == "all":
                copy_checkpoints(store, root, message=print_line)
            if found and is_leased(store):
                stack.enter_context(ResultsLock(root))  # shows that the campaign is running
        yield root


def upload_interval() -> float:
    """The seconds between two uploads, from the environment.

    Raises:
        ConfigError: the variable has no sensible value.
    """
    text = os.environ.get(INTERVAL_VARIABLE) or str(INTERVAL)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= LONGEST_INTERVAL:
        raise ConfigError(f"{INTERVAL_VARIABLE} must be from 1 to {LONGEST_INTERVAL:.0f} seconds, got {text!r}")
    return seconds
