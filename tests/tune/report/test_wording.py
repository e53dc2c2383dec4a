"""The phrases of the reports: only what the summary knows, and nothing twice."""

from dataclasses import replace
from typing import Any

import pytest

from tune import format as fmt
from tune.report.markdown import render_markdown
from tune.report.wording import (
    campaign_counts,
    cost,
    effect,
    is_named,
    mean_interval,
    noise,
    selection,
    trial_counts,
    varied,
    verdict,
    went_wrong,
)
from tune.storage.summaries import (
    Answer,
    ArmSummary,
    CampaignSummary,
    Delta,
    PhaseNoise,
    PhaseSummary,
    Spread,
    TrialCounts,
    TrialProblem,
)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("alpha=0.2", {"model.alpha": 0.2}),
        ("optim.lr=0.1", {"optim.lr": 0.1}),
        ("optim.lr=0.1 + alpha=0.4", {"optim.lr": 0.1, "model.alpha": 0.4}),
        ("a=1, optim.betas=[0.9, 0.95]", {"model.a": 1, "optim.betas": [0.9, 0.95]}),
    ],
)
def test_a_name_that_says_all_settings_is_enough(name: str, overrides: dict[str, Any]) -> None:
    assert is_named(ArmSummary(name, overrides=overrides))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("baseline", {}),
        ("winner", {"model.alpha": 0.2}),
        ("alpha=0.25", {"model.alpha": 0.2}),  # it begins like it
        ("xalpha=0.2", {"model.alpha": 0.2}),
        ("alpha=0.2", {"model.alpha": 0.2, "optim.lr": 0.1}),  # the rest is inherited
    ],
)
def test_a_name_that_leaves_something_out_is_not(name: str, overrides: dict[str, Any]) -> None:
    assert not is_named(ArmSummary(name, overrides=overrides))


def test_a_sweep_varies_what_the_file_says() -> None:
    assert varied(PhaseSummary(swept={"model.alpha": [0.05, 0.1], "tied": [True, False]})) == {
        "model.alpha": "0.05, 0.1",
        "tied": "true, false",
    }


def test_a_search_varies_what_its_arms_cover() -> None:
    arms = [ArmSummary(str(i), overrides={"lr": i / 10, "rule": "ab"[i % 2], "steps": 5}) for i in range(1, 9)]
    assert varied(PhaseSummary(arms=(ArmSummary("baseline"), *arms))) == {
        "lr": "0.1 to 0.8, 8 values",
        "rule": "b and a",
    }


def test_nothing_that_varies_is_nothing() -> None:
    assert varied(PhaseSummary(arms=(ArmSummary("baseline"),))) == {}


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [
        ("failed", "ValueError: \x1b[31mno", r"ValueError: \x1b[31mno"),
        ("diverged", None, "its loss became non-finite"),
        ("failed", None, fmt.MISSING),
    ],
)
def test_a_trial_without_an_error_is_explained_by_how_it_ended(status: str, error: str | None, text: str) -> None:
    assert went_wrong(TrialProblem("p", "a", 1, "t", status, error)) == text


def test_an_interval_is_written_only_if_it_is_known() -> None:
    spread = Spread(4.3, 0.1, 4.2, 4.4)
    assert mean_interval(spread) == "4.3000 ± 0.1000"
    assert mean_interval(replace(spread, ci_low=None)) == "4.3000"
    assert mean_interval(Spread()) == fmt.MISSING
    assert effect(Delta(0.1)) == "+0.1000"
    assert effect(Delta(0.1, -0.1, 0.3)) == f"+0.1000 [{fmt.MINUS}0.1000, +0.3000]"
    assert effect(None) == fmt.MISSING


def test_trials_are_listed_only_when_something_is_unusual() -> None:
    counts = TrialCounts(total=15, finished=15)
    assert trial_counts(counts) == "15 trials"
    assert trial_counts(replace(counts, finished=14, diverged=1)) == "15 trials (14 finished, 1 diverged)"
    assert trial_counts(replace(counts, reused=4)) == "15 trials (4 reused)"
    assert trial_counts(TrialCounts(total=1, finished=1)) == "1 trial"


def test_the_total_of_a_campaign_does_not_contain_what_its_phases_share() -> None:
    counts = TrialCounts(total=20, finished=17, diverged=3, reused=12)
    assert campaign_counts(counts) == "20 trials (17 finished, 3 diverged) + 12 reused"
    assert campaign_counts(TrialCounts(total=29, finished=29, reused=3)) == "29 trials + 3 reused"
    summary = CampaignSummary(trials=counts, tokens=44_300, seconds=69.0)
    assert cost(summary).startswith("20 trials (17 finished, 3 div")


def test_the_noise_of_a_phase_is_one_sentence() -> None:
    text = "Noise: sd 0.0041 (paired), correlation between arms over seeds 0.87, smallest detectable effect 0.0063."
    assert noise(PhaseSummary(noise=PhaseNoise(0.0041, "paired", 0.87, 8, 0.0063))) == text
    assert noise(PhaseSummary()) == "Noise unknown: it takes two finished seeds of the baseline."


def test_the_effect_after_selection_is_shown_until_the_winner_is_confirmed() -> None:
    assert selection(-0.0812) == f"about {fmt.MINUS}0.081, as the best of several arms is partly lucky"
    assert selection(None) == ""
    answer = Answer(phase="a", winner="x", delta=Delta(-0.1), shrunken=-0.08)
    shown = render_markdown(CampaignSummary(answer=answer))
    assert (
        f"- After allowing for selection: about {fmt.MINUS}0.08, as the best of several arms is partly lucky" in shown
    )
    confirmed = CampaignSummary(answer=replace(answer, shrunken=None, confirmed=True))
    assert "selection" not in render_markdown(confirmed).partition("## ")[0]


def test_an_undecided_arm_says_how_many_seeds_it_needs() -> None:
    assert verdict(ArmSummary("x", verdict="undecided", seeds_to_decide=9)) == "undecided, about 9 seeds"
    assert verdict(ArmSummary("x", verdict="undecided", delta=Delta(0.005))) == "undecided, over 1,000 seeds"
    assert verdict(ArmSummary("x", verdict="undecided", delta=Delta(0.005), decision="after 30 seeds")) == "undecided"
    assert verdict(ArmSummary("x", verdict="equivalent")) == "equivalent"
