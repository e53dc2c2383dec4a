"""The state of a campaign is rebuilt from its journal alone."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, session_on, write_file
from tune.session.session import Session
from tune.storage.journal import read_journal
from tune.storage.state import CampaignState, replay

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


def check_replay(session: Session) -> None:
    assert replay(read_journal(session.root / "journal.jsonl")) == session.state


def test_discarded_trials_leave_no_trace_until_they_start_again(tmp_path: Path, file: Path) -> None:
    with session_on(file, tmp_path / "r") as session:
        first, second = drive(begun(session), most=2)
        session.journal.append("trials_discarded", trial_ids=[first.trial_id], reason="")
        event = session.journal.append("code_kept", code_sha256="b", versions=["a"], trials={}, continued={})
    state = replay(read_journal(tmp_path / "r" / "journal.jsonl"))
    assert (list(state.results), list(state.attempts)) == ([second.trial_id], [second.trial_id])
    assert state.discarded == {first.trial_id: event["seq"] - 1}
    assert state.accepted_code == {("a", "b"): event["time"]}
    state.apply({"event": "trial_started", "time": "", "trial_id": first.trial_id, "attempt": 1})
    assert state.discarded == {} and state.attempts[first.trial_id] == 1


def test_a_replayed_journal_equals_the_live_state_at_every_moment(tmp_path: Path, file: Path) -> None:
    with session_on(file, tmp_path / "r") as session:
        check_replay(begun(session))
        first, second = next_trial(session), next_trial(session)
        assert first and second
        check_replay(session)
        session.worker_died(first.trial_id, "killed")
        check_replay(session)
        session.tell(second.trial_id, pretend(second, status="diverged"))
        check_replay(session)
        while drive(session, most=1):
            check_replay(session)
        session.end()
        check_replay(session)


def test_a_campaign_was_started_when_its_first_session_began(tmp_path: Path, file: Path) -> None:
    times, started = [], ""
    for _ in range(2):
        with session_on(file, tmp_path / "r") as session:
            drive(begun(session), most=1)
            session.stop_requested = True
            times.append(session.state.campaign["time"])
            started = session.end().started_at
    assert started == times[0] < times[1]


def test_the_environment_is_that_of_the_newest_session_that_trained(tmp_path: Path, file: Path) -> None:
    commits = []
    for commit in ("trained", "looked at"):
        with session_on(file, tmp_path / "r") as session:
            session.environment = session.environment | {"git_commit": commit}
            drive(begun(session))
            commits.append(
                (session.end().environment["git_commit"], session.state.campaign["environment"]["git_commit"])
            )
    assert commits == [("trained", "trained"), ("trained", "looked at")]


def test_a_trial_is_running_until_it_ends_or_its_worker_dies(tmp_path: Path, file: Path) -> None:
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        first, second = next_trial(session), next_trial(session)
        assert first and second
        assert list(session.state.running) == [first.trial_id, second.trial_id]
        session.worker_died(first.trial_id, "killed")
        assert list(session.state.running) == [second.trial_id]
        session.tell(second.trial_id, pretend(second))
        assert list(session.state.running) == []


def test_the_next_start_keeps_finished_and_diverged_trials_and_drops_failed_ones(tmp_path: Path, file: Path) -> None:
    statuses = iter(["finished", "failed", "diverged"])
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        for status in statuses:
            spec = next_trial(session)
            assert spec
            session.tell(spec.trial_id, pretend(spec, status=status))
        assert sorted(r["status"] for r in session.state.results.values()) == ["diverged", "failed", "finished"]
        session.stop_requested = True
        session.end()
    with session_on(file, tmp_path / "r") as session:
        assert len(session.state.results) == 3  # kept until the start is journaled
        begun(session)
        assert sorted(r["status"] for r in session.state.results.values()) == ["diverged", "finished"]


def started(second: int) -> dict[str, Any]:
    return {"event": "campaign_started", "time": f"2026-11-21T10:00:{second:02d}.000+00:00", "metric": {"name": "x"}}


def ended(second: int, seconds: float) -> dict[str, Any]:
    time = f"2026-11-21T10:00:{second:02d}.000+00:00"
    return {"event": "campaign_ended", "time": time, "status": "finished", "seconds": seconds}


def test_the_time_of_all_sessions_is_summed() -> None:
    state = replay([started(0), ended(10, 9.5), started(20), ended(25, 4.5)])
    assert (state.seconds, state.session_seconds(), state.ended) == (14.0, 0.0, True)


def test_a_session_that_was_killed_counts_up_to_its_last_event() -> None:
    last_event = {"event": "worker_died", "time": "2026-11-21T10:00:07.500+00:00", "trial_id": "t"}
    killed = replay([started(0), last_event])
    assert (killed.seconds, killed.session_seconds(), killed.ended) == (0.0, 7.5, False)
    state = replay([started(0), last_event, started(20), ended(25, 4.5)])
    assert (state.seconds, state.session_seconds()) == (12.0, 0.0)


def test_a_clock_that_jumps_changes_no_duration() -> None:
    """Durations use `elapsed`, so a jump to the day before or a year later has no effect."""
    jumps = [("2026-11-20T09:00:00.000+00:00", 5.0), ("2027-11-21T10:00:00.000+00:00", 7.5)]
    for jump, seconds in jumps:
        last_event = {"event": "worker_died", "time": jump, "trial_id": "t", "elapsed": seconds}
        state = replay([started(0) | {"elapsed": 0.0}, last_event])
        assert state.session_seconds() == seconds
        assert replay([started(0), last_event, started(20), ended(25, 4.5)]).seconds == seconds + 4.5
    old = {"event": "worker_died", "time": "2026-11-20T09:00:00.000+00:00", "trial_id": "t"}
    assert replay([started(0), old]).session_seconds() == 0.0, "an older journal has only the time of day"


def test_an_empty_journal_gives_an_empty_state() -> None:
    assert (replay([]), replay([]).session_seconds()) == (CampaignState(), 0.0)


def test_an_outcome_is_the_metric_of_the_campaign_or_missing(tmp_path: Path, file: Path) -> None:
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        first, second = next_trial(session), next_trial(session)
        assert first and second
        session.tell(first.trial_id, pretend(first))
        done, missing = session.state.outcome(first.trial_id), session.state.outcome(second.trial_id)
        assert (done.status, done.value) == ("finished", pretend(first).metrics["val_loss"])
        assert (missing.status, missing.value) == ("missing", None)
        session.tell(second.trial_id, pretend(second, status="failed"))
        failed = session.state.outcome(second.trial_id)
        assert (failed.status, failed.value) == ("failed", None)


def test_a_copy_does_not_change_with_later_events(tmp_path: Path, file: Path) -> None:
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        spec = next_trial(session)
        assert spec
        copy = session.state.copy()
        assert copy == session.state
        session.tell(spec.trial_id, pretend(spec))
        assert (list(copy.running), copy.results) == ([spec.trial_id], {})
