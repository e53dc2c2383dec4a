"""Whether a node can use the store of the results; tests/test_cluster_store.py asks real ones."""

import threading
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.stored_results import visible_files
from tune.cluster import node_store
from tune.cluster.node_store import StoreProbe, offer_probe, probe_store, with_patience
from tune.remote.store import ObjectStore, StoreError
from tune.remote.uri import Uri
from tune.remote.worker import WorkerUploads
from tune.spec.schema import Resources

UPLOADS = WorkerUploads("s3://bucket/tiny", 30.0)


@pytest.fixture
def probe(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreProbe:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(node_store, "open_store", lambda uri: store)
    return offer_probe(UPLOADS, Uri("s3://bucket/tiny"))


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def store(bucket: Path) -> ObjectStore:
    import pyarrow.fs

    return ObjectStore(pyarrow.fs.LocalFileSystem(), str(bucket), "s3://bucket/tiny")


def test_a_node_that_can_use_the_store_leaves_nothing_there(probe: StoreProbe, bucket: Path) -> None:
    assert probe_store(probe) is None
    assert [path.name for path in bucket.iterdir()] == [probe.key] and visible_files(bucket) == {}


def test_a_node_that_reaches_another_store_is_told(probe: StoreProbe, bucket: Path) -> None:
    (bucket / probe.key).unlink()
    assert "cannot use the store (it reaches another one under s3://bucket/tiny" in str(probe_store(probe))
    assert list(bucket.iterdir()) == []


@pytest.mark.parametrize("operation", ["read", "write", "delete"])
def test_what_is_denied_to_a_node_is_named(
    probe: StoreProbe, store: ObjectStore, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: Any) -> None:
        raise StoreError(store.uri, OSError("AWS Error ACCESS_DENIED during PutObject"))

    monkeypatch.setattr(store, operation, deny)
    problem = "cannot use the store (s3://bucket/tiny: access is denied to these credentials)"
    assert probe_store(probe) == problem


def test_a_store_that_does_not_answer_is_named(
    probe: StoreProbe, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(store, "read", lambda key: answers.wait())
    monkeypatch.setattr(node_store, "ANSWER_SECONDS", 0.1)
    assert probe_store(probe) == "cannot use the store (s3://bucket/tiny: no answer within 0 s)"
    answers.set()


def test_a_node_without_a_place_for_scratch_is_told(
    probe: StoreProbe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "file"))
    assert "cannot make its scratch folder" in str(probe_store(probe))


def test_a_run_that_cannot_write_is_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(uri: Uri) -> ObjectStore:
        raise StoreError(str(uri), OSError("AWS Error ACCESS_DENIED"))

    monkeypatch.setattr(node_store, "open_store", deny)
    with pytest.raises(ConfigError, match="access is denied"):
        offer_probe(UPLOADS, Uri("s3://bucket/tiny"))


def test_workers_give_up_before_they_count_as_hung() -> None:
    assert with_patience(UPLOADS, Resources()) == UPLOADS
    assert with_patience(UPLOADS, Resources(stall_timeout=60)).patience == 30
