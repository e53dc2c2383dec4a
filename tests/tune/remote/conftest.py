"""A store in a local folder, by another of pyarrow's file systems than S3; the tests of results use a server."""

from pathlib import Path

import pyarrow.fs
import pytest

from tests.helpers.stored_results import CHECKPOINT, METRICS, add_event, write
from tune.remote.store import ObjectStore


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """The folder of the objects of `store`."""
    return tmp_path / "bucket"


@pytest.fixture
def store(bucket: Path) -> ObjectStore:
    return ObjectStore(pyarrow.fs.LocalFileSystem(), str(bucket), "s3://bucket")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A results directory with a line in its journal, a row and a checkpoint."""
    add_event(root := tmp_path / "tiny")
    write(root / METRICS, "row 10\n")
    write(root / CHECKPOINT, "weights at 10")
    return root
