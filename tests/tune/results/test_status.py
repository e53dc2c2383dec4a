"""Where a campaign stands: the same from its own process and from any other, at any moment, dead or alive."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import scipy.stats

import run_campaign
from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import HeartbeatWriter, host_name
from tests.helpers import ROOT
from tests.helpers.real_run import start
from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, session_on, strict, write_file
from tests.tune.terminal.test_live import printed
from tune.results.phase_summary import arms_so_far
from tune.results.snapshot import ArmSoFar
from tune.results.status import MetricsTail, is_locked, read_snapshot
from tune.session.session import Session
from tune.storage.activity import ACTIVITY
from tune.storage.state import CampaignState, PhaseState
from tune.terminal.live import live_view
from tune.trials.trial import TrialResult, TrialSpec

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
    assert (snapshot.status, snapshot.done, snapshot.total, snapshot.total_is_final) == ("running", 0, 6, False)
    assert (snapshot.phase, snapshot.eta, snapshot.best, snapshot.running) == (None, None, None, ())


def test_a_campaign_in_the_middle_is_counted_phase_by_phase(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=5)
        spec = next_trial(session)
        assert spec
        snapshot = session.snapshot()
    assert (snapshot.phase, snapshot.phase_number, snapshot.n_phases) == ("projection", 2, 2)
    assert (snapshot.done, snapshot.total, snapshot.total_is_final, snapshot.unsuccessful) == (5, 6, True, 0)
    assert [phase.winner for phase in snapshot.phases] == ["alpha=0.4"]
    assert [trial.trial_id for trial in snapshot.running] == [spec.trial_id]
    assert snapshot.eta == 2.0  # what a trial took, for the one that is left, on one worker


def test_a_trial_without_a_place_in_the_cluster_is_waiting_and_not_training(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session, workers=2)
        first, second = next_trial(session), next_trial(session)
        assert first and second
        session.set_waiting([second.trial_id])
        for snapshot in (session.snapshot(), read_snapshot(root)):
            assert [trial.trial_id for trial in snapshot.running] == [first.trial_id]
            assert [trial.trial_id for trial in snapshot.waiting] == [second.trial_id]


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
    assert strict(json.dumps(asdict(read_snapshot(root)), allow_nan=False))["unsuccessful"] == 6


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
    assert (snapshot.status, snapshot.done, snapshot.total, snapshot.eta) == ("finished", 6, 6, None)
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
    # Phase alpha is done; the trials of its winner, which is the next phase's baseline, count once.
    assert (snapshot.done, snapshot.reused) == (4, 3)


def test_a_killed_campaign_does_not_look_alive(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=2)
        next_trial(session)  # and no campaign_ended follows
    journal = root / "journal.jsonl"
    started = json.loads(journal.read_text().splitlines()[0])["time"]
    assert datetime.now(UTC) - datetime.fromisoformat(started) < timedelta(minutes=5)
    snapshot = read_snapshot(root)
    assert (snapshot.status, snapshot.running, snapshot.eta) == ("incomplete", (), None)
    assert snapshot.resume == session.state.campaign["command"]
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


# ---- arms so far ---------------------------------------------------------------------------------------------------

THREE_SEEDS = """
  - name: alpha
    seeds: [1, 2, 3, 4]
    vary: {alpha: [0.05, 0.2, 0.4]}
