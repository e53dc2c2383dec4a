"""Attempts of workers at one trial, one after the other and at once, that share nothing but the store."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from ngpt.training.config import TrainConfig
from tests.helpers.stored_results import visible_files, write
from tune.remote import worker
from tune.remote.store import ObjectStore, StoreError
from tune.remote.unit import read_digests, worker_unit
from tune.remote.upload import Uploader
from tune.remote.worker import StoreLost, Superseded, TrialStore, WorkerUploads, scratch_folder
from tune.trials.trial import TrialSpec

ADDRESS = "s3://bucket/tiny"
UNIT = worker_unit("a-s1")
Attempts = Callable[..., tuple[TrialStore, Path]]


@pytest.fixture
def attempts(store: ObjectStore, tmp_path: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Begins an attempt at the trial on a host; returns the store of its worker and its folder in scratch."""
    monkeypatch.setattr(worker, "open_store", lambda uri: store)
    spec = TrialSpec("a-s1", "alpha", "a", 1, tiny, tmp_path / "root/trials/a-s1", 1, 1)

    def begin(host: str, attempt: int, patience: float = 0.0) -> tuple[TrialStore, Path]:
        monkeypatch.setenv("NGPT_CACHE", str(tmp_path / host))
        kept = TrialStore(WorkerUploads(ADDRESS, 3600.0, patience))
        folder = kept.place(replace(spec, attempt=attempt)).folder
        folder.mkdir(parents=True, exist_ok=True)
        kept.begin(["a-s1"])
        return kept, folder

    return begin


def train(folder: Path, *steps: int) -> None:
    """What a trial leaves in its folder up to the last of these steps, with a checkpoint at each."""
    write(folder / "metrics.jsonl", "".join(f"row {step}\n" for step in range(steps[-1] + 1)))
    for step in steps:
        write(folder / f"checkpoints/step_{step:07d}/state.pt", f"state at {step}")


def test_an_attempt_on_another_host_goes_on_from_what_was_uploaded(attempts: Attempts) -> None:
    first, there = attempts("one", 1)
    train(there, 10)
    first.flush(["a-s1"])
    expected = visible_files(there)
    train(there, 10, 20)  # lost with its host
    _, here = attempts("two", 2)
    assert visible_files(here) == expected


def test_an_attempt_on_the_same_host_goes_on_from_scratch_that_was_not_uploaded(attempts: Attempts) -> None:
    _, there = attempts("one", 1)
    train(there, 10)
    expected = visible_files(there)
    _, here = attempts("one", 2)
    assert visible_files(here) == expected and here == there


def test_old_scratch_does_not_count_once_another_host_has_gone_on(attempts: Attempts) -> None:
    _, one = attempts("one", 1)
    train(one, 10)
    second, two = attempts("two", 2)
    train(two, 5)
    second.flush(["a-s1"])
    _, again = attempts("one", 3)
    assert visible_files(again) == visible_files(two)


def test_an_earlier_attempt_that_is_still_alive_uploads_nothing_more(attempts: Attempts, store: ObjectStore) -> None:
    first, there = attempts("one", 1)
    train(there, 10)
    first.flush(["a-s1"])
    second, here = attempts("two", 2)
    train(there, 20)
    with pytest.raises(Superseded):
        first.flush(["a-s1"])
    train(here, 10, 15)
    second.flush(["a-s1"])
    digests = read_digests(store, UNIT) or {}
    assert sorted(digests) == [f"checkpoints/step_00000{n}/state.pt" for n in (10, 15)] + ["metrics.jsonl"]


def test_a_first_attempt_takes_nothing_that_its_journal_does_not_know(attempts: Attempts, store: ObjectStore) -> None:
    """As after `--retrain`, or where the machine of the run was lost before its journal was uploaded."""
    lost, there = attempts("one", 1)
    train(there, 10)
    lost.flush(["a-s1"])
    anew, here = attempts("two", 1)
    assert visible_files(here) == {}
    train(here, 3)
    anew.flush(["a-s1"])
    assert sorted(read_digests(store, UNIT) or {}) == ["checkpoints/step_0000003/state.pt", "metrics.jsonl"]


def test_an_attempt_goes_on_from_what_the_run_itself_has_trained(
    attempts: Attempts, store: ObjectStore, root: Path
) -> None:
    Uploader(root, store).upload()
    _, here = attempts("two", 2)
    expected = {name.removeprefix("trials/a-s1/"): text for name, text in visible_files(root).items()}
    assert visible_files(here) == {name: text for name, text in expected.items() if name != "journal.jsonl"}


def test_a_damaged_checkpoint_is_left_out_and_a_damaged_log_starts_the_trial_anew(
    attempts: Attempts, store: ObjectStore, bucket: Path
) -> None:
    first, there = attempts("one", 1)
    train(there, 10, 20)
    first.flush(["a-s1"])
    write(bucket / UNIT / "checkpoints/step_0000020/state.pt", "flipped bits")
    _, here = attempts("two", 2)
    assert sorted(visible_files(here)) == ["checkpoints/step_0000010/state.pt", "metrics.jsonl"]
    write(bucket / UNIT / "metrics.jsonl", "row 7\n")
    _, here = attempts("three", 3)
    assert visible_files(here) == {}


def test_the_scratch_of_a_trial_that_is_in_the_store_is_removed_and_the_store_keeps_it(
    attempts: Attempts, store: ObjectStore
) -> None:
    first, there = attempts("one", 1)
    train(there, 10)
    first.flush(["a-s1"])
    uploading = first._kept["a-s1"]  # as the thread of the uploads has it
    first.drop(["a-s1"])
    assert not there.exists()
    first._upload(uploading)
    assert len(read_digests(store, UNIT) or {}) == 2


def test_scratch_that_somebody_has_removed_removes_nothing_from_the_store(
    attempts: Attempts, store: ObjectStore
) -> None:
    first, there = attempts("one", 1)
    train(there, 10)
    first.flush(["a-s1"])
    there.rename(there.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match="scratch of a trial has been removed"):
        first.flush(["a-s1"])
    assert len(read_digests(store, UNIT) or {}) == 2


def test_a_store_out_of_reach_is_waited_for_and_one_that_refuses_is_not(
    attempts: Attempts, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, there = attempts("one", 1)
    train(there, 10)
    read, errors = store.read, ["AWS Error NETWORK_CONNECTION"]

    def fail(key: str) -> bytes | None:
        if errors:
            raise StoreError(ADDRESS, OSError(errors.pop()))
        return read(key)

    monkeypatch.setattr(store, "read", fail)
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: None)
    kept.flush(["a-s1"], seconds=60)
    assert errors == [] and len(read_digests(store, UNIT) or {}) == 2
    train(there, 10, 20)
    errors.append("AWS Error ACCESS_DENIED")
    with pytest.raises(ConfigError, match="access is denied to these credentials"):
        kept.flush(["a-s1"], seconds=60)
    errors.append("AWS Error NETWORK_CONNECTION")
    with pytest.raises(StoreLost, match=r"the server cannot be reached \(tried for 0 s\)"):
        kept.flush(["a-s1"], seconds=0)


def test_scratch_of_killed_workers_goes_after_a_day(attempts: Attempts, tmp_path: Path) -> None:
    _, there = attempts("one", 1)
    train(there, 10)
    attempts("one", 2)
    assert there.exists()
    long_ago = time.time() - 2 * worker.STALE_SECONDS
    for path in (there, *there.iterdir()):
        os.utime(path, (long_ago, long_ago))
    TrialStore(WorkerUploads(ADDRESS, 3600.0))
    assert not there.exists() and scratch_folder(ADDRESS).exists()
