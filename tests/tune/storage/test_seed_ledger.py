"""The ledger of used seeds: nothing is drawn or counted twice, whatever happens between two calls."""

import json
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tune.storage.seed_ledger import LEDGER_FILE, SeedEntry, SeedLedger, plan_content

CONFIRM = SeedEntry("one", "confirm", "family", content="c1", question="q")


def unused(seen: Collection[int], look: int) -> tuple[int, ...]:
    """The two smallest seeds that have not been seen."""
    return tuple([seed for seed in range(100) if seed not in seen][:2])


def enter(folder: Path, entry: SeedEntry = CONFIRM, **changes: object) -> SeedEntry:
    return SeedLedger(folder).enter(replace(entry, **changes), unused)[0]


def test_seeds_of_a_family_are_drawn_once(tmp_path: Path) -> None:
    assert enter(tmp_path).seeds == (0, 1)
    assert enter(tmp_path, content="c2").seeds == (2, 3)
    assert enter(tmp_path, campaign="two").seeds == (4, 5)
    assert enter(tmp_path, content="c3", family="other").seeds == (0, 1)


def test_the_same_phase_gets_the_same_entry_however_often_it_asks(tmp_path: Path) -> None:
    first = enter(tmp_path)
    assert [enter(tmp_path) for _ in range(3)] == [first] * 3
    assert len((tmp_path / LEDGER_FILE).read_text().splitlines()) == 1


def test_confirmations_of_a_question_are_counted_over_campaigns(tmp_path: Path) -> None:
    looks = [enter(tmp_path, content=content).look for content in ("c1", "c2", "c1", "c3")]
    assert looks == [1, 2, 1, 3]
    assert enter(tmp_path, campaign="two").look == 4
    assert enter(tmp_path, campaign="two", question="another", content="c9").look == 1
    assert enter(tmp_path, question=None, content="c8").look == 0


def test_listed_seeds_count_as_seen(tmp_path: Path) -> None:
    ledger, listed = SeedLedger(tmp_path), SeedEntry("one", "alpha", "family", (0, 1, 2))
    assert ledger.add_listed(listed) == set()
    assert enter(tmp_path).seeds == (3, 4)
    assert ledger.add_listed(replace(listed, phase="beta", seeds=(2, 3, 9))) == {2, 3}
    assert ledger.add_listed(listed) == {2}  # those of other phases, not its own
    assert len(ledger.entries()) == 3


def test_a_line_that_a_crash_has_torn_is_cut_off(tmp_path: Path) -> None:
    first, path = enter(tmp_path), tmp_path / LEDGER_FILE
    whole = path.read_bytes()
    enter(tmp_path, content="c2")
    torn = path.read_bytes()[:-20]
    path.write_bytes(torn)
    assert SeedLedger(tmp_path).entries() == [first]
    assert enter(tmp_path, content="c3").look == 2
    assert path.read_bytes().startswith(whole) and len(path.read_text().splitlines()) == 2
    assert all("crc" in json.loads(line) for line in path.read_text().splitlines())


def test_a_line_that_was_edited_is_named_and_ignored(tmp_path: Path) -> None:
    enter(tmp_path)
    second, path = enter(tmp_path, content="c2"), tmp_path / LEDGER_FILE
    path.write_text(path.read_text().replace('"look": 1', '"look": 9'))
    ledger = SeedLedger(tmp_path)
    assert ledger.entries() == [second]
    assert ledger.damaged == [1]


def test_several_processes_never_draw_the_same_seed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.tune.storage.test_seed_ledger import enter;"
        "[enter(Path(sys.argv[1]), campaign=sys.argv[2], content=str(i)) for i in range(5)]"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen([*command, str(name)], cwd=ROOT) for name in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    entries = SeedLedger(tmp_path).entries()
    assert len({seed for entry in entries for seed in entry.seeds}) == 2 * len(entries) == 30
    assert sorted(entry.look for entry in entries) == list(range(1, 16))


def test_a_ledger_that_cannot_be_written_raises_os_error(tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(OSError):
        enter(tmp_path)


def test_the_content_of_a_plan_ignores_the_order_of_its_arms() -> None:
    assert plan_content(["a", "b"], 4) == plan_content(["b", "a", "a"], 4)
    assert len({plan_content(["a"], 4), plan_content(["a"], None), plan_content(["b"], 4)}) == 3