"""


def scores(session: Session) -> dict[str, dict[int, float]]:
    """The losses so far by arm and seed, read from the journal."""
    table: dict[str, dict[int, float]] = {}
    for event in session.journal.events:
        if event["event"] == "trial_finished" and event["status"] == "finished":
            table.setdefault(event["arm"], {})[event["seed"]] = event["metrics"]["val_loss"]
    return table


def test_two_arms_so_far_have_the_interval_of_the_paired_t_test(root: Path, tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, phases=THREE_SEEDS.replace("0.05, 0.2, 0.4", "0.4"))
    with session_on(file, root) as session:
        drive(begun(session), most=5)  # two complete seeds, and the baseline of the third
        baseline, arm = sorted(session.snapshot().arms, key=lambda arm: not arm.is_baseline)
        table = scores(session)
    differences = [table[arm.arm][seed] - table[baseline.arm][seed] for seed in (1, 2)]
    test = scipy.stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    assert (arm.n, arm.seeds, baseline.n, baseline.seeds) == (2, 4, 3, 4)
    assert arm.delta == pytest.approx(statistics.fmean(differences))
    assert (arm.ci_low, arm.ci_high) == pytest.approx((interval.low, interval.high))
    assert (baseline.delta, baseline.ci_low) == (None, None)
    assert baseline.mean == pytest.approx(statistics.fmean(table[baseline.arm].values()))


def test_an_arm_with_one_seed_is_compared_on_that_seed_without_an_interval(
    root: Path, tmp_path: Path, corpus: Path
) -> None:
    with session_on(write_file(tmp_path, corpus, phases=THREE_SEEDS), root) as session:
        drive(begun(session), most=4)  # one seed of three arms, and the second of the baseline
        arms = {arm.arm: arm for arm in session.snapshot().arms}
        table = scores(session)
    (baseline,) = (arm for arm in arms.values() if arm.is_baseline)
    others = [arm for arm in arms.values() if not arm.is_baseline]
    assert baseline.n == 2 and others and {arm.n for arm in others} == {1}
    for arm in others:  # the seeds move all arms alike by 0.1, which must not be part of the difference
        assert arm.delta == pytest.approx(table[arm.arm][1] - table[baseline.arm][1])
        assert (arm.ci_low, arm.ci_high) == (None, None)
    deltas = [arm.delta or 0.0 for arm in arms.values()]
    assert deltas == sorted(deltas)


def test_an_arm_that_failed_has_no_interval_and_says_so(root: Path, tmp_path: Path, corpus: Path) -> None:
    def result(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status="diverged" if spec.arm == "alpha=0.4" and spec.seed == 2 else "finished")

    with session_on(write_file(tmp_path, corpus, phases=THREE_SEEDS), root) as session:
        n_arms = 3
        drive(begun(session), result, most=3 * n_arms)
        arms = {arm.arm: arm for arm in session.snapshot().arms}
    assert (arms["alpha=0.4"].unsuccessful, arms["alpha=0.4"].ci_low) == (1, None)
    others = [arm for name, arm in arms.items() if name != "alpha=0.4" and not arm.is_baseline]
    assert others and all(arm.ci_low is not None for arm in others)


def test_arms_are_judged_once_per_trial_and_not_at_all_in_a_phase_without_results(
    root: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    def count(state: CampaignState, phase: PhaseState) -> tuple[ArmSoFar, ...]:
        judged.append(len(state.results))
        return arms_so_far(state, phase)

    monkeypatch.setattr("tune.results.status.arms_so_far", count)
    with session_on(file, root) as session:
        begun(session)
        assert session.snapshot().arms == ()
        for _ in range(3):
            drive(session, most=1)
            for _ in range(10):
                session.snapshot()
        next_trial(session)
        session.snapshot()
    assert judged == [1, 2, 3]


# ---- before the journal, and after a kill --------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from tune.storage.activity import ActivityFile
from tune.storage.lock import ResultsLock

with ResultsLock(Path(sys.argv[1])), ActivityFile(Path(sys.argv[1]), campaign="tiny") as file:
    file.change(trials=32, phases=3)
    with file.doing("preparing data"):
        file.update("preparing data", detail="docs", fraction=0.4, seconds_left=12.0)
        while file._timer:
            pass
        print("ready", flush=True)
        sys.stdin.readline()
    with file.doing("starting Ray"):
        print("ready", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def holder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock as a run does before its journal begins."""
    command, pipe = [sys.executable, "-c", HOLDER, str(root)], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def shown(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run_campaign.main(["status", str(root), *options]) == 0
    return capsys.readouterr().out


def test_status_says_what_a_run_does_before_its_first_trial(
    root: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(root, capsys)
    for part in ("tiny   starting", "0/32+", "preparing data, 40 %, about 12 s left: docs"):
        assert part in text
    data = strict(shown(root, capsys, "--json"))
    assert (data["status"], data["alive"], data["done"], data["total"]) == ("starting", True, 0, 32)
    assert data["run"]["activities"][0]["fraction"] == 0.4 and data["run"]["pid"] == holder.pid
    assert holder.stdin and holder.stdout
    holder.stdin.write("\n")
    holder.stdin.flush()
    holder.stdout.readline()
    text = shown(root, capsys)
    assert "starting Ray" in text and "preparing" not in text


def test_a_run_that_was_killed_while_it_prepared_is_said_to_be_gone(
    root: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    holder.kill()
    holder.wait()
    gone = f"process {holder.pid} on {host_name()} is gone, while preparing data"
    assert gone in " ".join(shown(root, capsys).split())
    data = strict(shown(root, capsys, "--json"))
    assert (data["status"], data["alive"]) == ("incomplete", False)
    assert data["elapsed"] < 600


def test_a_resumed_run_shows_what_is_done_and_nothing_of_the_session_before_as_training(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), most=2)
        assert next_trial(session)  # and the run is killed, with this trial in its journal
    with session_on(file, root) as session, session.activity.doing("starting Ray"):
        snapshot = read_snapshot(root)
        assert (snapshot.status, snapshot.alive, snapshot.done, snapshot.running) == ("starting", True, 2, ())
        assert snapshot.run and [each.name for each in snapshot.run.activities] == ["starting Ray"]
        assert "starting Ray" in "\n".join(printed(live_view(snapshot)))
        assert begun(session).snapshot().status == read_snapshot(root).status == "running"


def test_a_run_that_ended_leaves_no_trace_of_its_process(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session))
        session.end()
    snapshot = read_snapshot(root)
    assert (snapshot.status, snapshot.alive, snapshot.run, snapshot.resume) == ("finished", False, None, None)
    assert not (root / ACTIVITY).exists()


def test_a_folder_that_is_not_there_may_be_that_of_a_run_that_has_just_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a run creates it a few seconds after its start"):
        read_snapshot(tmp_path / "tiny")


# ---- the newest metrics of a running trial -------------------------------------------------------------------------


def test_of_a_file_that_grows_only_new_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == {}
    rows = [json.dumps({"step": step, "train_loss": 9.0 - step / 1000}) for step in range(1000)]
    path.write_text("\n".join([json.dumps({"step": 0, "val_loss": 7.5}), *rows]) + '\n{"step": 1000, "train')
    assert tail.read() == {"step": 999, "val_loss": 7.5, "train_loss": pytest.approx(8.001)}
    before = tail._end
    with path.open("a") as file:
        file.write('_loss": 5.5}\ndamaged\n{"step": 1001, "train_loss": NaN}\n')
    assert tail.read() == {"step": 1001, "val_loss": 7.5, "train_loss": 5.5}
    assert before > 30_000 and tail._end == path.stat().st_size


def test_rows_that_a_resumed_trial_dropped_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    rows = [json.dumps({"step": step, "train_loss": float(step)}) for step in range(50)]
    path.write_text("\n".join(rows) + "\n")
    assert tail.read()["step"] == 49
    path.write_text("\n".join(rows[:20]) + "\n")  # shorter
    assert tail.read() == {"step": 19, "train_loss": 19.0}
    others = [json.dumps({"step": step, "train_loss": 0.5}) for step in range(45)]
    path.write_text("\n".join(others) + "\n")  # another file that is longer
    assert tail.read() == {"step": 44, "train_loss": 0.5}


@pytest.mark.slow
def test_a_real_run_says_what_it_does_from_its_folder_on_to_its_first_trial(
    root: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))  # where nothing is prepared yet
    run = start(file, tmp_path)
    seen: list[tuple[str, str]] = []

    def has_trained() -> bool:
        with contextlib.suppress(ConfigError):  # its folder is not there yet
            snapshot = read_snapshot(run.root)
            assert snapshot.alive and snapshot.total in (0, 6), snapshot  # 0 before anything is planned
            names = [each.name for each in snapshot.run.activities] if snapshot.run else []
            seen.extend((snapshot.status, name) for name in names if snapshot.total)
            return snapshot.done > 0
        return False

    try:
        run.until(has_trained)
        family = run.family()
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
        snapshot = read_snapshot(run.root)
    finally:
        run.end()
    assert {("starting", "preparing data"), ("starting", "starting Ray")} <= {*seen}
    assert (snapshot.status, snapshot.alive, snapshot.running) == ("incomplete", False, ())
    assert snapshot.run is not None and snapshot.run.pid == run.process.pid and family
