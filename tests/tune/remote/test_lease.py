"""One run at a time writes to results in a store, and a killed one does not keep them."""

import threading
from pathlib import Path

import pytest

from tune.remote import lease as leases
from tune.remote.lease import Lease, is_leased, read_holder
from tune.remote.store import ObjectStore
from tune.storage.lock import ResultsLocked

LONG = 600.0  # seconds that no test waits for


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)


def test_a_second_run_is_refused_until_the_first_has_ended(store: ObjectStore, tmp_path: Path) -> None:
    first = Lease(store, tmp_path / "first", seconds=LONG)
    second = Lease(store, tmp_path / "second", seconds=LONG)
    first.acquire()
    assert is_leased(store)
    with pytest.raises(ResultsLocked, match=r"in use by another run \(process \d+ on .*\); if it is gone, .* in \d+ s"):
        second.acquire()
    assert (holder := read_holder(store)) and holder.owner == (tmp_path / "first").read_text()
    first.release()
    assert not is_leased(store)
    second.acquire()
    second.release()


def test_the_same_machine_goes_on_at_once_after_a_kill(store: ObjectStore, tmp_path: Path) -> None:
    killed = Lease(store, tmp_path / "owner", seconds=LONG)
    killed.acquire()
    again = Lease(store, tmp_path / "owner", seconds=LONG)
    again.acquire()
    again.release()
    killed.release()  # finds that the lease has gone
    assert read_holder(store) is None


def test_a_lease_that_is_not_renewed_ends(store: ObjectStore, tmp_path: Path) -> None:
    store.write(leases.KEY, b'{"owner": "gone", "host": "far", "pid": 7, "seconds": 0}')
    assert not is_leased(store)
    lease = Lease(store, tmp_path / "owner", seconds=LONG)
    lease.acquire()
    lease.release()


def test_a_run_whose_lease_was_taken_is_stopped_and_leaves_it(store: ObjectStore, tmp_path: Path) -> None:
    lost = threading.Event()
    lease = Lease(store, tmp_path / "owner", seconds=0.3, on_lost=lost.set)
    lease.acquire()
    lease.check()
    taken = b'{"owner": "new", "host": "far", "pid": 7, "seconds": 600}'
    while not lost.wait(0.05):  # a renewal may come between
        store.write(leases.KEY, taken)
    with pytest.raises(ResultsLocked, match=r"taken over by another run \(process 7 on far"):
        lease.check()
    lease.release()
    assert store.read(leases.KEY) == taken


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"owner": 1}', b'{"owner": "a", "host": "b", "pid": 1, "seconds": 1e9}'])
def test_a_lease_that_makes_no_sense_is_none(store: ObjectStore, raw: bytes) -> None:
    store.write(leases.KEY, raw)
    assert read_holder(store) is None
