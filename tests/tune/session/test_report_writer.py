"""The report while a campaign runs: written by a thread, from what the journal holds."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_campaign import begun, drive, session_on, write_file
from tune.session.report_writer import ReportWriter
from tune.session.session import Session

PATIENCE = 120  # seconds that a loaded machine may take


@pytest.fixture
def session(tmp_path: Path, corpus: Path) -> Iterator[Session]:
    """A session whose reports are not apart from each other."""
    with session_on(write_file(tmp_path, corpus), tmp_path / "tiny") as session:
        session._reports = ReportWriter(session.root, session.message, seconds_between=0)
        yield begun(session)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert happened()


def test_the_report_is_there_once_the_first_phase_has_ended(session: Session) -> None:
    report = session.root / "report.html"
    drive(session, most=3)
    assert not report.exists()
    drive(session, most=2)  # the first phase has four trials
    until(report.exists)
    page = report.read_text()
    assert "<b>tiny</b> · running" in page and "This page is rewritten when a phase ends" in page
    assert '<section id="phase-1">' in page and not (session.root / "summary.json").exists()
    drive(session)
    session.end()
    assert "<b>tiny</b> · finished" in report.read_text()


def test_a_request_waits_until_reports_are_apart_and_the_end_does_not_wait_for_it(tmp_path: Path) -> None:
    said: list[str] = []
    writer = ReportWriter(tmp_path, said.append, seconds_between=3600)
    writer.request()
    start = time.monotonic()
    writer.close()
    assert time.monotonic() - start < 600 and said == []
    writer.request()  # after the end nothing is written any more
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_one_line_and_the_next_one_is_tried(tmp_path: Path) -> None:
    said: list[str] = []
    writer = ReportWriter(tmp_path, said.append, seconds_between=0)
    for times in (1, 2):
        writer.request()
        until(lambda times=times: len(said) == times)
    writer.close()
    assert "the report is not rewritten while the campaign runs" in said[0] and "no journal.jsonl" in said[0]
