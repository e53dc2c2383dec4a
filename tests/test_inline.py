"""The executor without Ray, and what a signal means."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_campaign import begun, losses, session_on, train_all, write_file

from tune.inline import run_inline, stop_on_signal
from tune.session import Session
from tune.summary import Summary


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tune.report.write_report", lambda *_: None)
    yield


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


def run_with_signal(file: Path, root: Path, number: int, *, after: int) -> tuple[Summary, Session]:
    """A run that sends itself a signal in the middle of a trial, when so many have finished."""
    with session_on(file, root) as session:
        begun(session)
        give_out, finished = session.next_trial, lambda: len(session.state.results)

        def next_trial():
            spec = give_out()
            if spec and finished() == after:
                os.kill(os.getpid(), number)
            return spec

        session.next_trial = next_trial
        run_inline(session)
        return session.end(), session


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_signal_stops_the_run_and_the_next_one_goes_on(tmp_path: Path, file: Path, number: int, after: int) -> None:
    train_all(file, tmp_path / "undisturbed")
    summary, session = run_with_signal(file, tmp_path / "tiny", number, after=after)
    assert (summary["status"], session.stop_signal) == ("interrupted", number)
    assert len(session.state.results) == after
    summary = train_all(file, tmp_path / "tiny")
    assert summary["status"] == "finished"
    assert losses(tmp_path / "tiny") == losses(tmp_path / "undisturbed")


def test_a_run_that_is_over_was_not_interrupted(tmp_path: Path, file: Path) -> None:
    summary = train_all(file, tmp_path / "tiny")
    assert (summary["status"], summary["trials"]["finished"]) == ("finished", 6)


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("tune.inline.os._exit", codes.append)
    with session_on(file, tmp_path / "tiny") as session, stop_on_signal(session):
        signal.raise_signal(signal.SIGINT)
        assert (session.stop_requested, codes) == (True, [])
        signal.raise_signal(signal.SIGTERM)
        assert codes == [128 + signal.SIGTERM]


def test_afterwards_signals_mean_what_they_meant_before(tmp_path: Path, file: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with session_on(file, tmp_path / "tiny") as session:
        with stop_on_signal(session):
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_failed_trial_does_not_end_the_run(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tune.trial

    opened = tune.trial.opened
    broken = iter([True])

    def opened_sometimes(data):
        if next(broken, False):
            raise RuntimeError("no memory left")
        return opened(data)

    monkeypatch.setattr("tune.trial.opened", opened_sometimes)
    file = write_file(tmp_path, corpus)
    summary = train_all(file, tmp_path / "tiny")
    assert (summary["status"], summary["trials"]["failed"], summary["trials"]["finished"]) == ("finished", 1, 5)
    assert "no memory left" in summary["problems"][0]["error"]
    assert train_all(file, tmp_path / "tiny")["trials"]["failed"] == 0
