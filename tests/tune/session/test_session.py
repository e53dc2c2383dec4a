"""A session decides what to train next. No interruption trains a trial twice or changes a result."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import Heartbeat, HeartbeatWriter, host_name, request_stop, stop_requested
from ngpt.trackers.config import TrackerConfig
from tests.helpers import ROOT
from tests.helpers.tiny_campaign import (
    begun,
    drive,
    losses,
    next_trial,
    pretend,
    records,
    session_on,
    train_all,
    write_file,
)
from tune.results.snapshot import Progress
from tune.results.summary import read_state
from tune.session.datasets import describe_data
from tune.session.outcomes import trial_line
from tune.storage.journal import JournalError, read_journal
from tune.storage.lock import ResultsLocked
from tune.trials.retries import RETRY_RULES
from tune.trials.trial import TrialResult, TrialSpec, origin_of

pytestmark = pytest.mark.usefixtures("no_report")

MOST_RETRIES = RETRY_RULES["killed"].retries

DIAMOND = """
  - name: wide
    inherit: base_lr
    vary: {alpha: [0.1, 0.4]}
  - name: base_lr
    vary: {optim.lr: [1e-2, 2e-2]}
  - name: other
    vary: {logit_scale: [10, 20]}
"""

TWINS = """
  - name: first
    vary: {alpha: [0.05, 0.4]}
  - name: second
    vary: {alpha: [0.05, 0.4], project_every: [3]}
