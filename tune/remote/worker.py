"""Trials of a worker that shares no folder with the run: local scratch, and a unit of each trial in the store.

The worker trains in a folder of its own host and uploads it as `trials/ID/.worker`, apart from what the run uploads as
`trials/ID`, so that each object has one writer. An attempt that starts elsewhere goes on from the newest checkpoint of
either. It first writes its name into the unit; an earlier attempt that is still alive reads that before it uploads, and
uploads nothing more.
"""

import contextlib
import errno
import hashlib
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import make_folder, write_atomic
from ngpt.system.cache import cache_folder
from tune.remote.parts import LOGS, FilePart, PartReader
from tune.remote.restore import download_files
from tune.remote.store import REASONS, TRANSIENT, ObjectStore, StoreError, open_store
from tune.remote.unit import (
    LOCAL_ONLY,
    TRIALS,
    WORKER,
    DamagedUnit,
    Digests,
    newest_step,
    read_digests,
    scan,
    worker_unit,
    write_stamps,
)
from tune.remote.upload import Uploader
from tune.remote.uri import Uri

if TYPE_CHECKING:
    from tune.trials.trial import TrialSpec  # loads torch, which `status` of an address does not need

OWNER = ".owner"  # in the unit of a worker and in its scratch folder: the name of the newest attempt
PATIENCE = 300.0  # seconds for which a worker waits for a store that is out of reach
LONGEST_PAUSE = 15.0  # seconds between two tries
STALE_SECONDS = 86400.0  # after which scratch that a killed worker has left is removed
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerUploads:
    """How the workers of a campaign reach its results."""

    address: str  # without credentials: a node has its own
    interval: float  # seconds between two uploads
    patience: float = PATIENCE


class StoreLost(OSError):
    """The store was out of reach for too long, so the trial has to go on elsewhere or later."""


class Superseded(Exception):
    """A later attempt trains this trial elsewhere."""


@dataclass
class _Kept:
    """A trial whose files a worker keeps."""

    spec: "TrialSpec"  # with the scratch folder
    reader: PartReader
    owner: str = ""  # once it has begun
    uploader: Uploader | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while it is uploaded

    @property
    def unit(self) -> str:
        return worker_unit(self.spec.trial_id)


