"""Campaigns with `seeds: {until: decided}`: rounds of seeds, looks in the journal, interruptions, budgets."""

import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, session_on, strict, train_all, write_file
from tune.campaign import load_campaign
from tune.machine.estimate import estimate
from tune.results.compare import compare
from tune.results.status import read_snapshot
from tune.results.summary import rebuild
from tune.results.verify import verify
from tune.session.session import Session
from tune.storage.journal import read_journal
from tune.storage.state import read_state
from tune.storage.summaries import CampaignSummary, to_json
from tune.trials.trial import TrialResult, TrialSpec

PHASES = """
  - name: alpha
    vary: {alpha: [0.1, 0.2, 0.3, 0.4]}
"""
UNTIL = "{until: decided, start: 3, most: 12}"


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=PHASES, seeds=UNTIL)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny"


def noisy(spec: TrialSpec, sd: float = 0.1) -> TrialResult:
    """A result whose noise is about as large as the effect of the best alpha, so that it takes several looks."""
    result = pretend(spec, gain=0.0)
    best = 2.5 * sd if spec.config.model.alpha == 0.2 else 0.0
    noise = random.Random(zlib.crc32(f"{spec.config.model.alpha} {spec.seed}".encode())).gauss(0, sd)
    loss = 5.0 + 0.3 * spec.seed - best + noise
    return replace(result, metrics=result.metrics | {"val_loss": loss, "val_bpb": loss / 2, "train_loss": loss})


def run(file: Path, root: Path, result_of: Callable[[TrialSpec], TrialResult] = noisy) -> CampaignSummary:
    with session_on(file, root) as session:
        drive(begun(session), result_of)
        return session.end()


def decisions(summary: CampaignSummary) -> Any:
    """What must not depend on interruptions or on the order of the trials."""
    return [to_json((phase.looks, phase.arms, phase.winner, phase.why, phase.seeds)) for phase in summary.phases]


def test_clear_differences_are_decided_after_the_first_round(file: Path, root: Path, no_report: None) -> None:
    summary = run(file, root, pretend)
    phase = summary.phases[0]
    assert (summary.status, phase.winner, phase.trials.total, phase.seeds) == ("finished", "alpha=0.4", 15, (1, 2, 3))
    assert [len(phase.looks), phase.looks[0].runs_on] == [1, ()]


def test_open_arms_get_more_seeds_and_the_others_keep_theirs(file: Path, root: Path, no_report: None) -> None:
    summary = run(file, root)
    phase = summary.phases[0]
    assert (summary.status, phase.winner) == ("finished", "alpha=0.2")
    assert len(phase.looks) > 1
    arms = {arm.arm: arm for arm in phase.arms}
    assert arms["alpha=0.2"].n < 12
    assert min(arm.n for arm in phase.arms) < max(arm.n for arm in phase.arms) == arms["baseline"].n
    assert phase.trials.total == sum(arm.n for arm in phase.arms) < (phase.fixed_trials or 0) == 60
    for arm in phase.arms:
        if arm.arm != "baseline":
            assert arm.decision is not None
            assert f"after {arm.n} seeds" in arm.decision


def test_the_journal_has_every_look_with_the_seeds_that_follow_from_it(file: Path, root: Path, no_report: None) -> None:
    run(file, root)
    planned = [event for event in read_journal(root / "journal.jsonl") if event["event"] == "phase_planned"]
    assert [len(event["looks"]) for event in planned] == list(range(len(planned)))
    for event in planned[1:]:
        last = event["looks"][-1]
        sizes = {arm["arm"]: len(arm["trials"]) for arm in event["arms"]}
        assert all((sizes[arm] == max(sizes.values())) for arm in last["runs_on"])
        assert {"number", "seeds", "level", "leader", "arms", "runs_on"} == set(last)
    assert planned[-1]["looks"][-1]["runs_on"] == []


@pytest.mark.parametrize("n", [14, 15, 21])
def test_a_run_that_is_killed_decides_the_same_after_it_is_resumed(
    n: int, file: Path, root: Path, tmp_path: Path, no_report: None
) -> None:
    undisturbed = run(file, tmp_path / "undisturbed")
    with session_on(file, root) as session:
        drive(begun(session), noisy, most=n)  # and no end, as after a kill
    assert decisions(run(file, root)) == decisions(undisturbed)
    trained = [e["trial_id"] for e in read_journal(root / "journal.jsonl") if e["event"] == "trial_finished"]
    assert len(trained) == len(set(trained)) == undisturbed.trials.total


def test_the_order_in_which_trials_end_changes_no_decision(
    file: Path, root: Path, tmp_path: Path, no_report: None
) -> None:
    in_order = run(file, tmp_path / "in-order")

    def backwards(session: Session) -> None:
        while True:
            specs = []
            while (spec := next_trial(session)) is not None:
                specs.append(spec)
            if not specs:
                return
            for spec in reversed(specs):
                session.tell(spec.trial_id, noisy(spec))

    with session_on(file, root) as session:
        backwards(begun(session))
        assert decisions(session.end()) == decisions(in_order)