"""


def longer_alpha_wins(spec: TrialSpec) -> TrialResult:
    return pretend(spec, gain=2.0)


def finish(file: Path, root: Path, *, most: int | None = None) -> list[str]:
    """Runs one session, interrupted after `most` trials; returns the ids of the trained trials."""
    with session_on(file, root) as session:
        started = drive(begun(session), most=most)
        session.stop_requested = not session.is_over()
        session.end()
    return [spec.trial_id for spec in started]


def events(root: Path, name: str) -> list[dict]:
    return [event for event in read_journal(root / "journal.jsonl") if event["event"] == name]


def test_trackers_get_the_place_in_the_campaign_and_one_mode_for_all_trials(root: Path, file: Path) -> None:
    with session_on(file, root, ("tracker.wandb=auto", "tracker.project=spheres")) as session:
        tracker = drive(begun(session, tracker=TrackerConfig(wandb="offline")), most=1)[0].config.tracker
    assert (tracker.wandb, tracker.project) == ("offline", "spheres")
    place = (tracker.group, tracker.job_type, tracker.run_name)
    assert place == ("tiny", "alpha", "alpha=0.05 seed 1")


# ---- order and inheritance -----------------------------------------------------------------------------------------


def test_a_phase_starts_when_the_one_it_inherits_from_is_over(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        started = drive(begun(session))
        assert [spec.phase for spec in started] == ["alpha"] * 4 + ["projection"] * 2
        assert session.is_over()


def test_the_winner_of_a_phase_becomes_the_base_of_the_next(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        started = drive(begun(session), longer_alpha_wins)
        assert session.state.phases["alpha"].winner == "alpha=0.4"
        assert session.state.phases["projection"].base == {"model.alpha": 0.4}
    later = [spec for spec in started if spec.phase == "projection"]
    assert {spec.config.model.alpha for spec in later} == {0.4}
    assert {spec.config.project_every for spec in later} == {3}  # 1 is the winner itself, known already


def test_without_a_winner_the_base_does_not_change(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        started = drive(begun(session), lambda spec: pretend(spec, gain=0.0))
        assert session.state.phases["alpha"].winner == "alpha=0.05"
    assert {spec.config.model.alpha for spec in started if spec.phase == "projection"} == {0.05}


def test_independent_phases_run_together_and_dependent_ones_wait(tmp_path: Path, corpus: Path, root: Path) -> None:
    with session_on(write_file(tmp_path, corpus, phases=DIAMOND), root) as session:
        begun(session)
        specs = []
        while (spec := next_trial(session)) is not None:
            specs.append(spec)
        assert {spec.phase for spec in specs} == {"base_lr", "other"}
        assert not session.is_over()
        for spec in specs:
            session.tell(spec.trial_id, pretend(spec))
        assert {spec.phase for spec in drive(session)} == {"wide"}
        assert session.is_over()


def test_seeds_come_first_so_that_every_arm_has_a_result_early(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        started = drive(begun(session), most=4)
    assert [(spec.seed, spec.arm) for spec in started] == [
        (1, "alpha=0.05"),
        (1, "alpha=0.4"),
        (2, "alpha=0.05"),
        (2, "alpha=0.4"),
    ]


def test_a_trial_that_two_phases_share_is_trained_once_and_recorded_in_both(
    tmp_path: Path, corpus: Path, root: Path
) -> None:
    trained = finish(write_file(tmp_path, corpus, phases=TWINS), root)
    assert len(trained) == len(set(trained)) == 6
    rows = records(root)
    shared = [row for row in rows if row["phase"] == "second" and row["arm"] != "project_every=3"]
    assert len(shared) == 4
    assert {row["reused_from"] for row in shared} == {"first"}
    assert {row["reused_from"] for row in rows if row not in shared} == {None}
    first = {row["trial_id"]: row["metrics"] for row in rows if row["phase"] == "first"}
    assert {row["trial_id"]: row["metrics"] for row in shared} == first


# ---- the lock -----------------------------------------------------------------------------------------------------


def test_a_second_session_on_the_directory_is_refused_with_the_process_that_holds_it(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        with pytest.raises(ResultsLocked, match=rf"{root} is in use by another run \(process {os.getpid()}\)"):
            session_on(file, root).__enter__()
        assert next_trial(session) is not None  # the first one continues
    with session_on(file, root) as session:
        assert session.state.campaign["campaign"] == "tiny"


@pytest.mark.slow
def test_a_killed_process_does_not_keep_the_lock(root: Path, file: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.helpers.tiny_campaign import session_on
session_on(Path({str(file)!r}), Path({str(root)!r})).__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert killed.returncode == -9
    assert (root / "campaign.pid").exists()
    assert len(finish(file, root)) == 6
    assert not (root / "campaign.pid").exists()


def test_an_error_releases_the_lock(root: Path, file: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), session_on(file, root) as session:
        begun(session)
        raise RuntimeError("boom")
    assert not (root / "campaign.pid").exists()
    assert len(finish(file, root)) == 6


def test_a_damaged_journal_is_refused_and_the_lock_released(root: Path, file: Path) -> None:
    finish(file, root)
    journal = root / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b"trial_started", b"trial_startled", 1))
    with pytest.raises(JournalError):
        session_on(file, root).__enter__()
    assert not (root / "campaign.pid").exists()
    journal.write_bytes(whole)
    assert finish(file, root) == []


def test_results_that_cannot_be_a_folder_are_an_os_error(tmp_path: Path, file: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(OSError):
        session_on(file, tmp_path / "results" / "tiny").__enter__()


# ---- deaths, failures, divergence ----------------------------------------------------------------------------------


def test_a_trial_whose_worker_dies_is_retried_a_few_times_and_then_fails(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        spec = next_trial(session)
        assert spec
        for attempt in range(1, MOST_RETRIES + 1):
            assert spec.attempt == attempt
            session.worker_died(spec.trial_id, "killed")
            again = next_trial(session)
            assert again and again.trial_id == spec.trial_id
            spec = again
        session.worker_died(spec.trial_id, "killed")
        result = session.state.results[spec.trial_id]
        assert (result["status"], result["attempt"]) == ("failed", MOST_RETRIES + 1)
        assert result["error"] == f"killed: its process was killed or crashed, {MOST_RETRIES + 1} times"
        assert result["cause"] == "killed"
        assert {s.trial_id for s in drive(session)}.isdisjoint({spec.trial_id})
        assert session.is_over()


def dying(root: Path, trial_id: str, *, step: int, began: int = 0) -> None:
    """Leaves the heartbeat of a worker that was killed at a step."""
    folder = root / "trials" / trial_id
    folder.mkdir(parents=True, exist_ok=True)
    heartbeat = HeartbeatWriter(folder, began=began)
    heartbeat.beat(step)
    heartbeat.close()


def test_a_trial_that_kills_its_worker_twice_at_the_same_step_is_not_retried(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        for step in (4, 5, 5):
            spec = next_trial(session)
            assert spec and spec.trial_id not in session.state.results
            dying(root, spec.trial_id, step=step, began=3)
            session.worker_died(spec.trial_id, "killed")
        result = session.state.results[spec.trial_id]
        assert (result["status"], result["cause"], result["attempt"]) == ("failed", "killed", 3)
        assert result["error"].startswith("killed: it died at step 5 twice")
        assert len(drive(session)) == 5, "the other trials are not affected"


def test_all_running_trials_are_retried_in_order_when_ray_dies(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        started = [next_trial(session) for _ in range(3)]
        session.executor_lost("its process raylet is gone")
        again = [next_trial(session) for _ in range(3)]
        assert [spec and spec.trial_id for spec in again] == [spec and spec.trial_id for spec in started]
        assert [spec and spec.attempt for spec in again] == [2, 2, 2]
    assert [event["cause"] for event in events(root, "worker_died")] == ["ray_lost"] * 3


def test_failed_results_have_a_cause_and_code_errors_are_not_retried(root: Path, file: Path) -> None:
    errors = iter(["ValueError: it broke", "torch.OutOfMemoryError: CUDA out of memory."])

    def result_of(spec: TrialSpec) -> TrialResult:
        error = next(errors, None)
        return TrialResult("failed", error=f"Traceback\n{error}") if error else pretend(spec, status="diverged")

    with session_on(file, root) as session:
        assert len(drive(begun(session), result_of)) == 6
    causes = [event["cause"] for event in events(root, "trial_finished")]
    assert causes[:3] == ["code_error", "oom", "diverged"]


def test_an_exception_is_journaled_without_secrets_and_the_next_session_resumes(
    root: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-hf-1f0e2d3c4b5a")
    with pytest.raises(RuntimeError), session_on(file, root) as session:
        drive(begun(session), most=2)
        raise RuntimeError("no answer to canary-hf-1f0e2d3c4b5a")
    (crash,) = events(root, "crash")
    assert "RuntimeError: no answer to ***" in crash["error"] and "canary" not in (root / "journal.jsonl").read_text()
    assert len(finish(file, root)) == 4


def test_a_trial_without_a_place_is_waiting_and_has_no_heartbeat(root: Path, file: Path) -> None:
    lines: list[str] = []
    with session_on(file, root) as session:
        session.message = lines.append
        begun(session, workers=2)
        first, second = next_trial(session), next_trial(session)
        assert first and second
        for _ in range(2):  # it is told again and again
            session.set_waiting([second.trial_id])
        assert (session.state.waiting, list(session.heartbeats())) == ({second.trial_id}, [first.trial_id])
        assert [line for line in lines if "room" in line] == ["1 trial waiting for room in the cluster"]
        assert read_state(root).waiting == {second.trial_id}
        session.set_waiting([])
        assert (session.state.waiting, len(session.heartbeats())) == (set(), 2)
        session.set_waiting([first.trial_id])
        session.tell(first.trial_id, pretend(first))
        session.set_waiting([first.trial_id])
        assert session.state.waiting == set(), "it has ended meanwhile"
    assert [event["trial_id"] for event in events(root, "trial_waiting")] == [second.trial_id, first.trial_id]


def test_a_cluster_that_grows_or_shrinks_is_journaled(root: Path, file: Path) -> None:
    lines: list[str] = []
    with session_on(file, root) as session:
        session.message = lines.append
        begun(session, workers=2)
        session.resize(3, 3, 0, "node b joined")
        session.resize(0, 1, 0, "all nodes left")
        assert (session.executor.workers, session.state.workers, session.state.max_slots) == (0, 0, 3)
        assert lines == ["node b joined", "all nodes left"]
        assert next_trial(session), "it is queued until there is room"
    assert read_state(root).workers == 0


def test_a_trial_survives_more_lost_nodes_than_crashes(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        trial_id = None
        for _ in range(2 * MOST_RETRIES):
            spec = next_trial(session)
            assert spec and spec.trial_id == (trial_id or spec.trial_id)
            trial_id = spec.trial_id
            session.worker_died(spec.trial_id, "node_lost")
        assert session.state.results == {}


def test_heartbeat_and_stop_request_of_a_past_attempt_are_removed(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        spec = next_trial(session)
        assert spec
        dying(root, spec.trial_id, step=2)
        request_stop(spec.folder)
        assert session.heartbeats() == {spec.trial_id: (1, Heartbeat(os.getpid(), 0, 2, host_name()))}
        session.worker_died(spec.trial_id, "killed")
        assert next_trial(session) == replace(spec, attempt=2)
        assert not stop_requested(spec.folder)
        assert session.heartbeats() == {spec.trial_id: (2, None)}


def test_a_requested_stop_reaches_every_running_trial_and_starts_no_more(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        first, second = next_trial(session), next_trial(session)
        assert first and second
        first.folder.mkdir(parents=True)  # the second worker has not made its folder yet
        session.request_stop(15)
        assert stop_requested(first.folder) and not second.folder.exists()
        assert (session.stop_requested, session.stop_signal, session.ask()) == (True, 15, [])
        second.folder.mkdir()
        session.request_stop()
        assert stop_requested(second.folder) and session.stop_signal == 15


def test_interruptions_do_not_count_as_deaths_of_workers(root: Path, file: Path) -> None:
    for _ in range(MOST_RETRIES + 2):
        with session_on(file, root) as session:
            spec = next_trial(begun(session))
            session.stop_requested = True
            session.end()
    with session_on(file, root) as session:
        spec = next_trial(begun(session))
        assert spec and spec.attempt == MOST_RETRIES + 3
        session.worker_died(spec.trial_id, "killed")
        again = next_trial(session)
        assert again and again.trial_id == spec.trial_id


def test_a_failed_trial_is_retried_by_the_next_session_and_its_phase_judged_again(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        broken = drive(
            begun(session), lambda spec: pretend(spec, status="failed" if spec.seed == 2 else "finished", gain=0.0)
        )
        summary = session.end()
        assert summary.trials.failed == 3
        assert summary.phases[0].winner == "alpha=0.05"
    with session_on(file, root) as session:
        again = drive(begun(session), lambda spec: pretend(spec, gain=0.0))
        assert session.end().trials.failed == 0
    assert {spec.trial_id for spec in again} == {spec.trial_id for spec in broken if spec.seed == 2}
    assert len(losses(root)) == 8


def test_an_arm_that_diverged_never_wins(root: Path, file: Path) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        bad = spec.config.model.alpha == 0.4 and spec.seed == 2
        return pretend(spec, gain=5.0, status="diverged" if bad else "finished")

    with session_on(file, root) as session:
        drive(begun(session), result_of)
        summary = session.end()
    assert summary.status == "finished"
    assert [phase.winner for phase in summary.phases] == ["alpha=0.05", "project_every=1"]
    assert {arm.arm: arm.verdict for arm in summary.phases[0].arms}["alpha=0.4"] == "diverged"
    assert finish(file, root) == []  # a divergence is a result: it is not tried again


def test_a_campaign_whose_trials_all_fail_still_ends(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        drive(begun(session), lambda spec: pretend(spec, status="failed"))
        assert session.is_over()
        summary = session.end()
    assert (summary.status, summary.trials.finished, summary.trials.failed) == ("finished", 0, 6)


# ---- the same command again ----------------------------------------------------------------------------------------


def test_a_second_run_trains_nothing_and_has_the_same_results(root: Path, file: Path) -> None:
    assert len(finish(file, root)) == 6
    before = losses(root)
    assert finish(file, root) == []
    assert losses(root) == before


@pytest.mark.parametrize("most", range(6))
def test_interrupted_after_any_trial_nothing_is_trained_twice(root: Path, file: Path, most: int) -> None:
    undisturbed = root.with_name("undisturbed")
    finish(file, undisturbed)
    first = finish(file, root, most=most)
    second = finish(file, root)
    assert (len(first), len(first) + len(second)) == (most, 6)
    assert not set(first) & set(second)
    assert losses(root) == losses(undisturbed)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(cuts=st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_a_campaign_resumes_from_a_journal_cut_off_anywhere(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, cuts: list[int]
) -> None:
    """A power failure leaves any number of whole events and a part of one."""
    folder = tmp_path_factory.mktemp("cut")
    file, root = write_file(folder, corpus), folder / "tiny"
    finish(file, folder / "undisturbed")
    for cut in cuts:
        finish(file, root)
        journal = root / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:cut]) + b"".join(lines[cut : cut + 1])[:20])
    finish(file, root)
    assert losses(root) == losses(folder / "undisturbed")
    assert read_state(root).status == "finished"


def test_a_value_added_to_the_file_trains_only_its_own_trials(tmp_path: Path, corpus: Path, root: Path) -> None:
    one_phase = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"
    before = finish(write_file(tmp_path, corpus, phases=one_phase), root)
    added = finish(write_file(tmp_path, corpus, phases=one_phase.replace("0.4", "0.2, 0.4")), root)
    assert (len(before), len(added)) == (4, 2)
    assert {row["config"]["model.alpha"] for row in records(root) if row["trial_id"] in added} == {0.2}
    assert len(records(root)) == 6


def test_a_seed_added_to_the_file_trains_only_that_seed(tmp_path: Path, corpus: Path, root: Path) -> None:
    finish(write_file(tmp_path, corpus), root)
    finish(write_file(tmp_path, corpus, seeds="[1, 2, 3]"), root)
    trained = events(root, "trial_started")
    assert [event["seed"] for event in trained].count(3) == len(trained) - 6 > 0
    assert {event["seed"] for event in trained[6:]} == {3}


def test_renaming_phases_and_reordering_arms_trains_nothing(tmp_path: Path, corpus: Path, root: Path) -> None:
    first = "\n  - name: a\n    runs: [{arm: short, alpha: 0.05}, {arm: long, alpha: 0.4}]\n"
    other = "\n  - name: b\n    runs: [{arm: lang, alpha: 0.4}, {arm: kurz, alpha: 0.05}]\n"
    baseline = 2
    assert len(finish(write_file(tmp_path, corpus, phases=first), root)) >= 4
    assert len(finish(write_file(tmp_path, corpus, phases=other), root)) <= baseline


def test_a_corpus_with_other_content_is_refused(root: Path, file: Path) -> None:
    finish(file, root)
    before = (root / "journal.jsonl").read_bytes()
    with session_on(file, root) as session:
        data = describe_data(session.campaign.base) | {"sha256": "0" * 64}
        with pytest.raises(ConfigError, match=r"the corpus .* has changed since this campaign began .* another --out"):
            session.begin(data)
    assert (root / "journal.jsonl").read_bytes() == before


def test_a_corpus_that_is_edited_while_the_campaign_runs_stops_it_before_the_next_phase(
    tmp_path: Path, corpus: Path, root: Path
) -> None:
    copy = tmp_path / "topics.txt"
    copy.write_text(corpus.read_text())
    file = write_file(tmp_path, copy)
    with session_on(file, root) as session:
        given = drive(begun(session), most=3)
        last = next_trial(session)
        assert last is not None and {spec.phase for spec in given} == {last.phase}
        copy.write_text(corpus.read_text() + "one line more\n")
        with pytest.raises(ConfigError, match=r"topics\.txt has changed since this run began"):
            session.tell(last.trial_id, pretend(last))
    copy.write_text(corpus.read_text())
    with session_on(file, root) as session:
        rest = drive(begun(session))
    assert rest and not {spec.trial_id for spec in rest} & {spec.trial_id for spec in [*given, last]}


@pytest.mark.slow
def test_another_corpus_of_the_same_name_gives_other_trials(tmp_path: Path, root: Path, corpus: Path) -> None:
    copy = tmp_path / "topics.txt"
    copy.write_text(corpus.read_text())
    first = finish(write_file(tmp_path, copy), root)
    code = f"""
