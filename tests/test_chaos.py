"""The fault harness: a part of it runs with the tests, and its checker must find wrong results."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.disk import Disk, played, write_tree
from tests.chaos.invariants import Acknowledged, Facts, check_finished, check_stopped, facts
from tests.chaos.operations import Operation
from tests.chaos.world import CHECKPOINT, World
from tests.helpers.tiny_campaign import train_all, write_file
from tune.results.summary import write_campaign
from tune.storage.journal import read_journal
from tune.storage.state import read_state

REPOSITORY = Path(__file__).parents[1]


def chaos(*options: str) -> dict[str, Any]:
    """Runs the harness, which must find no violation."""
    command = [sys.executable, "-m", "tests.chaos", "--json", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_of_all_faults_does_not_change_the_results() -> None:
    found = chaos(
        *("--only", "failpoints", "--only", "power", "--every", "60"),
        *("--only", "bits", "--bits", "20"),
        *("--only", "kills", "--kills", "15", "--ray", "1"),
    )
    assert found["failpoints"]["operations"] > 200 and found["bits"]["tried"] == 40
    assert found["failpoints"]["tried"] >= 20 and found["power"]["tried"] >= 15
    assert found["kills"]["inline kills"] == 14 and sum(n for name, n in found["kills"].items() if "ray" in name) >= 1


# ---- the checker finds wrong results ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> World:
    """An undisturbed campaign."""
    folder = tmp_path_factory.mktemp("chaos")
    file = write_file(folder, corpus, seeds="[1]", steps=4, every=2, checkpoint=CHECKPOINT)
    train_all(file, folder / "reference" / "tiny")
    return World(folder, file, 2, folder / "reference" / "tiny")


@pytest.fixture(scope="module")
def undisturbed(made: World) -> Facts:
    return facts(made.reference)


@pytest.fixture
def root(made: World, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage."""
    shutil.copytree(made.reference, tmp_path / "tiny")
    yield tmp_path / "tiny"


def test_the_checker_accepts_a_copy_of_an_undisturbed_run(made: World, undisturbed: Facts, root: Path) -> None:
    told = Acknowledged(tuple(read_journal(root / "journal.jsonl")))
    assert check_finished(root, made, undisturbed, told) == []
    assert list(check_stopped(root, made, told)) == []


def newest(root: Path) -> Path:
    return max(root.glob("trials/*/checkpoints/step_*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_row(root: Path) -> None:
    """As if a resumed run had computed another value, consistently."""
    path = next(iter(sorted(root.glob("trials/*/metrics.jsonl"))))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["grad_norm"] = 0.5
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_campaign(root, read_state(root))


def leak_secret(root: Path) -> None:
    (root / "trials" / "note.txt").write_text("key canary0123456789abcdef0123456789abcdef01")


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of the journal": ("I1", lambda root: flip(root / "journal.jsonl")),
    "a row": ("I6 rows", change_a_row),
    "a table": ("I7", lambda root: flip(root / "alpha" / "summary.parquet")),
    "weights": ("I6 weights", lambda root: flip(newest(root) / "model.safetensors")),
    "a removed checkpoint": ("I6 weights", lambda root: shutil.rmtree(newest(root))),
    "a secret": ("I9", leak_secret),
    "a leftover file": ("I5", lambda root: (root / "alpha" / ".x.json.0a.tmp").touch()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_checker_finds(what: str, made: World, undisturbed: Facts, root: Path) -> None:
    invariant, damage = DAMAGE[what]
    damage(root)
    assert any(each.startswith(invariant) for each in check_finished(root, made, undisturbed, Acknowledged()))


def test_the_checker_finds_a_lost_event(made: World, undisturbed: Facts, root: Path) -> None:
    told = Acknowledged(tuple(read_journal(root / "journal.jsonl")))
    journal = root / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    assert any(each.startswith("I2") for each in check_stopped(root, made, told))
    assert any(each.startswith("I2") for each in check_finished(root, made, undisturbed, told))


def test_the_checker_finds_a_lost_or_torn_checkpoint(made: World, root: Path) -> None:
    last = newest(root)
    told = Acknowledged(steps={last.parents[1].name: (2, 4)})
    (last / "state.pt").write_bytes(b"")
    assert {each[:2] for each in check_stopped(root, made, told)} >= {"I4", "I8"}
    shutil.rmtree(last)
    assert {each[:2] for each in check_stopped(root, made, told)} >= {"I4", "I8"}


# ---- the disk in memory ----------------------------------------------------------------------------------------------


def crash_states(*operations: Operation) -> set[str]:
    """Each state after a power loss, as text: names with their content."""
    import random

    disk = played(operations)
    states = [tree for _, tree in disk.crash_states(random.Random(0), 60)]
    return {" ".join(f"{path}={(content or b'').decode()}" for path, content in sorted(s.items())) for s in states}


def test_a_file_synced_with_its_folder_survives_a_power_loss() -> None:
    written = (Operation("open", "a"), Operation("write", "a", data=b"xy"))
    assert crash_states(*written, Operation("fsync", "a"), Operation("fsync", ".")) == {"a=xy"}


def test_an_unsynced_file_may_be_missing_cut_off_or_zero() -> None:
    states = crash_states(Operation("open", "a"), Operation("write", "a", data=b"xy"))
    assert states == {"", "a=", "a=x", "a=xy", "a=\0\0", "a=\0y"}


def test_an_unsynced_rename_is_done_or_not() -> None:
    made = [
        Operation("open", "a"),
        Operation("write", "a", data=b"1"),
        Operation("fsync", "a"),
        Operation("fsync", "."),
    ]
    assert crash_states(*made, Operation("rename", "a", to="b")) == {"a=1", "b=1"}


def test_a_synced_file_without_a_synced_folder_may_have_no_name() -> None:
    made = (Operation("open", "a"), Operation("write", "a", data=b"1"), Operation("fsync", "a"))
    assert crash_states(*made) == {"", "a=1"}


def test_an_append_keeps_the_safe_content() -> None:
    safe = (
        Operation("open", "a"),
        Operation("write", "a", data=b"12"),
        Operation("fsync", "a"),
        Operation("fsync", "."),
    )
    states = crash_states(*safe, Operation("write", "a", offset=2, data=b"34"))
    assert states == {"a=12", "a=123", "a=1234", "a=12\0\0", "a=12\0004"}


def test_a_tree_is_written_to_the_real_disk(tmp_path: Path) -> None:
    disk = Disk()
    for operation in (Operation("mkdir", "d"), Operation("open", "d/a"), Operation("write", "d/a", data=b"x")):
        disk.apply(operation)
    write_tree(disk.tree(lambda node: node.names, lambda node: node.content), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["d"] and (tmp_path / "out" / "d" / "a").read_bytes() == b"x"
