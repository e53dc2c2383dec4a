"""The lease of results in an object store, so that one campaign at a time writes to them.

Object stores have no locks, and pyarrow has no conditional put. So a run writes an object with its name, waits, and
reads it again; while it runs, it renews the object. Others wait until the object is too old, by the store's own clock.
docs/reliability.md says what this does not promise.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ngpt.config.base import printable
from ngpt.system.atomic_files import read_regular, write_atomic
from tune.remote.store import ObjectStore, StoreError
from tune.storage.lock import ResultsLocked

KEY = "campaign.lease"
SETTLE_SECONDS = 2.0  # between writing a lease and reading it again, for another run that starts at the same time


@dataclass(frozen=True)
class Holder:
    """Who holds a lease; `seconds` after the last renewal it is free."""

    owner: str
    host: str
    pid: int
    seconds: float

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"


class Lease:
    """The lease of the results in `store`, held by the owner that `owner_file` names.

    Args:
        owner_file: keeps the name of the owner, so that a run which is killed can go on at once on the same machine.
            The caller holds a lock of that machine.
        on_lost: called once, by another thread, if another run has taken the lease.
    """

    def __init__(
        self, store: ObjectStore, owner_file: Path, *, seconds: float, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._on_lost = store, on_lost
        self._me = Holder(_owner(owner_file), socket.gethostname(), os.getpid(), seconds)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self.lost_to: Holder | None = None

    def acquire(self) -> None:
        """Takes the lease and keeps renewing it.

        Raises:
            ResultsLocked: another run holds it.
            StoreError: the store cannot be read or written.
        """
        holder = read_holder(self._store)
        is_mine = holder is not None and holder.owner == self._me.owner
        if holder and not is_mine and (left := self._seconds_left(holder)) > 0:
            hint = f"if it is gone, run the same command again in {left:.0f} s"
            raise ResultsLocked(f"{self._store.uri} is in use by another run ({holder}); {hint}")
        self._write()
        if not is_mine:
            time.sleep(SETTLE_SECONDS)
        if (holder := read_holder(self._store)) and holder.owner != self._me.owner:
            raise ResultsLocked(f"{self._store.uri} is in use by another run ({holder}), which started now")
        self._thread.start()

    def check(self) -> None:
        """Raises ResultsLocked if another run has taken the lease."""
        if self.lost_to:
            text = f"{self._store.uri} was taken over by another run ({self.lost_to}) while this one could not reach it"
            raise ResultsLocked(f"{text}; this run has stopped")

    def release(self) -> None:
        """Gives the lease back, so that another run can start at once."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self.lost_to and (holder := read_holder(self._store)) and holder.owner == self._me.owner:
            self._store.delete(KEY)

    def _renew(self) -> None:
        while not self._over.wait(self._me.seconds / 3):
            try:
                holder = read_holder(self._store)
                if holder and holder.owner != self._me.owner:
                    self.lost_to = holder
                    self._on_lost()
                    return
                self._write()
            except StoreError:  # tried again soon; the uploads say that the store cannot be reached
                continue

    def _write(self) -> None:
        self._store.write(KEY, json.dumps(asdict(self._me)).encode())

    def _seconds_left(self, holder: Holder) -> float:
        """How long a lease stays valid. Both times are of the store, since clocks of machines differ."""
        probe = f".clock-{self._me.owner}"
        self._store.write(probe, b"clock")
        try:
            now, renewed = self._store.modified(probe), self._store.modified(KEY)
        finally:
            self._store.delete(probe)
        return holder.seconds - (now - renewed).total_seconds() if now and renewed else 0.0


def read_holder(store: ObjectStore) -> Holder | None:
    """Who holds the lease of the results in `store`; None if nobody does, or the object makes no sense."""
    try:
        fields = json.loads(store.read(KEY) or b"null")
        holder = Holder(str(fields["owner"]), str(fields["host"]), int(fields["pid"]), float(fields["seconds"]))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    return holder if 0 <= holder.seconds <= 86400 else None


def is_leased(store: ObjectStore) -> bool:
    """Whether a run seems to hold the lease, by the clock of this machine: who only reads cannot ask the store's."""
    holder, renewed = read_holder(store), store.modified(KEY)
    return holder is not None and renewed is not None and (datetime.now(UTC) - renewed).total_seconds() < holder.seconds


def _owner(path: Path) -> str:
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex)
    return read_regular(path).decode()