from pathlib import Path
from tests.tune.session.test_session import *
import tune.report.html
tune.report.html.write_report = lambda *_: None
print(*finish(Path({str(tmp_path / "tiny.yaml")!r}), Path({str(root)!r})))
"""
    copy.write_text(corpus.read_text() + "one line more\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    second = done.stdout.split()
    assert len(first) == len(second) == 6
    assert not set(first) & set(second)


# ---- output -------------------------------------------------------------------------------------------------------


def test_the_directory_holds_the_file_as_given_and_a_manifest(root: Path, file: Path) -> None:
    finish(file, root)
    assert (root / "campaign.yaml").read_text() == file.read_text()
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["campaign"] == "tiny"
    assert manifest["base"]["steps"] == 6
    assert manifest["environment"]["torch"] and manifest["environment"]["python"]
    assert len(manifest["data"]["sha256"]) == 64


def test_a_phase_is_announced_with_its_size_and_its_base(tmp_path: Path, corpus: Path) -> None:
    phases = """
  - {name: a, vary: {alpha: [0.05, 0.1]}, seeds: [1]}
  - {name: b, inherit: a, vary: {lr: [0.001, 0.002]}, seeds: [1]}
"""
    lines: list[str] = []
    with session_on(write_file(tmp_path, corpus, phases=phases), tmp_path / "r") as session:
        session.message = lines.append
        drive(begun(session))
    assert "phase a: 2 arms x 1 seed = 2 trials" in lines
    assert "phase b: 3 arms x 1 seed = 3 trials on alpha=0.05, 1 of them already done" in lines


def test_every_event_is_one_line(root: Path, file: Path) -> None:
    lines: list[str] = []
    with session_on(file, root) as session:
        session.message = lines.append
        drive(begun(session), most=1)
        drive(session, lambda spec: pretend(spec, status="failed"), most=1)
    assert lines[0] == "phase alpha: 2 arms x 2 seeds = 4 trials"
    assert lines[1].startswith("[1/6+] alpha  alpha=0.05 seed 1  val_loss 5.05")
    assert lines[2].startswith("[2/6+] alpha  alpha=0.4 seed 1  failed: ValueError: it broke")
    assert not any("\n" in line for line in lines)


def test_a_trial_is_one_line_with_its_known_numbers() -> None:
    trial: Any = SimpleNamespace(phase="alpha", arm="alpha=0.15", seed=2)
    result = TrialResult("finished", {"val_loss": 4.32111, "tokens_per_second": 12345.0}, seconds=4.12)
    line = "[12/29] alpha  alpha=0.15 seed 2  val_loss 4.3211  12.3k tok/s  4.1 s"
    assert trial_line(Progress(12, 29, True), trial, result, "val_loss") == line
    trial.arm = "a\x1b[31m\nb"
    failed = TrialResult("failed", error="Traceback\nout\tof", seconds=0.5)
    assert (
        trial_line(Progress(3, 29, False), trial, failed, "val_loss")
        == r"[ 3/29+] alpha  a\x1b[31m b seed 2  failed: out of  0.5 s"
    )


def test_trials_copied_from_another_campaign_say_where_they_were_trained(
    root: Path, file: Path, tmp_path: Path
) -> None:
    """Their checkpoints fit, since a trial's id is what it computes."""
    other = tmp_path / "results" / "other"
    train_all(file, root)
    shutil.copytree(root / "trials", other / "trials")
    copied = max((other / "trials").iterdir())
    shutil.rmtree(copied / "checkpoints")
    file.write_text(file.read_text().replace("campaign: tiny", "campaign: other"))
    summary = train_all(file, other)
    origins = {record["trial_id"]: record["provenance"].get("copied_from") for record in records(other)}
    assert origins.pop(copied.name) is None and set(origins.values()) == {"tiny"}
    n = sum(
        record["provenance"].get("copied_from") == "tiny" for record in records(other) if record["phase"] == "alpha"
    )
    warnings = next(phase.warnings for phase in summary.phases if phase.phase == "alpha")
    assert any(f"{n} of its" in text and "files that the campaign tiny had made" in text for text in warnings)
    assert not any("copied_from" in record["provenance"] for record in records(root))


def test_the_origin_of_copied_files_is_read_with_care(tmp_path: Path) -> None:
    assert origin_of(tmp_path) is None
    (tmp_path / "checkpoints" / "step_0000003").mkdir(parents=True)
    assert origin_of(tmp_path) == "unknown"
    for text in ('{"tracker.group": 3}', "[" * 100_000, "\x00", '{"tracker.group": ""}', "[]"):
        (tmp_path / "config.json").write_text(text)
        assert origin_of(tmp_path) == "unknown"
    (tmp_path / "config.json").write_text('{"tracker.group": "a\\nb"}')
    assert origin_of(tmp_path) == r"a\nb"


def test_where_trials_trained_is_in_the_warnings_and_the_manifest_also_after_the_next_session(
    root: Path, file: Path
) -> None:
    note = "trained on the CPU by a run that was not told to: base.device is auto, and no node has a GPU"
    for notes in ((note,), ()):
        with session_on(file, root) as session:
            drive(begun(session, notes=notes))
            summary = session.end()
        assert json.loads((root / "manifest.json").read_text())["notes"] == list(notes)
    assert [note in phase.warnings for phase in summary.phases] == [True, True]