def test_a_failed_trial_takes_its_arm_out_until_it_is_trained_again(file: Path, root: Path, no_report: None) -> None:
    def broken(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status="failed") if (spec.arm, spec.seed) == ("alpha=0.2", 2) else noisy(spec)

    phase = run(file, root, broken).phases[0]
    assert {arm.arm: arm.decision for arm in phase.arms}["alpha=0.2"] == "failed after 0 seeds: it lost a trial"
    assert run(file, root).phases[0].winner == "alpha=0.2"


def test_a_diverged_arm_gets_no_more_seeds(file: Path, root: Path, no_report: None) -> None:
    def diverging(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status="diverged") if (spec.arm, spec.seed) == ("alpha=0.4", 1) else noisy(spec)

    arms = {arm.arm: arm for arm in run(file, root, diverging).phases[0].arms}
    assert (arms["alpha=0.4"].verdict, len(arms["alpha=0.4"].trial_ids)) == ("diverged", 3)


def test_a_budget_ends_a_campaign_between_looks_and_a_larger_one_continues_it(
    file: Path, root: Path, tmp_path: Path, no_report: None
) -> None:
    text = file.read_text()
    file.write_text(text + "budget: {trials: 17}\n")
    stopped = run(file, root)
    assert (stopped.status, stopped.phases[0].winner) == ("stopped by budget", None)
    assert stopped.phases[0].looks[-1].runs_on
    file.write_text(text)
    assert decisions(run(file, root)) == decisions(run(file, tmp_path / "undisturbed"))


def test_the_next_phase_starts_from_a_winner_that_was_decided_early(
    tmp_path: Path, corpus: Path, root: Path, no_report: None
) -> None:
    phases = PHASES + "  - {name: confirm, inherit: alpha, seeds: [40, 41], runs: [{arm: baseline}]}\n"
    summary = run(write_file(tmp_path, corpus, phases=phases, seeds=UNTIL), root)
    assert summary.phases[1].base == {"model.alpha": 0.2}


def test_fresh_seeds_are_not_those_of_other_phases(tmp_path: Path, corpus: Path, root: Path, no_report: None) -> None:
    confirm = "  - {name: confirm, seeds: {until: decided, fresh: true, most: 5}, vary: {alpha: [0.4]}}\n"
    summary = run(write_file(tmp_path, corpus, phases=PHASES + confirm, seeds=UNTIL), root, pretend)
    assert not set(summary.phases[1].seeds) & set(range(1, 13))


def test_status_and_plan_say_what_the_campaign_may_cost(file: Path, root: Path, no_report: None) -> None:
    planned = estimate(load_campaign(file), root)
    assert (planned.trials, planned.most_trials) == (15, 60)
    with session_on(file, root) as session:
        drive(begun(session), noisy, most=15)
        snapshot = session.snapshot()
        assert snapshot.total < (snapshot.most or 0) < 60
        assert not snapshot.total_is_final
        assert (snapshot.look or "").startswith("look 1, 3 seeds: ")
    run(file, root)
    ended = read_snapshot(root)
    assert (ended.most, ended.total_is_final, ended.done) == (None, True, ended.total)


def test_results_can_be_verified_rebuilt_and_compared(file: Path, root: Path, tmp_path: Path, no_report: None) -> None:
    run(file, root)
    run(file, tmp_path / "other" / "tiny")
    assert decisions(rebuild(root)) == decisions(rebuild(tmp_path / "other" / "tiny"))
    same = compare(root, tmp_path / "other" / "tiny")
    assert {arm.verdict for arm in same.arms} == {"identical in every trial"}
    assert sorted(len(arm.seeds) for arm in same.arms) == sorted(arm.n for arm in rebuild(root).phases[0].arms)


def test_a_real_campaign_ends_after_one_round_if_nothing_matters(tmp_path: Path, corpus: Path, root: Path) -> None:
    seeds = "{until: decided, start: 2, most: 6}\nmin_effect: 5"
    file = write_file(tmp_path, corpus, phases="\n  - {name: alpha, vary: {alpha: [0.2, 0.4]}}\n", seeds=seeds)
    summary = train_all(file, root)
    assert {arm.verdict for arm in summary.phases[0].arms} == {"baseline", "equivalent"}
    assert summary.trials.total == 6
    assert verify(root).intact
    page = (root / "report.html").read_text()
    assert "6 of 18 trials" in page
    written = strict((root / "summary.json").read_text())["phases"][0]
    assert written["looks"][0]["arms"][0]["decision"] == "equivalent"
    assert read_state(root).phases["alpha"].looks[0].seeds == 2
