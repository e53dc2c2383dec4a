"""The ledger of used seeds in a store, which the campaigns under one address share (tune/storage/seed_ledger.py)."""

from pathlib import Path

from filelock import FileLock

from ngpt.system.atomic_files import write_atomic
from tune.remote.store import ObjectStore
from tune.remote.unit import complete_lines
from tune.storage.seed_ledger import LEDGER_FILE, LEDGER_LOCK


def merge_ledgers(store: ObjectStore, folder: Path) -> None:
    """Adds the entries of the ledger in `store` to that in the local `folder`, and the other way round.

    Two campaigns may do so at once: then entries of one are missing in the store until it merges again.
    """
    path = folder / LEDGER_FILE
    with FileLock(folder / LEDGER_LOCK):
        here = complete_lines(path)
        there = store.read(LEDGER_FILE) or b""
        merged = b"".join(dict.fromkeys([*there.splitlines(keepends=True), *here.splitlines(keepends=True)]))
        if merged != here:
            write_atomic(path, merged)
    if merged != there:
        store.write(LEDGER_FILE, merged)
