"""At whatever moment an upload ends, the store holds a state from which a run can be resumed."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stored_results import CHECKPOINT, METRICS, add_event, visible_files, write
from tune.remote.restore import restore
from tune.remote.store import ObjectStore, StoreError
from tune.remote.unit import read_digests
from tune.remote.upload import Uploader


def restored(store: ObjectStore, tmp_path: Path) -> dict[str, str]:
    target = tmp_path / "fresh"
    shutil.rmtree(target, ignore_errors=True)
    assert restore(store, target, checkpoints="all", message=lambda line: None)
    return visible_files(target)


def test_a_fresh_machine_gets_what_was_uploaded(root: Path, store: ObjectStore, tmp_path: Path) -> None:
    uploader = Uploader(root, store)
    uploader.upload()
    assert restored(store, tmp_path) == visible_files(root)
    add_event(root)
    write(root / METRICS, "row 10\nrow 20\n")
    write(root / CHECKPOINT.replace("10", "20"), "weights at 20")
    shutil.rmtree((root / CHECKPOINT).parent)
    uploader.upload()
    assert restored(store, tmp_path) == visible_files(root)


def test_nothing_is_uploaded_before_a_campaign_has_begun(root: Path, store: ObjectStore, bucket: Path) -> None:
    (root / "journal.jsonl").write_bytes(b'{"torn')
    Uploader(root, store).upload()
    assert not bucket.exists()


def test_only_changed_files_are_uploaded_again_also_by_the_next_run(
    root: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    Uploader(root, store).upload()
    written: list[str] = []
    monkeypatch.setattr(store, "write", lambda key, content: written.append(key))
    monkeypatch.setattr(store, "upload", lambda key, path: written.append(key))
    Uploader(root, store).upload()
    assert written == []
    write(root / METRICS, "row 10\nrow 20\n")
    Uploader(root, store).upload()
    assert written == ["trials/a-s1/.digests.json", METRICS, "trials/a-s1/.digests.json"]


def test_a_trial_that_is_set_aside_leaves_nothing_in_its_place(
    root: Path, store: ObjectStore, tmp_path: Path, bucket: Path
) -> None:
    """Otherwise a fresh machine would continue it from a checkpoint of the old code."""
    uploader = Uploader(root, store)
    uploader.upload()
    (root / "discarded").mkdir()
    (root / "trials/a-s1").rename(root / "discarded/a-s1-7")
    uploader.upload()
    assert not any(name.startswith("trials/") for name in restored(store, tmp_path))
    assert (bucket / "discarded/a-s1-7/metrics.jsonl").exists()
    write(root / METRICS, "row 1\n")  # it starts anew
    Uploader(root, store).upload()
    assert [name for name in restored(store, tmp_path) if name.startswith("trials/")] == [METRICS]


class Killed(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("n_operations", range(9))
def test_a_kill_at_any_operation_leaves_a_state_to_resume_from(
    root: Path, store: ObjectStore, tmp_path: Path, n_operations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal never names what is not there, rows are never behind a checkpoint, and all digests hold."""
    Uploader(root, store).upload()
    before = visible_files(root)
    add_event(root)
    write(root / METRICS, "row 10\nrow 20\n")
    write(root / CHECKPOINT.replace("10", "20"), "weights at 20")
    shutil.rmtree((root / CHECKPOINT).parent)
    left = [n_operations]

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("write", "upload", "delete"):
            patch.setattr(store, name, mortal(getattr(store, name)))
        try:
            Uploader(root, store).upload()
            is_whole = True
        except Killed:
            is_whole = False
    after, now = restored(store, tmp_path), visible_files(root)
    assert is_whole == (n_operations >= 8)  # four indices, two files of a trial, a removal, the journal
    if after["journal.jsonl"] == now["journal.jsonl"]:
        assert after == now
    newest = max(name for name in after if name.startswith("trials/a-s1/checkpoints/"))
    assert after[METRICS] in (before[METRICS], now[METRICS])
    if newest.endswith("step_0000020/state.pt"):
        assert after[METRICS] == now[METRICS]
    Uploader(root, store).upload()  # the next run on this machine
    assert restored(store, tmp_path) == now


def test_a_failed_upload_goes_on_at_the_next_call(
    root: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = Uploader(root, store)
    with monkeypatch.context() as patch:

        def fail(key: str, path: Path) -> None:
            raise StoreError("s3://bucket", OSError("AWS Error NETWORK_CONNECTION"))

        patch.setattr(store, "upload", fail)
        with pytest.raises(StoreError, match="cannot be reached"):
            uploader.upload()
    uploader.upload()
    assert restored(store, tmp_path) == visible_files(root)


def test_digests_are_those_of_the_files(root: Path, store: ObjectStore) -> None:
    Uploader(root, store).upload()
    digests = read_digests(store, "trials/a-s1")
    assert digests and digests["metrics.jsonl"] == [hashlib.sha256(b"row 10\n").hexdigest()]
