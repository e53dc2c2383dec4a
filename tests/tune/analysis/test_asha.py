"""Early stopping: the rule of Ray Tune's ASHA, decisions that survive a resume, no verdict for stopped arms."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler

from ngpt.config.base import ConfigError
from ngpt.training.tracker import read_metrics
from tests.helpers.tiny_campaign import begun, losses, next_trial, pretend, records, session_on, train_all, write_file
from tune.analysis.asha import RUNG_REACHED, Asha, cutoff
from tune.campaign import load_campaign
from tune.machine.estimate import estimate
from tune.results.status import read_snapshot
from tune.results.summary import rebuild
from tune.session.session import Session
from tune.spec.schema import EarlyStop
from tune.storage.journal import read_journal
from tune.storage.summaries import CampaignSummary
from tune.trials.trial import TrialResult, TrialSpec

pytestmark = pytest.mark.usefixtures("no_report")

RULE = EarlyStop(first=10, reduction=3)


# ---- the rule ------------------------------------------------------------------------------------------------------


def reach(asha: Asha, trial: str, step: int, value: float | None, **fields: Any) -> bool:
    """Lets a trial come to a step; returns whether it is stopped there."""
    place = {"phase": "p", "arm": trial, "seed": 1, "total_steps": 90, "baseline_steps": 90, "may_stop": True} | fields
    event = asha.record_rung(trial_id=f"{trial}-s{place['seed']}", step=step, value=value, **place)
    if event:
        asha.apply({"event": RUNG_REACHED} | event)
    return bool(event and event["stops"])


def test_trials_that_are_trained_anew_are_forgotten() -> None:
    """Neither their values nor the decision that they fell behind remain, so the rung is theirs again."""
    asha = Asha(EarlyStop(first=10, reduction=2), metric="val_loss", goal="minimize")
    assert [reach(asha, trial, 10, value) for trial, value in {"a": 1.0, "b": 3.0}.items()] == [False, True]
    assert asha.stop_reason("p", "b") is not None
    asha.apply({"event": "trials_discarded", "trial_ids": ["a-s1", "b-s1"]})
    assert asha.stop_reason("p", "b") is None
    assert [reach(asha, trial, 10, value) for trial, value in {"b": 3.0, "a": 4.0}.items()] == [False, True]


@settings(deadline=None)
@given(
    reduction=st.integers(2, 4),
    first=st.integers(1, 5),
    n_rungs=st.integers(1, 3),
    maximize=st.booleans(),
    results=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 30)), max_size=80),
)
def test_decisions_match_the_asha_of_ray_tune(
    reduction: int, first: int, n_rungs: int, maximize: bool, results: list[tuple[int, int]]
) -> None:
    """Trials in any order, each evaluating at every multiple of `first`; a stopped one reports no more."""
    steps = first * reduction**n_rungs
    goal = "maximize" if maximize else "minimize"
    theirs = AsyncHyperBandScheduler(
        time_attr="step",
        metric="value",
        mode=goal[:3],
        max_t=steps,
        grace_period=first,
        reduction_factor=reduction,
        stop_last_trials=False,
    )
    ours = Asha(EarlyStop(first=first, reduction=reduction), metric="value", goal=goal)
    trials: dict[int, Any] = {}
    at: dict[int, int] = {}
    for name, value in results:
        if name not in trials:
            trials[name], at[name] = SimpleNamespace(trial_id=str(name)), 0
            theirs.on_trial_add(None, trials[name])  # pyright: ignore[reportArgumentType]
        at[name] += first
        if at[name] >= steps:
            continue
        report = {"step": at[name], "value": value / 3}
        expected = theirs.on_trial_result(None, trials[name], report) == "STOP"  # pyright: ignore[reportArgumentType]
        assert reach(ours, str(name), at[name], value / 3, total_steps=steps, baseline_steps=steps) == expected
        if expected:
            at[name] = steps


def test_the_first_trial_at_a_rung_continues_and_later_ones_must_be_in_the_best_third() -> None:
    asha = Asha(RULE, metric="val_loss", goal="minimize")
    assert not reach(asha, "a", 10, 5.0)
    assert reach(asha, "b", 10, 5.1)
    assert not reach(asha, "c", 10, 4.9)
    # 4.9, 5.0, 5.1: the best third by percentile ends two thirds of the way from the second to the first.
    assert cutoff([-5.0, -5.1, -4.9], 3) == pytest.approx(-5.0 + 0.1 / 3)
    assert reach(asha, "d", 10, 4.98) and not reach(asha, "e", 10, 4.96)
    assert cutoff([], 3) is None


def test_rungs_grow_by_the_reduction_factor_and_lie_before_the_end() -> None:
    assert [RULE.rungs(steps) for steps in (10, 11, 30, 31, 91)] == [[], [10], [10], [10, 30], [10, 30, 90]]


def test_nothing_is_decided_between_rungs_or_twice_at_a_rung() -> None:
    asha = Asha(RULE, metric="val_loss", goal="minimize")
    fields: dict[str, Any] = {"trial_id": "a-s1", "phase": "p", "arm": "a", "seed": 1, "may_stop": True}
    assert asha.record_rung(step=9, value=5.0, total_steps=90, baseline_steps=90, **fields) is None
    reach(asha, "a", 10, 5.0)
    assert asha.record_rung(step=20, value=9.0, total_steps=90, baseline_steps=90, **fields) is None
    assert asha.record_rung(step=10, value=9.0, total_steps=90, baseline_steps=90, **fields) is None, (
        "the same evaluation after a resume"
    )
    assert asha.record_rung(step=30, value=None, total_steps=90, baseline_steps=90, **fields) is None, (
        "a diverging trial ends without a decision"
    )


def test_a_rung_is_a_share_of_the_training() -> None:
    """With half the steps of the baseline, for the same tokens, the rungs are at half the steps."""
    asha = Asha(RULE, metric="val_loss", goal="minimize")
    place = {"trial_id": "a-s1", "phase": "p", "arm": "a", "seed": 1, "value": 5.0, "may_stop": True}
    assert asha.record_rung(step=4, total_steps=45, baseline_steps=90, **place) is None
    event = asha.record_rung(step=5, total_steps=45, baseline_steps=90, **place)
    assert event and (event["rung"], event["step"]) == (10, 5)


def test_seeds_and_phases_are_compared_separately() -> None:
    asha = Asha(RULE, metric="val_loss", goal="minimize")
    assert not reach(asha, "a", 10, 4.0)
    assert not reach(asha, "b", 10, 5.0, seed=2) and not reach(asha, "b", 10, 5.0, phase="q")
    assert reach(asha, "b", 10, 5.0)


def test_a_trial_that_may_not_be_stopped_still_counts_for_others() -> None:
    asha = Asha(RULE, metric="val_loss", goal="minimize")
    reach(asha, "a", 10, 4.0)
    assert not reach(asha, "base", 10, 9.0, may_stop=False) and asha.stop_reason("p", "base") is None
    assert cutoff([-4.0, -9.0], 3) == pytest.approx(-5 - 2 / 3)
    assert not reach(asha, "b", 10, 5.5) and reach(asha, "c", 10, 6.0)
    assert asha.stop_reason("p", "c") == (
        "val_loss 6.0000 at step 10 of 90 is not among the best 1/3 of the 3 trials of seed 1 that reached it before"
    )


# ---- in a session --------------------------------------------------------------------------------------------------

SEARCH = """
  - name: find
    search: {method: random, confirm: false, trials: 8, seed: 0, space: {alpha: {uniform: [0.05, 0.5]}}}
  - name: check
    inherit: find
    vary: {project_every: [3]}
