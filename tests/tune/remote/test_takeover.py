"""A run that trains in its own folder goes on from what workers on other hosts have left in the store."""

from pathlib import Path

import pytest

from tests.helpers.stored_results import CHECKPOINT, METRICS, add_event, visible_files, write
from tune.remote.store import ObjectStore
from tune.remote.takeover import copy_checkpoints, find_elsewhere, remove_worker_units, take_over
from tune.remote.unit import read_digests, worker_unit
from tune.remote.upload import Uploader
from tune.storage.state import CampaignState
from tune.trials.trial import has_checkpoint

TRIAL = "a-s1"


@pytest.fixture
def scratch(tmp_path: Path, store: ObjectStore) -> Path:
    """What a worker has uploaded of the trial: rows and checkpoints up to step 20."""
    folder = tmp_path / "scratch" / worker_unit(TRIAL)
    write(folder / "metrics.jsonl", "row 10\nrow 20\n")
    for step in (10, 20):
        write(folder / f"checkpoints/step_{step:07d}/state.pt", f"weights at {step}")
    Uploader(tmp_path / "scratch", store).upload_unit(worker_unit(TRIAL))
    return folder


@pytest.fixture
def messages() -> list[str]:
    return []


def state(status: str = "") -> CampaignState:
    return CampaignState(attempts={TRIAL: 1}, results={TRIAL: {"status": status}} if status else {})


def test_a_newer_checkpoint_of_a_worker_is_taken_over_with_its_rows(
    scratch: Path, store: ObjectStore, root: Path, messages: list[str]
) -> None:
    write(root / METRICS, "row 10\n")
    assert find_elsewhere(store, root, state(), everything=False) == [TRIAL]
    take_over(store, root, TRIAL, message=messages.append)
    assert visible_files(root / "trials" / TRIAL) == visible_files(scratch) and messages == []
    Uploader(root, store).upload()
    remove_worker_units(store, [TRIAL])
    assert not read_digests(store, worker_unit(TRIAL))
    assert len(read_digests(store, f"trials/{TRIAL}") or {}) == 3


def test_an_older_checkpoint_of_a_worker_changes_nothing(
    scratch: Path, store: ObjectStore, root: Path, messages: list[str]
) -> None:
    write(root / CHECKPOINT.replace("10", "30"), "weights at 30")
    write(root / METRICS, "row 10\nrow 30\n")
    before = visible_files(root)
    take_over(store, root, TRIAL, message=messages.append)
    assert visible_files(root) == before


def test_checkpoints_that_are_only_in_the_store_count_like_those_here(
    scratch: Path, store: ObjectStore, tmp_path: Path
) -> None:
    """So that a run asks what to do with them if the code has changed."""
    add_event(fresh := tmp_path / "fresh")
    assert not has_checkpoint(fresh / "trials" / TRIAL)
    find_elsewhere(store, fresh, state(), everything=False)
    assert has_checkpoint(fresh / "trials" / TRIAL)
    remove_worker_units(store, [TRIAL])
    assert find_elsewhere(store, fresh, state(), everything=False) == []
    assert not has_checkpoint(fresh / "trials" / TRIAL)


def test_trials_that_have_ended_keep_their_checkpoints_where_they_are(
    scratch: Path, store: ObjectStore, root: Path
) -> None:
    assert find_elsewhere(store, root, state("finished"), everything=False) == []
    assert find_elsewhere(store, root, state("finished"), everything=True) == [TRIAL]
    assert find_elsewhere(store, root, state("stopped"), everything=False) == [TRIAL]


def test_damaged_rows_leave_the_trial_as_it_is_here(
    scratch: Path, store: ObjectStore, bucket: Path, root: Path, messages: list[str]
) -> None:
    write(bucket / worker_unit(TRIAL) / "metrics.jsonl", "row 99\n")
    before = visible_files(root)
    take_over(store, root, TRIAL, message=messages.append)
    assert visible_files(root) == before
    (line,) = messages
    assert f"{worker_unit(TRIAL)}/metrics.jsonl does not match its digest and is left out" in line


def test_a_copy_to_verify_has_the_checkpoints_of_workers(
    scratch: Path, store: ObjectStore, tmp_path: Path, messages: list[str]
) -> None:
    write(copy := tmp_path / "copy" / METRICS, "row 10\nrow 20\n")
    copy_checkpoints(store, tmp_path / "copy", message=messages.append)
    assert visible_files(copy.parent) == visible_files(scratch)
