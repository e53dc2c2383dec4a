"""The figure of a phase that was decided in rounds, and the sentences around it."""

from dataclasses import replace

from tests.helpers.summaries import from_json
from tune.report import wording
from tune.report.html import render_html
from tune.report.look_figure import look_figure
from tune.report.markdown import render_markdown
from tune.report.next_step import next_step
from tune.storage.records import ArmLook, Decision, Look
from tune.storage.summaries import ArmSummary, CampaignSummary, Delta, PhaseNoise, PhaseSummary, TrialCounts, to_json


def at(arm: str, n: int, delta: float, decision: Decision | None = None, why: str = "") -> ArmLook:
    return ArmLook(arm, n, delta, delta - 0.4 / n, delta + 0.4 / n, 0.01, 0.04, decision, why)


LOOKS = (
    Look(1, 3, 0.01, "b", (at("b", 3, -0.2), at("c<i>", 3, 0.1, "dropped", "clearly behind b")), ("a", "b")),
    Look(2, 4, 0.01, "b", (at("b", 4, -0.15, "better"),)),
)
ARMS = (
    ArmSummary(
        "b", 1, n=4, delta=Delta(-0.15, -0.25, -0.05, 0.01, 0.04), verdict="better", decision="better after 4 seeds"
    ),
    ArmSummary("a", 2, n=4, verdict="baseline"),
    ArmSummary(
        "c<i>", 3, n=3, delta=Delta(0.1), verdict="undecided", decision="dropped after 3 seeds: clearly behind b"
    ),
)
PHASE = PhaseSummary(
    campaign="x",
    phase="p",
    arms=tuple(replace(arm, trial_ids=tuple(f"{arm.arm}{i}" for i in range(arm.n))) for arm in ARMS),
    baseline="a",
    winner="b",
    min_effect=0.01,
    seeds=(1, 2, 3, 4),
    noise=PhaseNoise(sd=0.1),
    trials=TrialCounts(total=11, finished=11),
    most_seeds=10,
    looks=LOOKS,
)


def test_each_arm_has_its_interval_at_each_look_and_its_verdict_at_the_last() -> None:
    figure = look_figure(PHASE)
    assert figure is not None
    b, c = figure["data"]
    assert (b["name"], b["y"]) == ("b: better", [-0.2, -0.15])
    assert b["marker"]["symbol"] == ["circle", "circle"]
    assert b["marker"]["size"] == [5, 10]
    assert (c["name"], c["marker"]["symbol"], len(c["x"])) == ("c&lt;i&gt;: dropped", ["circle-open"], 1)
    assert figure["layout"]["xaxis"]["ticktext"] == ["3", "4"]


def test_a_phase_with_listed_seeds_has_no_such_figure_and_no_such_words() -> None:
    phase = replace(PHASE, looks=(), most_seeds=None)
    assert look_figure(phase) is None
    assert wording.rounds(phase) is None
    assert wording.seed_counts(phase) == "4 seeds"


def test_the_report_says_what_was_saved_and_when_each_arm_was_decided() -> None:
    rounds = wording.rounds(PHASE)
    assert rounds is not None
    assert rounds.saving == (
        "Decided in rounds, after 3 and 4 seeds: 11 of 30 trials, 63% saved (10 seeds for every arm would be 30)."
    )
    assert rounds.decisions == ["b: better after 4 seeds", "c<i>: dropped after 3 seeds: clearly behind b"]
    assert "up to 0.0300 here" in rounds.note
    assert "confirm a winner on fresh seeds" in rounds.note
    assert wording.seed_counts(PHASE) == "3 to 4 seeds"
    summary = CampaignSummary(campaign="x", phases=(PHASE,))
    for page in (render_html(summary, ()), render_markdown(summary)):
        assert "11 of 30 trials" in page
        assert "clearly behind b" in page
        assert "<i>" not in page


def test_arms_that_used_up_their_seeds_are_the_next_step() -> None:
    arms = (replace(ARMS[0], verdict="undecided", n=10), *ARMS[1:])
    summary = CampaignSummary(campaign="x", status="finished", phases=(replace(PHASE, arms=arms),))
    assert next_step(summary).startswith("1 arm of p undecided after 10 seeds: raise `most:`")


def test_looks_survive_json() -> None:
    assert from_json(PhaseSummary, to_json(PHASE)).looks == LOOKS