early_stop: {method: asha, reduction: 2, first: 2}
"""


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=SEARCH, seeds="[1, 2]", steps=8, every=2)


def evaluations(spec: TrialSpec) -> Iterator[TrialResult]:
    """What a trial reports on its way: ever nearer to its final loss."""
    end = pretend(spec)
    for step in range(0, spec.config.steps, spec.config.eval_every):
        loss = (end.metrics["val_loss"] or 0.0) + 1 - step / spec.config.steps
        yield TrialResult("stopped", end.metrics | {"val_loss": loss, "steps": step}, provenance=end.provenance)


def play(session: Session, *, most: int = 1000) -> list[str]:
    """Runs trials that cost nothing, evaluation by evaluation; returns the ids of those it ran."""
    ran: list[str] = []
    while len(ran) < most and (spec := next_trial(session)):
        ran.append(spec.trial_id)
        if not any(session.should_stop(spec.trial_id, interim) for interim in evaluations(spec)):
            session.tell(spec.trial_id, pretend(spec))
    return ran


def finish(file: Path, root: Path) -> CampaignSummary:
    with session_on(file, root) as session:
        play(begun(session))
        return session.end()


def test_a_search_finishes_few_trials_and_warns_about_it(file: Path, tmp_path: Path) -> None:
    summary = finish(file, tmp_path / "r")
    find, check = summary.phases
    counts = find.trials
    assert counts.stopped >= 4 and counts.finished >= 4 and counts.stopped + counts.finished == 18
    assert (summary.status, check.trials.stopped, summary.problems) == ("finished", 0, ())
    (warning,) = [text for text in find.warnings if "ASHA" in text]
    assert warning.startswith(f"stopped early by ASHA: {counts.stopped} of 18 trials; which ones depends on the ord")
    assert not any("ASHA" in text for text in check.warnings)


def test_a_stopped_arm_ranks_last_without_a_verdict(file: Path, tmp_path: Path) -> None:
    find = finish(file, tmp_path / "r").phases[0]
    stopped = {record["arm"] for record in records(tmp_path / "r") if record["status"] == "stopped"}
    verdicts = {arm.arm: arm.verdict for arm in find.arms}
    assert {name for name, verdict in verdicts.items() if verdict == "incomplete"} == stopped != set()
    ranks = [arm.verdict == "incomplete" for arm in find.arms]
    assert ranks == sorted(ranks), "behind all others"
    assert all(arm.delta is None for arm in find.arms if arm.verdict == "incomplete")
    assert verdicts[find.baseline] == "baseline" and find.winner not in stopped
    # All eight comparisons count, finished or not: Holm multiplies the smallest p by eight.
    judged = [arm.delta for arm in find.arms if arm.delta]
    smallest = min(judged, key=lambda delta: delta.p or 0.0)
    assert smallest.p_holm == pytest.approx(min(1.0, 8 * (smallest.p or 0.0))) and len(judged) < 8


def test_a_trial_that_never_started_has_its_settings_in_config_json(file: Path, tmp_path: Path) -> None:
    finish(file, tmp_path / "r")
    ended = records(tmp_path / "r")
    never = {record["trial_id"]: record["config"] for record in ended if not record["metrics"]["steps"]}
    folders = tmp_path / "r" / "trials"
    assert {name: json.loads((folders / name / "config.json").read_text()) for name in never} == never != {}


def test_a_trial_that_was_stopped_early_does_not_count_as_unsuccessful(file: Path, tmp_path: Path) -> None:
    assert finish(file, tmp_path / "r").trials.stopped > 0
    assert read_snapshot(tmp_path / "r").unsuccessful == 0


def test_a_record_has_the_step_and_the_reason_of_an_early_stop(file: Path, tmp_path: Path) -> None:
    finish(file, tmp_path / "r")
    stopped = [record for record in records(tmp_path / "r") if record["status"] == "stopped"]
    for record in stopped:
        assert (
            "its arm fell behind: val_loss " in record["error"] and " of 8 is not among the best 1/2" in record["error"]
        )
        assert record["metrics"]["steps"] in (0, 2, 4)
    first = {record["arm"]: record for record in stopped if record["seed"] == 1}
    assert all(record["metrics"]["steps"] >= 2 and record["metrics"]["val_loss"] > 4 for record in first.values())
    second = [record for record in stopped if record["seed"] == 2 and record["arm"] in first]
    assert [record["metrics"] for record in second] == [{"steps": 0, "tokens": 0}] * len(second) != [], "never begun"
    for record in second:
        folder = tmp_path / "r" / "trials" / record["trial_id"]
        assert (folder / "config.json").is_file() and read_metrics(folder / "metrics.jsonl") == []


@pytest.mark.parametrize("most", [1, 3, 7, 10])
def test_an_interrupted_campaign_makes_the_same_decisions(file: Path, tmp_path: Path, most: int) -> None:
    undisturbed = finish(file, tmp_path / "undisturbed")
    with session_on(file, tmp_path / "r") as session:
        play(begun(session), most=most)  # then it is killed
    decided = [event for event in read_journal(tmp_path / "r" / "journal.jsonl") if event["event"] == RUNG_REACHED]
    assert finish(file, tmp_path / "r").phases[0].arms == undisturbed.phases[0].arms
    after = [event for event in read_journal(tmp_path / "r" / "journal.jsonl") if event["event"] == RUNG_REACHED]
    assert after[: len(decided)] == decided
    assert len({(event["trial_id"], event["rung"]) for event in after}) == len(after), "each rung once"
    with session_on(file, tmp_path / "r") as session:
        assert not session.has_work() and play(begun(session)) == []
        session.end()
    assert rebuild(tmp_path / "r").phases[0].winner == undisturbed.phases[0].winner


def test_a_crash_between_decision_and_result_does_not_change_the_result(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision is journaled first, so the resumed trial ends at its next evaluation."""
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        ended = session.tell
        monkeypatch.setattr(session, "tell", lambda *_: None)  # the crash
        while spec := next_trial(session):
            if any(session.should_stop(spec.trial_id, interim) for interim in evaluations(spec)):
                break
            ended(spec.trial_id, pretend(spec))
        assert spec is not None
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        assert spec.trial_id not in play(session)
        assert session.state.results[spec.trial_id]["status"] == "stopped"
        session.end()


