"""Where a campaign stands: the same from its own process and from any other, at any moment, dead or alive."""

import json
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import HeartbeatWriter
from tests.helpers import ROOT
from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, session_on, strict, write_file
from tune.results.status import is_locked, read_snapshot
from tune.trials.trial import TrialSpec

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tiny"


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


def test_before_the_first_trial_the_plan_is_all_there_is(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        snapshot = begun(session).snapshot()
    assert (snapshot.status, snapshot.done, snapshot.total, snapshot.total_is_final) == ("running", 0, 8, False)
    assert (snapshot.phase, snapshot.eta, snapshot.best, snapshot.running) == (None, None, None, ())


def test_a_campaign_in_the_middle_is_counted_phase_by_phase(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=5)
        spec = next_trial(session)
        assert spec
        snapshot = session.snapshot()
    assert (snapshot.phase, snapshot.phase_number, snapshot.n_phases) == ("projection", 2, 2)
    assert (snapshot.done, snapshot.total, snapshot.total_is_final, snapshot.unsuccessful) == (7, 8, True, 0)
    assert [phase.winner for phase in snapshot.phases] == ["alpha=0.4"]
    assert [trial.trial_id for trial in snapshot.running] == [spec.trial_id]
    assert snapshot.eta == 2.0  # what a trial took, for the one that is left, on one worker


def test_the_best_arm_is_the_leader_of_those_with_most_seeds(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), lambda spec: pretend(spec, gain=-1.0), most=3)
        best = session.snapshot().best
    assert best is not None and (best[0], best[2]) == ("alpha=0.05", 2)
    assert best[1] == pytest.approx(5.0 + 0.05 + 0.15, abs=1e-3)


def test_another_process_sees_what_the_running_one_sees(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=3)
        next_trial(session)
        mine, theirs = asdict(session.snapshot()), asdict(read_snapshot(root))
        for view in (mine, theirs):
            assert view.pop("elapsed") >= 0
        assert mine == theirs


def test_a_snapshot_is_strict_json(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), lambda spec: pretend(spec, status="failed" if spec.seed == 1 else "diverged"))
        session.end()
    assert strict(json.dumps(asdict(read_snapshot(root)), allow_nan=False))["unsuccessful"] == 8


def test_progress_is_read_from_what_the_trial_has_logged_so_far(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        spec = next_trial(begun(session))
        assert spec
        assert session.snapshot().running[0].step == 0  # it has no file yet
        spec.folder.mkdir(parents=True)
        rows = '{"step": 0, "val_loss": 6.5}\n{"step": 1, "train_loss": 6.25}\n{"step": 2, "train'
        (spec.folder / "metrics.jsonl").write_text(rows)
        running = session.snapshot().running[0]
    assert (running.step, running.steps, running.train_loss, running.val_loss) == (1, 6, 6.25, 6.5)
    assert running.tokens_per_second is None


def test_between_two_rows_the_heartbeat_says_how_far_a_trial_is(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=5)
        spec = next_trial(session)
        assert spec
        advance(spec, 1)
        with HeartbeatWriter(spec.folder) as heartbeat:
            heartbeat.beat(3)
            snapshot = session.snapshot()
        assert session.snapshot().running[0].step == 1
    assert snapshot.running[0].step == 3
    assert snapshot.eta == pytest.approx(1.0)  # half of 2 s


def advance(spec: TrialSpec, step: int, **more: float) -> None:
    spec.folder.mkdir(parents=True, exist_ok=True)
    (spec.folder / "metrics.jsonl").write_text(json.dumps({"step": step} | more) + "\n")


def test_what_running_trials_have_behind_them_is_not_left(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session, workers=2), most=2)  # they took 2 s each; two are left, and two of the phase after them
        first, second = next_trial(session), next_trial(session)
        assert first and second
        assert session.snapshot().eta == pytest.approx(4.0)
        advance(first, 3)  # of 6 steps
        assert session.snapshot().eta == pytest.approx(4.0)  # the next phase waits for both
        advance(second, 6)
        assert session.snapshot().eta == pytest.approx(3.0)


def test_the_last_trial_is_not_shared_by_idle_workers(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session, workers=4), most=5)
        spec = next_trial(session)
        assert spec and session.snapshot().eta == pytest.approx(2.0)
        advance(spec, 3)
        assert session.snapshot().eta == pytest.approx(1.0)


def test_before_a_trial_has_ended_the_running_ones_say_how_long_it_takes(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        spec = next_trial(begun(session))
        assert spec and session.snapshot().eta is None
        advance(spec, 2, tokens=128, tokens_per_second=16.0)
        seconds = 24 + 3 * 128 / 3 / 16  # 6 steps of 64 tokens, and three evaluations, a third as long per token
        assert session.snapshot().eta == pytest.approx(seconds * (6 - 1 / 3))  # of eight, two are in both phases


def test_after_the_end_nothing_runs_and_nothing_is_left(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session))
        session.end()
    snapshot = read_snapshot(root)
    assert (snapshot.status, snapshot.done, snapshot.total, snapshot.eta) == ("finished", 8, 8, None)
    assert (snapshot.phase, snapshot.running, len(snapshot.phases)) == (None, (), 2)


def test_what_earlier_sessions_trained_counts_as_reused(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=3)
        session.stop_requested = True
        session.end()
    assert read_snapshot(root).status == "interrupted"
    with session_on(file, root) as session:
        drive(begun(session), most=1)
        snapshot = session.snapshot()
    # Phase alpha is done; of its winner, which is the next phase's baseline, one seed is from the first session.
    assert (snapshot.done, snapshot.reused) == (4 + 2, 3 + 1)


def test_a_killed_campaign_does_not_look_alive(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=2)
        next_trial(session)  # and no campaign_ended follows
    journal = root / "journal.jsonl"
    started = json.loads(journal.read_text().splitlines()[0])["time"]
    assert datetime.now(UTC) - datetime.fromisoformat(started) < timedelta(minutes=5)
    snapshot = read_snapshot(root)
    assert (snapshot.status, snapshot.running, snapshot.eta) == ("incomplete", (), None)
    assert snapshot.elapsed == session.state.session_seconds()


def test_the_time_of_earlier_sessions_counts(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=2)
        session.stop_requested = True
        assert session._started is not None
        session._started -= 100.0  # it has taken that long
        session.end()
    with session_on(file, root) as session:
        assert begun(session).snapshot().elapsed >= 100.0


def test_a_directory_is_locked_while_a_session_has_it(root: Path, file: Path) -> None:
    assert not is_locked(root)
    assert not root.exists()
    with session_on(file, root):
        assert is_locked(root)
    assert not is_locked(root)


def test_who_only_looks_does_not_wait_for_torch() -> None:
    modules = "run_campaign, tune.results.status, tune.terminal.live, ngpt.data.tokens.shards"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_a_folder_without_a_campaign_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a results directory"):
        read_snapshot(tmp_path)
