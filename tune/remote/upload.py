"""Uploads a results directory, so that its copy in the store is at any time one from which a run can be resumed.

The journal is read first and uploaded last, so each result in it has its files there. In a trial, the files beside the
checkpoints are read after the checkpoints are listed, and uploaded before them, so no checkpoint is ahead of its rows.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tune.remote.store import ObjectStore
from tune.remote.unit import (
    DISCARDED,
    ROOT,
    TRIALS,
    DamagedUnit,
    Digests,
    Stamps,
    complete_lines,
    is_checkpoint,
    is_journal,
    object_key,
    read_digests,
    read_stamps,
    scan,
    unit_folder,
    write_digests,
    write_stamps,
)
from tune.storage.journal import JOURNAL

UPLOADS = 8  # units at a time
REMOVED = (-1, -1)  # the stamp of a file that has gone


class Uploader:
    """Makes the copy in `store` equal to the results directory `root`; `check` is called before each unit."""

    def __init__(self, root: Path, store: ObjectStore, *, check: Callable[[], None] = lambda: None) -> None:
        self._root, self._store, self._check = root, store, check
        self._digests: dict[str, Digests] = {}  # by unit, as in the store
        self._trials: set[str] | None = None  # units that the store may have, once it was asked

    def upload(self) -> None:
        """Uploads what has changed since the last call.

        Raises:
            StoreError: the store cannot be reached. The next call goes on.
        """
        journal = complete_lines(self._root / JOURNAL)
        if not journal:  # nothing has begun
            return
        here = {f"{TRIALS}/{path.name}" for path in _folders(self._root / TRIALS)}
        aside = {f"{DISCARDED}/{path.name}" for path in _folders(self._root / DISCARDED)}
        if self._trials is None:
            self._trials = {f"{TRIALS}/{name}" for name in self._store.folders(TRIALS)}
        self._trials |= here
        with ThreadPoolExecutor(UPLOADS) as pool:
            tuple(pool.map(self.upload_unit, sorted(self._trials | aside)))
        self._trials = here
        self.upload_unit(ROOT, journal)

    def upload_unit(self, unit: str, journal: bytes | None = None) -> None:
        """Uploads what has changed in one unit; of the campaign's own, the content of the `journal` is given.

        Raises:
            StoreError: as `upload`.
        """
        self._check()
        folder = unit_folder(self._root, unit)
        found = scan(folder, is_root=unit == ROOT)
        if journal is not None:
            found[JOURNAL] = (len(journal), 0)
        known = read_stamps(self._root, unit)
        if known is None:  # a new folder: what only the store has is removed there
            known = dict.fromkeys(self._digests_of(unit), REMOVED)
        changed = [path for path, stamp in found.items() if known.get(path) != stamp]
        gone = [path for path, stamp in known.items() if stamp is not None and path not in found]
        if not changed and not gone:
            return
        digests = self._digests_of(unit)
        changed = [path for path in found if path in changed or path not in digests]
        # Read before anything is uploaded, but after the checkpoints were listed.
        contents = {path: self._read(folder / path, path, journal, unit) for path in changed}
        for path in [path for path, content in contents.items() if content is None]:  # removed by the trial
            del contents[path]
            found[path] = REMOVED
        self._replace(unit, folder, {path: content for path, content in contents.items() if content is not None})
        for path in gone:
            digests.pop(path, None)
        write_digests(self._store, unit, digests)
        for path in gone:
            self._store.delete(object_key(unit, path))
        only_there: Stamps = {path: None for path, stamp in known.items() if stamp is None}
        write_stamps(self._root, unit, only_there | found)

    def _replace(self, unit: str, folder: Path, contents: dict[str, tuple[str, bytes | None]]) -> None:
        """Uploads files of a unit, given their digests and the content of all but checkpoints."""
        digests = self._digests_of(unit)
        replaced = {path: digest for path, (digest, _) in contents.items() if path in digests}
        for path, digest in replaced.items():
            digests[path] = [*dict.fromkeys([*digests[path], digest])]
        if replaced:
            write_digests(self._store, unit, digests)
        for path in sorted(contents, key=lambda path: (is_checkpoint(path), path)):
            digest, content = contents[path]
            if content is not None:
                self._store.write(object_key(unit, path), content)
            else:
                try:
                    self._store.upload(object_key(unit, path), folder / path)
                except FileNotFoundError:  # an old checkpoint, removed by the trial
                    continue
            digests[path] = [digest]

    def _read(self, path: Path, name: str, journal: bytes | None, unit: str) -> tuple[str, bytes | None] | None:
        """The digest of a file, and its content unless it is a checkpoint; None if it has gone."""
        try:
            if is_checkpoint(name):
                with path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest(), None
            content = journal if journal is not None and is_journal(unit, name) else path.read_bytes()
        except FileNotFoundError:
            return None
        return hashlib.sha256(content).hexdigest(), content

    def _digests_of(self, unit: str) -> Digests:
        if unit not in self._digests:
            try:
                self._digests[unit] = read_digests(self._store, unit) or {}
            except DamagedUnit:  # written anew
                self._digests[unit] = {}
        return self._digests[unit]


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        return []
