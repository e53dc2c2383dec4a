"""The best arm of a search is compared with the baseline again, and that decides the answer."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, write_file
from tune.campaign import load_campaign
from tune.machine import environment
from tune.machine.estimate import estimate
from tune.planning.confirmation import best_arm
from tune.planning.smoke import shrink_campaign
from tune.session.datasets import describe_data
from tune.session.session import Session
from tune.storage.records import BetterArm
from tune.storage.summaries import ArmSummary, CampaignSummary, Delta
from tune.trials.trial import TrialResult, TrialSpec

PHASES = """
  - name: tune
    set: {project_every: 2}
    search: {trials: 3, space: {alpha: {choice: [0.1, 0.2, 0.3]}}}
  - name: after
    inherit: tune
    vary: {project_every: [3]}
"""

Run = Callable[[Callable[[TrialSpec], TrialResult]], CampaignSummary]


COMPARED = """
  - name: tune
    search: {trials: 3, space: {alpha: {choice: [0.1, 0.2, 0.3]}}}
  - name: final
    runs: [{arm: baseline}, {arm: tuned, inherit: tune}]
    seeds: fresh 4
"""


@pytest.fixture
def run(tmp_path: Path, corpus: Path, no_report: None) -> Run:
    """Runs a campaign with results of a function; may be called again to resume it."""
    file = write_file(tmp_path, corpus, phases=PHASES, seeds="[1, 2, 3]")

    def run(result_of: Callable[[TrialSpec], TrialResult]) -> CampaignSummary:
        with session_on(file, tmp_path / "tiny") as session:
            drive(begun(session), result_of)
            return session.end()

    return run


def with_loss(spec: TrialSpec, loss: float) -> TrialResult:
    result = pretend(spec)
    return replace(result, metrics=result.metrics | {"val_loss": loss})


def wobble(spec: TrialSpec) -> float:
    """Noise of mean 0 that differs between the arms."""
    return 0.02 * (spec.seed * (2 + round(spec.config.model.alpha * 20)) % 5 - 2)


def test_a_plan_shows_it(tmp_path: Path, corpus: Path) -> None:
    campaign = load_campaign(write_file(tmp_path, corpus, phases=PHASES, seeds="[1, 2, 3]"))
    rows = {row.phase: row for row in estimate(campaign, tmp_path / "tiny").phases}
    assert list(rows) == ["tune", "tune-confirm", "after"]
    row = rows["tune-confirm"]
    assert (row.arms, row.seeds, row.trials, row.guessed) == (2, 4, 8, True)


def test_a_winner_that_holds_on_fresh_seeds_is_confirmed(run: Run) -> None:
    summary = run(pretend)
    search, confirmation, _ = summary.phases
    assert [arm.arm for arm in confirmation.arms] == ["alpha=0.3", "baseline"]
    assert confirmation.base == search.base == {"project_every": 2}
    assert not set(confirmation.seeds) & set(search.seeds)
    assert len(confirmation.seeds) == 4  # enough for an effect far above the noise
    assert (summary.answer.phase, summary.answer.confirmed) == ("tune-confirm", True)
    assert summary.answer.sentence.startswith("Use alpha=0.3: it lowers val_loss by ")
    assert " unseen seeds" in summary.answer.sentence


def test_a_resume_trains_nothing_again(run: Run) -> None:
    first = run(pretend)
    again = run(lambda spec: pytest.fail(f"{spec.name} was trained again"))
    assert again.answer == first.answer and len(again.phases) == 3


def test_a_winner_that_fresh_seeds_do_not_show_is_no_answer(run: Run) -> None:
    def lucky(spec: TrialSpec) -> TrialResult:
        gain = spec.config.model.alpha if spec.seed <= 3 else 0.0
        return with_loss(spec, 5.0 - gain + 0.1 * wobble(spec))

    answer = run(lucky).answer
    assert answer.sentence.startswith("Undecided: alpha=0.3 lowers val_loss by ")
    assert "but phase tune-confirm does not confirm it" in answer.sentence


def test_the_best_arm_is_confirmed_even_if_the_search_could_not_tell(run: Run) -> None:
    def unclear(spec: TrialSpec) -> TrialResult:
        noise = wobble(spec) * (20 if spec.phase == "tune" else 0.1)
        return with_loss(
            spec, 5.0 - 0.05 * (spec.config.model.alpha == 0.2) + noise - 0.3 * (spec.config.model.alpha == 0.2)
        )

    summary = run(unclear)
    assert summary.phases[0].winner == "baseline"
    assert summary.phases[1].winner == "alpha=0.2"
    assert (summary.answer.overrides, summary.answer.confirmed) == ({"model.alpha": 0.2}, True)


@pytest.mark.parametrize("gain", [0.03, -0.03])
def test_later_phases_start_from_the_better_mean_of_the_confirmation(gain: float, run: Run) -> None:
    """Neither the search nor the confirmation can tell; to go on with one of two arms needs no claim."""

    done = Counter[tuple[str, str]]()

    def unclear(spec: TrialSpec) -> TrialResult:
        """The noise of each arm has mean 0 over the seeds of either phase."""
        noise = {"tune": (0.2, -0.2, 0.0)}.get(spec.phase, (0.2, -0.2, -0.2, 0.2))[done[spec.phase, spec.arm] % 4]
        done[spec.phase, spec.arm] += 1
        if spec.config.model.alpha != 0.2:
            return with_loss(spec, 5.0 if spec.arm == "baseline" else 5.5)
        return with_loss(spec, 5.0 + noise - (0.03 if spec.phase == "tune" else gain))

    summary = run(unclear)
    search, confirmation, after = summary.phases
    assert (search.winner, search.handed_on, confirmation.winner) == ("baseline", None, "baseline")
    assert {arm.verdict for phase in (search, confirmation) for arm in phase.arms} <= {"baseline", "undecided", "worse"}
    tuned = {"model.alpha": 0.2} if gain > 0 else {}
    assert after.base == tuned and after.inherit == "tune-confirm"
    assert confirmation.handed_on == ("alpha=0.2" if tuned else None)
    assert ("; later phases start from alpha=0.2, which has the best mean" in confirmation.why) == bool(tuned)
    assert not summary.answer.overrides and "keep the base" in summary.answer.sentence
    again = run(lambda spec: pytest.fail(f"{spec.name} was trained again"))
    assert [phase.base for phase in again.phases] == [phase.base for phase in summary.phases]


def test_a_base_that_is_judged_on_the_seeds_that_chose_it_is_warned_of(
    tmp_path: Path, corpus: Path, no_report: None
) -> None:
    phases = PHASES.replace("inherit: tune\n", "inherit: tune\n    seeds: [1, 2, 3]\n")
    with session_on(write_file(tmp_path, corpus, phases=phases, seeds="[1, 2, 3]"), tmp_path / "tiny") as session:
        drive(begun(session), lambda spec: with_loss(spec, 5 + 10 * wobble(spec) - (spec.config.model.alpha == 0.2)))
        *_, after = session.end().phases
    assert after.base == {"model.alpha": 0.2}
    assert any("phase tune with the same trials, so its luck is" in warning for warning in after.warnings)


def test_a_phase_that_compares_the_search_gets_its_best_mean(tmp_path: Path, corpus: Path, no_report: None) -> None:
    file = write_file(tmp_path, corpus, phases=COMPARED, seeds="[1, 2, 3]")

    def unclear(spec: TrialSpec) -> TrialResult:
        return with_loss(spec, 5.0 + 10 * wobble(spec) - 0.03 * (spec.config.model.alpha == 0.2))

    with session_on(file, tmp_path / "tiny") as session:
        drive(begun(session), unclear)
        search, final = session.end().phases
    assert (search.winner, search.handed_on) == ("baseline", "alpha=0.2")
    assert {arm.arm: dict(arm.overrides) for arm in final.arms} == {"baseline": {}, "tuned": {"model.alpha": 0.2}}
    assert final.confirmation == 1, "it counts as a confirmation of its question"


def test_without_an_arm_above_the_baseline_nothing_is_trained(run: Run) -> None:
    trained = []

    def worse(spec: TrialSpec) -> TrialResult:
        trained.append(spec.phase)
        return with_loss(spec, 5.0 + (spec.config.model.alpha if spec.arm != "baseline" else 0.0) + wobble(spec) / 100)

    summary = run(worse)
    assert "tune-confirm" not in trained
    assert summary.phases[1].why == (
        "no arm of the search has a better mean than the baseline, so there is nothing to confirm"
    )


def test_the_winner_comes_before_an_arm_of_a_better_mean() -> None:
    arms = [
        ArmSummary("a", verdict="undecided", delta=Delta(-0.3)),
        ArmSummary("b", verdict="better", delta=Delta(-0.2)),
        ArmSummary("baseline", verdict="baseline"),
        ArmSummary("c", verdict="diverged"),
    ]
    overrides = {arm.arm: {"x": arm.arm} for arm in arms}
    best = best_arm(arms, overrides, winner="b", baseline="baseline")
    assert best == BetterArm("b", {"x": "b"}, 0.2)
    best = best_arm(arms, overrides, winner="baseline", baseline="baseline")
    assert best == BetterArm("a", {"x": "a"}, 0.3)
    assert best_arm(arms[2:], overrides, winner="baseline", baseline="baseline") is None


def test_a_smoke_run_goes_through_the_confirmation(tmp_path: Path, corpus: Path, no_report: None) -> None:
    campaign = shrink_campaign(load_campaign(write_file(tmp_path, corpus, phases=PHASES, seeds="[1, 2, 3]")))
    with Session(campaign, tmp_path / "tiny-smoke", command="c", environment=environment.describe("cpu")) as session:
        session.begin(describe_data(campaign.base))
        drive(session)
        summary = session.end()
    phase = next(phase for phase in summary.phases if phase.phase == "tune-confirm")
    assert [arm.n for arm in phase.arms] == [2, 2]
    assert phase.why.startswith("SMOKE: ")