def test_without_early_stop_the_stopped_trials_are_trained_to_the_end(file: Path, tmp_path: Path) -> None:
    finish(file, tmp_path / "r")
    file.write_text(file.read_text().replace("early_stop:", "description: none\n# early_stop:"))
    with session_on(file, tmp_path / "r") as session:
        assert session.has_work()
        play(begun(session))
        summary = session.end()
    assert summary.trials.stopped == 0 and summary.trials.finished == summary.trials.total
    assert not any("ASHA" in warning for warning in summary.warnings)


def test_without_early_stop_the_stopped_trials_do_not_count_as_done(file: Path, tmp_path: Path) -> None:
    stopped = finish(file, tmp_path / "r").trials.stopped
    file.write_text(file.read_text().replace("early_stop:", "description: none\n# early_stop:"))
    assert estimate(load_campaign(file), tmp_path / "r").to_run == stopped > 0
    with session_on(file, tmp_path / "r") as session:
        assert next_trial(begun(session))
        assert session.snapshot().done == len(session.state.phases["find"].trial_ids) - stopped


def test_a_trial_that_another_phase_needs_is_not_stopped(tmp_path: Path, corpus: Path) -> None:
    phases = """
  - name: sweep
    vary: {alpha: [0.05, 0.1, 0.15, 0.2]}
  - name: find
    search: {method: random, confirm: false, trials: 4, seed: 0, space: {alpha: {choice: [0.05, 0.1, 0.15, 0.2]}}}
early_stop: {reduction: 2, first: 2}
"""
    summary = finish(write_file(tmp_path, corpus, phases=phases, steps=8, every=2), tmp_path / "r")
    assert summary.trials.stopped == 0 and summary.status == "finished"


