"""A tiny campaign for the tests of sessions: its file, its results directory, and no report."""

from pathlib import Path

import pytest

from tests.helpers.tiny_campaign import write_file


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the report, which takes half a second."""
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny"


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)
