"""Restores a results directory from its copy in a store, or decides that the local folder is the newer one."""

import itertools
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import commit_folder
from tune.remote.store import ObjectStore, StoreError
from tune.remote.unit import (
    DIGESTS,
    ROOT,
    TRIALS,
    DamagedUnit,
    Digests,
    Stamps,
    complete_lines,
    is_checkpoint,
    object_key,
    read_digests,
    read_stamps,
    scan,
    unit_folder,
    write_stamps,
)
from tune.storage.journal import JOURNAL
from tune.storage.names import folder_problem
from tune.storage.state import DONE, read_replayed

DOWNLOADS = 16  # units at a time
Wanted = Literal["all", "unfinished", "none"]  # which checkpoints are downloaded


def restore(store: ObjectStore, target: Path, *, checkpoints: Wanted, message: Callable[[str], None]) -> bool:
    """Downloads results into the new folder `target`; returns whether the store has any.

    A file that does not match its digest is left out, and named. Files that are not wanted stay in the store.

    Raises:
        StoreError: the store cannot be reached, or its journal does not match its digest.
    """
    if read_digests(store, ROOT) is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=".restoring-", dir=target.parent))
    try:
        damaged = _restore_unit(store, ROOT, temp)
        if JOURNAL in damaged or not (temp / JOURNAL).exists():
            raise StoreError(store.uri, OSError(f"{JOURNAL} is missing or does not match its digest"))
        results = read_replayed(temp).results
        done = {trial_id for trial_id, result in results.items() if result["status"] in DONE}

        def restore_trial(name: str) -> list[str]:
            wants = checkpoints == "all" or (checkpoints == "unfinished" and name not in done)
            return _restore_unit(store, f"{TRIALS}/{name}", temp, checkpoints=wants)

        names = [name for name in store.folders(TRIALS) if not folder_problem(name)]
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            damaged += itertools.chain.from_iterable(pool.map(restore_trial, names))
        for path in damaged:
            message(f"{store.uri}: {path} does not match its digest and is left out")
        commit_folder(temp, target)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return True


def _restore_unit(store: ObjectStore, unit: str, root: Path, *, checkpoints: bool = True) -> list[str]:
    """Downloads the files of a unit; returns the keys of those that do not match their digests."""
    folder = unit_folder(root, unit)
    try:
        digests = read_digests(store, unit)
    except DamagedUnit:
        if unit == ROOT:
            raise
        return [object_key(unit, DIGESTS)]
    if not digests:
        return []
    left_out: Stamps = {path: None for path in digests if is_checkpoint(path) and not checkpoints}
    damaged = download_files(store, unit, {path: digests[path] for path in digests if path not in left_out}, folder)
    write_stamps(root, unit, left_out | scan(folder, is_root=unit == ROOT))
    return [object_key(unit, path) for path in damaged]


def download_files(store: ObjectStore, unit: str, digests: Digests, folder: Path) -> list[str]:
    """Downloads files of a unit into `folder`; returns the paths of those that do not match their digests."""
    damaged: list[str] = []
    for path, allowed in digests.items():
        (local := folder / path).parent.mkdir(parents=True, exist_ok=True)
        if not any(store.download(object_key(unit, path), local) in allowed for _ in range(2)):
            local.unlink(missing_ok=True)
            damaged.append(path)
    return damaged


def prepare_local(store: ObjectStore, root: Path, *, checkpoints: Wanted, message: Callable[[str], None]) -> None:
    """Makes the local folder `root` the newest state of the results, from itself or from the store.

    The journals tell which one is newer. A local folder that went another way than the store is set aside.

    Raises:
        StoreError: the store cannot be reached.
        ConfigError: a campaign in the store cannot be read.
    """
    there, here = _remote_journal(store), complete_lines(root / JOURNAL)
    if here and here.startswith(there) and (there or read_stamps(root, ROOT) is None):
        return  # this machine has trained last, or nothing was uploaded yet
    if here and not there.startswith(here):
        aside = next(
            path for n in itertools.count(1) if not (path := root.with_name(f"{root.name}.aside-{n}")).exists()
        )
        root.rename(aside)
        reason = "has gone on elsewhere" if there else "was removed"
        message(f"the campaign at {store.uri} {reason}; what this machine had is now in {aside}")
    elif root.exists():
        shutil.rmtree(root)
    if there and not restore(store, root, checkpoints=checkpoints, message=message):
        raise ConfigError(f"{store.uri}: the list of its files cannot be read")
    if there:
        message(f"restored from {store.uri}")


def _remote_journal(store: ObjectStore) -> bytes:
    if read_digests(store, ROOT) is None:
        return b""
    return store.read(JOURNAL) or b""