def test_a_later_phase_finishes_the_trials_that_a_search_stopped(tmp_path: Path, corpus: Path) -> None:
    phases = """
  - name: find
    search: {method: random, confirm: false, trials: 4, seed: 0, space: {alpha: {choice: [0.05, 0.1, 0.15, 0.2]}}}
  - name: all
    vary: {alpha: [0.05, 0.1, 0.15, 0.2]}
    inherit: find
early_stop: {reduction: 2, first: 2}
"""
    file = write_file(tmp_path, corpus, phases=phases, steps=8, every=2)
    last = finish(file, tmp_path / "r").phases[-1]
    assert {arm.verdict for arm in last.arms} <= {"baseline", "better", "worse", "equivalent", "undecided"}
    assert {arm.n for arm in last.arms} == {2}


def test_a_budget_counts_only_trials_that_started(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text() + "budget: {trials: 40}\n")
    finish(file, tmp_path / "r")
    begun_trials = {
        e["trial_id"] for e in read_journal(tmp_path / "r" / "journal.jsonl") if e["event"] == "trial_started"
    }
    never = {r["trial_id"] for r in records(tmp_path / "r") if r["metrics"]["steps"] == 0}
    assert never and not never & begun_trials


# ---- real training -------------------------------------------------------------------------------------------------


