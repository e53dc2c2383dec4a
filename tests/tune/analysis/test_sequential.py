"""Looks until decided: against published boundaries, by simulation, and one rule at a time."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tune.analysis.alpha_spending import corrected_for_looks, look_sizes, nominal_levels
from tune.analysis.sequential import (
    SequentialRule,
    describe_decision,
    is_over,
    judge_by_looks,
    last_looks,
    replay_looks,
    take_look,
)
from tune.bench.sequential import Design, simulate
from tune.storage.records import Look, TrialOutcome

RULE = SequentialRule(3, 30, min_effect=0.0)
NOISE = np.random.default_rng(7).normal(size=(12, 30))


def finished(rows: Mapping[str, Sequence[float]]) -> dict[str, list[TrialOutcome]]:
    return {arm: [TrialOutcome("finished", float(x)) for x in row] for arm, row in rows.items()}


def race(
    outcomes: Mapping[str, Sequence[TrialOutcome]], rule: SequentialRule = RULE
) -> tuple[list[Look], dict[str, int]]:
    """The looks at arms whose outcomes are known for all seeds; the first arm is the baseline."""
    ids = {arm: [(arm, i) for i in range(len(row))] for arm, row in outcomes.items()}
    return replay_looks(ids, range(1, 31), next(iter(outcomes)), rule, lambda key: outcomes[key[0]][key[1]])


def noisy(effects: Sequence[float], sd: float = 1.0) -> dict[str, list[TrialOutcome]]:
    """Arms with these true effects, over seeds that shift all arms alike."""
    seeds = 3 * np.random.default_rng(3).normal(size=30)
    rows = {f"arm{i}": 5 + effect + seeds + sd * NOISE[i] for i, effect in enumerate(effects)}
    return finished({"base" if arm == "arm0" else arm: row.tolist() for arm, row in rows.items()})


# ---- alpha over the looks ------------------------------------------------------------------------------------------


def test_the_boundaries_are_those_of_lan_and_demets() -> None:
    """Two-sided 5 %, five equally spaced looks, Pocock-type spending: Reboussin, DeMets, Kim and Lan (2000)."""
    bounds = [stats.norm.isf(level / 2) for level in nominal_levels((1, 2, 3, 4, 5), 0.05)]
    assert bounds == pytest.approx([2.4380, 2.4268, 2.4101, 2.3966, 2.3859], abs=2e-4)


def test_all_looks_together_reject_a_true_hypothesis_at_the_nominal_rate() -> None:
    sizes = look_sizes(3, 30)
    levels = np.array(nominal_levels(sizes, 0.05))
    sums = np.random.default_rng(1).normal(size=(40_000, 30)).cumsum(1)
    z = sums[:, np.array(sizes) - 1] / np.sqrt(sizes)
    rate = (2 * stats.norm.sf(abs(z)) < levels).any(1).mean()
    assert rate == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 40_000))


def test_one_look_spends_everything() -> None:
    assert nominal_levels((5,), 0.05) == pytest.approx([0.05])
    assert corrected_for_looks((5,), 0, 0.02) == pytest.approx(0.02, rel=0.01)


@given(st.integers(2, 40), st.integers(0, 200))
def test_looks_go_from_start_to_most_and_never_stand_still(start: int, more: int) -> None:
    sizes = look_sizes(start, start + more)
    assert (sizes[0], sizes[-1]) == (start, start + more)
    assert all(a < b for a, b in pairwise(sizes))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10), st.floats(-11, -0.7))
def test_the_correction_for_looks_is_the_inverse_of_the_levels(number: int, exponent: float) -> None:
    sizes, rate = look_sizes(3, 30), 10**exponent
    p = nominal_levels(sizes, rate)[number]
    assert corrected_for_looks(sizes, number, p) == pytest.approx(rate, rel=0.02)


def test_the_correction_for_looks_grows_with_p_and_ends_at_1() -> None:
    sizes = look_sizes(3, 30)
    corrected = [corrected_for_looks(sizes, 2, p) for p in [0.0, 1e-40, 1e-12, 1e-3, 0.01, 0.5, 1.0]]
    assert corrected == sorted(corrected)
    assert (corrected[0], corrected[-1]) == (0.0, 1.0)
    assert all(a >= p for a, p in zip(corrected, [0.0, 1e-40, 1e-12, 1e-3, 0.01, 0.5, 1.0], strict=True))


# ---- what a look decides -------------------------------------------------------------------------------------------


def test_an_arm_that_is_clearly_better_is_decided_at_the_first_look() -> None:
    looks, n_seeds = race(noisy([0, -20, 0, 0]))
    assert last_looks(looks)["arm1"].decision == "better"
    assert n_seeds["arm1"] < 30
    assert is_over(looks)


def test_arms_clearly_behind_the_leader_are_dropped_and_get_no_more_seeds() -> None:
    looks, n_seeds = race(noisy([0, -20, 0.1, -0.1, 0.2]))
    row = last_looks(looks)["arm3"]
    assert (row.decision, row.why, row.n) == ("dropped", "clearly behind arm1", 3)
    assert describe_decision(row) == "dropped after 3 seeds: clearly behind arm1"
    assert n_seeds["arm3"] == 3


def test_an_arm_that_loses_to_the_baseline_is_worse() -> None:
    looks, _ = race(noisy([0, 20, 0, 0]))
    assert last_looks(looks)["arm1"].decision == "worse"


def test_maximizing_turns_better_and_worse_around() -> None:
    looks, _ = race(noisy([0, 20, -20, 0]), SequentialRule(3, 30, min_effect=0.0, goal="maximize"))
    assert {arm: last_looks(looks)[arm].decision for arm in ("arm1", "arm2")} == {"arm1": "better", "arm2": "worse"}


def test_an_interval_within_min_effect_is_equivalent() -> None:
    looks, n_seeds = race(noisy([0, 0, 0, 0], sd=0.001), SequentialRule(3, 30, min_effect=0.05))
    assert {row.decision for row in last_looks(looks).values()} == {"equivalent"}
    assert set(n_seeds.values()) == {3}


def test_arms_without_a_prospect_are_futile_and_end_the_phase() -> None:
    looks, n_seeds = race(noisy([0] * 12))
    decisions = [row.decision for row in last_looks(looks).values()]
    assert "futile" in decisions
    assert "better" not in decisions
    assert sum(n_seeds.values()) < 12 * 30


def test_an_arm_that_is_still_open_at_the_end_is_undecided() -> None:
    looks, n_seeds = race(noisy([0, 0.3]), SequentialRule(3, 3))
    assert (last_looks(looks)["arm1"].decision, n_seeds) == ("undecided", {"base": 3, "arm1": 3})


def test_an_arm_that_loses_a_trial_is_out_and_the_others_go_on() -> None:
    outcomes = noisy([0, -0.5, 0, -0.5])
    outcomes["arm2"][1] = TrialOutcome("diverged")
    outcomes["arm3"][4] = TrialOutcome("failed")
    rows = last_looks(race(outcomes)[0])
    assert (rows["arm2"].decision, rows["arm2"].n, rows["arm2"].delta) == ("diverged", 0, None)
    assert rows["arm3"].decision in ("failed", "dropped", "futile")
    assert rows["arm1"].n >= 3


def test_a_baseline_without_results_ends_the_phase() -> None:
    outcomes = noisy([0, -20, 0])
    outcomes["base"] = [TrialOutcome("diverged")] * 30
    looks, n_seeds = race(outcomes)
    assert [row.decision for row in looks[-1].arms] == ["undecided", "undecided"]
    assert set(n_seeds.values()) == {3}


def test_a_baseline_that_diverged_makes_no_arm_worse() -> None:
    outcomes = noisy([0, 20, 0])
    outcomes["base"][0] = TrialOutcome("diverged")
    assert last_looks(race(outcomes)[0])["arm1"].decision != "worse"


def test_the_baseline_always_continues_and_so_does_a_leader_that_is_better() -> None:
    for look in race(noisy([0, -2.5, -1.5, -1.2, -2.2]))[0]:
        if look.runs_on:
            assert "base" in look.runs_on
            better = {row.arm for row in look.arms if row.decision == "better"}
            assert better & set(look.runs_on) <= {look.leader}


def test_a_decision_is_never_taken_back() -> None:
    looks, _ = race(noisy([0, -2.5, -1.5, -1.2, -2.2, 1.0]))
    decided: dict[str, str] = {}
    for look in looks:
        for row in look.arms:
            assert decided.get(row.arm, row.decision) == row.decision
            if row.decision:
                decided[row.arm] = row.decision


def test_looks_wait_for_every_trial_of_their_round() -> None:
    outcomes = noisy([0, -0.5, 0, 0.5])
    outcomes["arm2"][2] = TrialOutcome("missing")
    assert race(outcomes) == ([], {"base": 3, "arm1": 3, "arm2": 3, "arm3": 3})


def test_holm_counts_arms_that_get_no_more_seeds() -> None:
    outcomes = {arm: dict(enumerate(row[:3], 1)) for arm, row in noisy([0, -20, *[0] * 8]).items()}
    first = take_look(outcomes, "base", RULE, [])
    row = next(row for row in first.arms if row.arm == "arm1")
    assert row.p is not None
    assert row.p_corrected == pytest.approx(9 * corrected_for_looks(RULE.sizes, 0, row.p))


# ---- verdicts ------------------------------------------------------------------------------------------------------


def test_the_verdict_of_an_arm_is_that_of_its_last_look() -> None:
    outcomes = noisy([0, -20, 0.1, -0.1, 0.2])
    looks, n_seeds = race(outcomes)
    trained = {arm: dict(enumerate(row[: n_seeds[arm]], 1)) for arm, row in outcomes.items()}
    judgement = judge_by_looks(trained, looks, baseline="base", min_effect=0.0)
    arms = {arm.arm: arm for arm in judgement.arms}
    assert (judgement.winner, arms["arm1"].verdict, arms["arm3"].verdict) == ("arm1", "better", "undecided")
    assert arms["arm3"].decision == "dropped after 3 seeds: clearly behind arm1"
    row = last_looks(looks)["arm1"]
    delta = arms["arm1"].delta
    assert delta is not None
    assert (delta.mean, delta.ci_low, delta.ci_high, delta.p_holm) == (
        row.delta,
        row.ci_low,
        row.ci_high,
        row.p_corrected,
    )
    assert "corrected for arms and looks" in judgement.why


def test_a_phase_without_a_better_arm_keeps_the_baseline_and_counts_the_others() -> None:
    outcomes = noisy([0, 20, 20, 20])
    looks, n_seeds = race(outcomes)
    trained = {arm: dict(enumerate(row[: n_seeds[arm]], 1)) for arm, row in outcomes.items()}
    judgement = judge_by_looks(trained, looks, baseline="base", min_effect=0.0)
    assert (judgement.winner, judgement.arms[0].arm) == ("base", "base")
    assert judgement.why == "no arm is better than the baseline, so the baseline stays: 3 worse"


# ---- by simulation -------------------------------------------------------------------------------------------------


def test_an_effect_of_2_sd_is_found_with_a_fraction_of_the_trials() -> None:
    found = simulate("same", 2.0, design=Design(12, 3, 30), phases=25)
    assert found["power"] >= 0.9
    assert found["trials"] < 0.25 * 12 * 30
    assert found["false_better"] <= 0.12


def test_without_an_effect_few_phases_have_a_false_verdict() -> None:
    found = simulate("same", 0.0, design=Design(6, 3, 12), phases=60)
    assert found["any_false"] <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 60)
    assert found["trials"] < 6 * 12
