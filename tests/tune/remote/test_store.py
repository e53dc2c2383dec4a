"""Objects of a store, and what its errors say. tests/tune/remote/test_results.py uses a server."""

import hashlib
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from tune.remote.store import ObjectStore, StoreError, open_store, refusing
from tune.remote.uri import Uri


def test_an_object_is_replaced_read_and_removed(store: ObjectStore, bucket: Path) -> None:
    assert store.read("a/b") is None
    store.write("a/b", b"one")
    store.write("a/b", b"two")
    assert store.read("a/b") == b"two"
    assert [path.name for path in (bucket / "a").iterdir()] == ["b"]  # no temporary object stays
    store.delete("a/b")
    store.delete("a/b")
    assert store.read("a/b") is None


def test_a_file_of_several_blocks_is_the_same_after_a_round_trip(store: ObjectStore, tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "here").write_bytes(content)
    store.upload("trials/a/state.pt", tmp_path / "here")
    assert store.download("trials/a/state.pt", tmp_path / "there") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "there").read_bytes() == content
    assert store.download("trials/a/none", tmp_path / "there") is None
    with pytest.raises(FileNotFoundError):
        store.upload("trials/a/state.pt", tmp_path / "gone")


def test_folders_are_listed_and_times_are_of_the_store(store: ObjectStore) -> None:
    assert store.folders("trials") == []
    assert store.modified("trials/a/x") is None
    for name in ("trials/b/x", "trials/a/x", "trials/y"):
        store.write(name, b"")
    assert store.folders("trials") == ["a", "b"]
    assert store.modified("trials/a/x") is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("When reading: AWS Error NO_SUCH_BUCKET during GetObject: The ... (Request ID: 1)", "there is no such bucket"),
        ("AWS Error NETWORK_CONNECTION during HeadBucket: curlCode: 7", "the server cannot be reached"),
        ("AWS Error ACCESS_DENIED during PutObject operation", "access is denied to these credentials"),
        ("Unable to load libjvm\ndlopen failed\nand more", "Unable to load libjvm"),
    ],
)
def test_an_error_of_the_server_is_one_line(text: str, reason: str) -> None:
    assert str(StoreError("s3://bucket/x", OSError(text))) == f"s3://bucket/x: {reason}"


def test_a_key_in_an_error_is_not_repeated() -> None:
    error = StoreError("s3://bucket/x", OSError("bad request by AKIAIOSFODNN7EXAMPLE"))
    assert "AKIA" not in str(error)


def test_only_what_waiting_does_not_mend_is_refused() -> None:
    with pytest.raises(ConfigError, match="access is denied"), refusing():
        raise StoreError("s3://bucket", OSError("AWS Error ACCESS_DENIED during PutObject operation"))
    with pytest.raises(StoreError), refusing():
        raise StoreError("s3://bucket", OSError("AWS Error SLOW_DOWN during PutObject operation"))


@pytest.mark.parametrize("text", ["s3://key:a-secret@bucket/x?colour=red", "hdfs://nowhere:1/x?a=b"])
def test_an_address_that_pyarrow_cannot_use_is_one_line_without_credentials(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(Uri(text))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(str(Uri(text))) and "a-secret" not in line