def test_a_real_campaign_stops_the_worst_learning_rates_and_resumes_unchanged(tmp_path: Path, corpus: Path) -> None:
    """The worst of the learning rates fall behind by far more than the noise."""
    phases = """
  - name: find
    search: {method: random, confirm: false, trials: 6, seed: 3, space: {optim.lr: {log: [1e-5, 1e-1]}}}
early_stop: {reduction: 2, first: 3}
"""
    file = write_file(tmp_path, corpus, phases=phases, seeds="[1]", steps=12, every=3)
    summary = train_all(file, tmp_path / "r")
    assert summary.status == "finished" and 0 < summary.trials.stopped < 6
    by_id = {record["trial_id"]: record for record in records(tmp_path / "r")}
    for record in by_id.values():
        rows = read_metrics(tmp_path / "r" / "trials" / record["trial_id"] / "metrics.jsonl")
        assert rows[-1]["step"] == record["metrics"]["steps"], "it trained exactly that far"
        if record["status"] == "stopped":
            assert (
                record["metrics"]["steps"] in (3, 6) and record["metrics"]["tokens"] == record["metrics"]["steps"] * 64
            )
            assert record["metrics"]["val_loss"] == rows[-1]["val_loss"] and record["seconds"] > 0
            assert record["provenance"]["data_sha256"] and record["metrics"]["peak_memory_bytes"] > 0
    before = losses(tmp_path / "r")
    assert train_all(file, tmp_path / "r").status == "finished" and losses(tmp_path / "r") == before


# ---- invalid rules -------------------------------------------------------------------------------------------------

SPACE = "{alpha: {uniform: [0.1, 0.5]}}"
FIND = f"\n  - name: find\n    search: {{method: random, confirm: false, trials: 3, seed: 0, space: {SPACE}}}"


@pytest.mark.parametrize(
    ("phases", "rule", "message"),
    [
        (
            FIND,
            "{first: 3}",
            "phase find evaluates every 2 steps, so not at step 3; use a multiple of 2, or another",
        ),
        (FIND, "{first: 8}", "early_stop.first: must be less than 8, the steps that phase find trains, got 8"),
        (FIND + "\n    set: {steps: 4}", "{first: 4}", "must be less than 4, the steps that phase find trains, got 4"),
        (FIND + "\n    hold: seconds", "{first: 2}", "early_stop: phase find holds seconds, so its arms cannot be"),
        (
            "\n  - name: a\n    vary: {alpha: [0.1]}",
            "{first: 2}",
            "early_stop: only phases with `search:` can stop trials early, and no phase has one",
        ),
        (FIND, "{reduction: 3}", "early_stop.first: field required"),
        (FIND, "{}", "early_stop.first: field required"),
        (FIND, "{first: 2, redution: 3}", "early_stop.redution: unknown setting, did you mean 'reduction'?"),
        (FIND, "{first: 2, reduction: 1}", "early_stop.reduction: input should be greater than or equal to 2, got 1"),
        (FIND, "{first: 2, method: hyperband}", "early_stop.method: unknown method 'hyperband'"),
        (FIND, "asha", "early_stop: must be a mapping of settings, got 'asha'"),
    ],
)
def test_an_impossible_early_stop_rule_is_refused(
    tmp_path: Path, corpus: Path, phases: str, rule: str, message: str
) -> None:
    file = write_file(tmp_path, corpus, phases=f"{phases}\nearly_stop: {rule}\n", steps=8, every=2)
    with pytest.raises(ConfigError) as caught:
        load_campaign(file)
    (line,) = str(caught.value).splitlines()
    assert message in line
