"""Campaigns on several machines share the ledger of used seeds."""

from pathlib import Path

from tune.remote.seeds import merge_ledgers
from tune.remote.store import ObjectStore
from tune.storage.seed_ledger import SeedEntry, SeedLedger


def test_two_machines_know_the_seeds_of_each_other(store: ObjectStore, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    SeedLedger(one).add_listed(SeedEntry("first", "alpha", "family", (1, 2)))
    SeedLedger(two).add_listed(SeedEntry("second", "alpha", "family", (3,)))
    for machine in (one, two, one):
        merge_ledgers(store, machine)
    for machine in (one, two):
        assert [entry.seeds for entry in SeedLedger(machine).entries()] == [(1, 2), (3,)]
    assert SeedLedger(two).add_listed(SeedEntry("third", "alpha", "family", (2, 4))) == {2}


def test_a_line_that_a_crash_has_torn_is_not_shared(store: ObjectStore, tmp_path: Path) -> None:
    SeedLedger(tmp_path).add_listed(SeedEntry("first", "alpha", "family", (1,)))
    with (tmp_path / "seeds.jsonl").open("ab") as file:
        file.write(b'{"campaign": "x')
    merge_ledgers(store, tmp_path)
    assert (store.read("seeds.jsonl") or b"").count(b"\n") == 1
    assert SeedLedger(tmp_path).entries()[0].seeds == (1,)