class TrialStore:
    """Keeps the files of a worker's trials in scratch, and uploads them with a thread every few seconds."""

    def __init__(self, uploads: WorkerUploads) -> None:
        self._uploads = uploads
        self._root = scratch_folder(uploads.address)
        self._store: ObjectStore | None = None
        self._kept: dict[str, _Kept] = {}  # by trial id
        make_folder(self._root)
        remove_stale(self._root)
        threading.Thread(target=self._work, daemon=True, name="uploads").start()

    def place(self, spec: "TrialSpec") -> "TrialSpec":
        """The spec with its folder in scratch; `begin` fills it."""
        placed = replace(spec, folder=self._root / worker_unit(spec.trial_id))
        self._kept[spec.trial_id] = _Kept(placed, PartReader(placed.folder))
        return placed

    def begin(self, trial_ids: Iterable[str]) -> None:
        """Fills the scratch folders with the newest state of these trials. The caller has locked the folders.

        Raises:
            StoreLost: the store cannot be reached.
            ConfigError: this host may not use the store.
        """
        for trial_id in trial_ids:
            kept = self._kept[trial_id]
            self._patiently(lambda kept=kept: self._begin(kept), self._uploads.patience)

    def parts(self, trial_ids: Iterable[str], *, everything: bool = False) -> dict[str, list[FilePart]]:
        """What the run has not got yet of the files of these trials, by trial id."""
        kept = {trial_id: self._kept[trial_id] for trial_id in trial_ids if trial_id in self._kept}
        return {trial_id: each.reader.read(everything=everything) for trial_id, each in kept.items()}

    def flush(self, trial_ids: Collection[str], seconds: float | None = None) -> None:
        """Uploads all that these trials have; tries for a while, by default as long as `WorkerUploads` says.

        Raises:
            StoreLost: the store was out of reach all the time.
            ConfigError: this host may not use it any more.
            Superseded: a later attempt trains one of them.
        """
        limit = self._uploads.patience if seconds is None else seconds
        deadline = time.monotonic() + limit
        for kept in [self._kept[trial_id] for trial_id in trial_ids if trial_id in self._kept]:
            self._patiently(lambda kept=kept: self._upload(kept), max(0.0, deadline - time.monotonic()))

    def drop(self, trial_ids: Iterable[str]) -> None:
        """Removes the scratch of trials that are in the store."""
        for trial_id in trial_ids:
            kept = self._kept.pop(trial_id, None)
            if kept and kept.owner:  # otherwise another process may still hold the folder
                with kept.lock:  # the thread may be about to upload it
                    kept.uploader = None
                    shutil.rmtree(kept.spec.folder.parent, ignore_errors=True)

    def forget(self) -> None:
        """Uploads nothing more of the trials so far, and leaves their scratch for another attempt on this host."""
        for kept in self._kept.values():
            with kept.lock:
                kept.uploader = None
        self._kept = {}

    def _begin(self, kept: _Kept) -> None:
        store, spec = self._open(), kept.spec
        key, local = f"{kept.unit}/{OWNER}", spec.folder / OWNER
        newest = store.read(key)
        # Nobody has trained it since an attempt on this host: its scratch is ahead of the store.
        is_newest_here = spec.attempt > 1 and newest and local.exists() and local.read_bytes() == newest
        if not is_newest_here:
            self._fill(kept, store)
        kept.owner = uuid.uuid4().hex
        store.write(key, kept.owner.encode())
        write_atomic(local, kept.owner)
        kept.uploader = Uploader(self._root, store, check=lambda: self._check_owner(kept, store))

    def _fill(self, kept: _Kept, store: ObjectStore) -> None:
        """Empties the scratch folder and downloads the unit with the newest checkpoint into it."""
        spec = kept.spec
        empty(spec.folder)
        # What a first attempt finds there was made by one that the journal does not know, of any code.
        units = [kept.unit] if spec.attempt > 1 else []
        found = {unit: _digests(store, unit) for unit in (*units, f"{TRIALS}/{spec.trial_id}")}
        steps = {unit: step for unit, digests in found.items() if (step := newest_step(digests)) is not None}
        if not steps:
            return
        unit = max(steps, key=lambda each: steps[each])
        damaged = download_files(store, unit, found[unit], spec.folder)
        if damaged:
            log.warning("%s: %s do not match their digests and are left out", unit, ", ".join(damaged))
        if any(path in LOGS for path in damaged):  # a curve without its start would mislead
            empty(spec.folder)
        elif unit == kept.unit:
            write_stamps(self._root, unit, scan(spec.folder, is_root=False))

    def _check_owner(self, kept: _Kept, store: ObjectStore) -> None:
        if not (kept.spec.folder / OWNER).exists():  # an upload would remove from the store what is missing here
            raise FileNotFoundError(errno.ENOENT, "the scratch of a trial has been removed", str(kept.spec.folder))
        if store.read(f"{kept.unit}/{OWNER}") != kept.owner.encode():
            raise Superseded(f"another attempt trains {kept.spec.name}")

    def _open(self) -> ObjectStore:
        if self._store is None:
            self._store = open_store(Uri(self._uploads.address))
        return self._store

    def _upload(self, kept: _Kept) -> None:
        with kept.lock:
            if kept.uploader is not None:
                kept.uploader.upload_unit(kept.unit)

    def _patiently(self, call: Callable[[], None], seconds: float) -> None:
        deadline, pause = time.monotonic() + seconds, 1.0
        while True:
            try:
                return call()
            except StoreError as error:
                if error.code in REASONS and error.code not in TRANSIENT:
                    raise ConfigError(str(error)) from error
                if time.monotonic() + pause > deadline:
                    raise StoreLost(f"{error} (tried for {seconds:.0f} s)") from error
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _work(self) -> None:
        while True:
            time.sleep(self._uploads.interval)
            for kept in list(self._kept.values()):
                try:
                    self._upload(kept)
                except StoreError:  # the next upload brings all; the run says that the store is out of reach
                    continue
                except Superseded:
                    kept.uploader = None
                except Exception:  # of any kind: this thread serves all trials of the worker
                    log.warning("an upload of %s failed", kept.spec.name, exc_info=True)


def scratch_folder(address: str) -> Path:
    """The folder on this host in which workers train the trials of the results at an address."""
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    return cache_folder() / "scratch" / digest


def empty(folder: Path) -> None:
    """Removes all that a trial has left in its folder, but not its lock and heartbeat."""
    for path in folder.iterdir():
        if path.name not in LOCAL_ONLY:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_stale(root: Path) -> None:
    """Removes scratch of killed workers that nobody has gone on with for a day."""
    for folder in root.glob(f"{TRIALS}/*/{WORKER}"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > STALE_SECONDS:
                shutil.rmtree(folder.parent, ignore_errors=True)


def _digests(store: ObjectStore, unit: str) -> Digests:
    try:
        return read_digests(store, unit) or {}
    except DamagedUnit as error:
        log.warning("%s", error)
        return {}
