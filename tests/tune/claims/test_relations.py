"""The claims ledger, compared with scipy, simulated truths and campaigns with known results."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, session_on, strict, write_file
from tune.claims.evidence import Evidence
from tune.claims.relations import RELATIONS, judge_claims
from tune.claims.selectors import ClaimArm
from tune.report.html import render_html, render_markdown
from tune.report.markdown import claims_markdown
from tune.results.summary import rebuild
from tune.spec.metrics import BUILT_IN_GOALS
from tune.spec.schema import Claim
from tune.storage.journal import read_journal
from tune.storage.records import TrialOutcome
from tune.storage.summaries import DIAGNOSTICS, CampaignSummary, ClaimResult, to_json
from tune.terminal.final_screen import final_screen
from tune.trials.trial import TrialResult, TrialSpec

Cell = float | str | None  # a value, or a status without one
LEFT, RIGHT = {"alpha": 0.28}, {"alpha": 0.05}
MISTAKES = 1e-4  # chance of a simulation's test to fail although all is well


def evidence(
    phases: Mapping[str, Mapping[str, tuple[Mapping[str, Any], Sequence[Cell]]]],
    *,
    metric: str = "val_loss",
    min_effect: float = 0.0,
    seeds: Sequence[int] = range(1, 1000),
    shared: bool = False,
    goal: Any = "minimize",
) -> Evidence:
    """Phases of arms, each with its settings and the value of each seed; `shared` phases have the same trials."""
    arms, results = [], {}
    names = {name for phase in phases.values() for chosen, _ in phase.values() for name in chosen}
    for phase, members in phases.items():
        for i, (name, (chosen, values)) in enumerate(members.items()):
            complete = dict.fromkeys(names, "base") | {"alpha": 0.1} | dict(chosen)
            ids = {seed: f"{'' if shared else phase}{name}-s{seed}" for seed, _ in zip(seeds, values, strict=False)}
            arms.append(ClaimArm(phase, name, i == 0, chosen, complete, ids))
            for trial_id, value in zip(ids.values(), values, strict=True):
                known = isinstance(value, str)
                results[trial_id] = TrialOutcome(value, None) if known else TrialOutcome("finished", value)  # pyright: ignore

    def outcome(trial_id: str, wanted: str) -> TrialOutcome:
        return results[trial_id] if wanted == metric else replace(results[trial_id], value=None)

    return Evidence(arms, outcome, metric, goal, 0.95, min_effect)


def two(left: Sequence[Cell], right: Sequence[Cell], **rules: Any) -> Evidence:
    return evidence({"p": {"right": (RIGHT, right), "left": (LEFT, left)}}, **rules)


def decide(relation: str, proof: Evidence, **fields: Any) -> ClaimResult:
    sides: dict[str, Any] = {"left": LEFT, "right": RIGHT} if relation not in ("monotone", "arithmetic") else {}
    return judge_claims([Claim("x", relation, **(sides | fields))], proof)[0]


def interval(entry: Mapping[str, Any]) -> tuple[float, float]:
    return entry.ci_low, entry.ci_high


def at_most(hits: int, n: int, rate: float) -> bool:
    """Whether `hits` of `n` are consistent with a rate of at most `rate`."""
    return bool(stats.binomtest(hits, n, rate, alternative="greater").pvalue > MISTAKES)


# ---- against scipy ---------------------------------------------------------------------------------------------------


def test_two_arms_are_compared_by_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    level = rng.normal(4, 1, 6)
    left, right = level + rng.normal(-0.1, 0.05, 6), level + rng.normal(0, 0.05, 6)
    entry = decide("less", two(left.tolist(), right.tolist()))
    expected = stats.ttest_rel(left, right).confidence_interval(0.95)
    assert interval(entry) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert entry.observed == pytest.approx(np.mean(left - right), rel=1e-9)
    assert entry.n == 6 and len(entry.trials) == 12 and entry.verdict == "reproduced"


def test_a_pair_that_happens_to_be_quiet_is_judged_by_the_noise_of_the_whole_phase() -> None:
    """The reference solves the two-way layout by least squares on dummy variables."""
    rng = np.random.default_rng(0)
    y = (
        rng.normal(0, [[0.05], [0.05], [0.1], [0.1]], (4, 3))
        + rng.normal(0, 1, 3)
        + np.array([[0.3], [0.0], [0.1], [0.2]])
    )
    given = [RIGHT, LEFT, {"alpha": 0.2}, {"alpha": 0.3}]
    arms = {f"a{i}": (given[i], y[i].tolist()) for i in range(4)}
    entry = decide("less", evidence({"p": arms}))
    design = np.array([[*np.eye(4)[i], *np.eye(3)[s][1:]] for i in range(4) for s in range(3)])
    beta, residual, *_ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    se = np.sqrt(residual[0] / 6 * 2 / 3)
    half = stats.t.ppf(0.975, 6) * se
    assert interval(entry) == pytest.approx((beta[1] - beta[0] - half, beta[1] - beta[0] + half), rel=1e-9)


@pytest.mark.parametrize(
    ("relation", "fields", "effect"),
    [("less", {}, -0.03), ("greater", {}, -0.03 - 0.005), ("equal", {"tolerance": 0.01}, -0.02)],
)
def test_an_undecided_claim_says_how_many_seeds_would_decide_it(relation: str, fields: Any, effect: float) -> None:
    """The reference is the power of the paired t test, from the noncentral t distribution.

    `less` needs to tell -0.03 from 0, `greater` from min_effect, and `equal` from its tolerance.
    """
    differences = np.array([-0.11, 0.05, -0.03])  # mean -0.03, sd 0.08
    entry = decide(relation, two((4 + differences).tolist(), [4.0, 4.0, 4.0], min_effect=0.005), **fields)

    def power(n: int) -> float:
        return float(stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, abs(effect) / (0.08 / np.sqrt(n))))

    expected = next(n for n in range(2, 1000) if power(n) >= 0.8)
    assert entry.verdict == "undecided"
    said = int(entry.why.split("about ")[1].split(" seeds would decide it")[0])
    assert said == pytest.approx(expected, rel=0.1)  # it is simulated


def test_a_claim_on_its_border_cannot_be_decided() -> None:
    entry = decide("equal", two([4.01, 4.05, 4.03], [4.0, 4.0, 4.0]), tolerance=0.03)
    assert entry.verdict == "undecided" and entry.why.endswith("1,000 seeds would not decide it")


def test_several_pairs_are_averaged_per_seed_first() -> None:
    rng = np.random.default_rng(3)
    y = {(a, k): rng.normal(0, 1, 4) for a in (0.28, 0.05) for k in (1, 7, 10)}
    arms = {f"{a} {k}": ({"alpha": a, "project_every": k}, values.tolist()) for (a, k), values in y.items()}
    entry = decide("less", evidence({"p": arms}))
    gaps = np.mean([y[0.28, k] - y[0.05, k] for k in (1, 7, 10)], axis=0)
    expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert interval(entry) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert entry.n == 4 and len(entry.trials) == 24


def test_a_ratio_is_a_geometric_mean_with_the_interval_of_logarithms() -> None:
    left, right = np.array([110.0, 120.0, 128.0, 119.0]), np.array([55.0, 61.0, 62.0, 60.0])
    proof = two(left.tolist(), right.tolist(), metric="tokens_per_second")
    entry = decide("ratio", proof, metric="tokens_per_second", value=2.0, tolerance=0.1)
    expected = stats.ttest_1samp(np.log(left / right), 0).confidence_interval(0.95)
    assert interval(entry) == pytest.approx((np.exp(expected.low), np.exp(expected.high)), rel=1e-9)
    assert entry.observed == pytest.approx(stats.gmean(left / right)) and entry.verdict == "reproduced"
    assert decide("ratio", proof, metric="tokens_per_second", value=3.0, tolerance=0.1).verdict == "refuted"
    assert decide("ratio", proof, metric="tokens_per_second", value=2.0, tolerance=0.01).verdict == "undecided"


# ---- what each relation decides --------------------------------------------------------------------------------------

BETTER, SAME, WORSE = [3.9, 4.0, 4.11], [4.0, 4.09, 4.2], [4.1, 4.2, 4.29]


@pytest.mark.parametrize(
    ("relation", "left", "right", "verdict"),
    [
        ("less", BETTER, SAME, "reproduced"),
        ("less", SAME, BETTER, "refuted"),
        ("less", [4.0, 4.3, 4.1], SAME, "undecided"),
        ("greater", BETTER, SAME, "refuted"),
        ("greater", WORSE, SAME, "reproduced"),
        ("best", BETTER, SAME, "reproduced"),
        ("best", WORSE, SAME, "refuted"),
        ("best", [4.0, 4.3, 4.1], SAME, "undecided"),
    ],
)
def test_an_interval_on_one_side_of_zero_decides(
    relation: str, left: list[Cell], right: list[Cell], verdict: str
) -> None:
    assert decide(relation, two(left, right)).verdict == verdict


def test_an_effect_that_may_be_below_min_effect_decides_nothing() -> None:
    proof = two([4.000, 4.098, 4.199], [4.002, 4.103, 4.201])
    small = decide("less", replace(proof, min_effect=0.005))
    low, high = interval(small)
    assert low < -0.005 < 0 < high and small.verdict == "undecided"
    proof = two([4.000, 4.1005, 4.1985], [4.002, 4.104, 4.201])
    small = decide("less", replace(proof, min_effect=0.004))
    low, high = interval(small)
    assert low < -0.004 < high < 0
    assert small.verdict == "undecided" and "less than min_effect 0.004" in small.why


def test_an_effect_that_is_surely_below_min_effect_refutes() -> None:
    proof = two([4.000, 4.101, 4.199], [4.002, 4.103, 4.201])
    assert decide("less", proof).verdict == "reproduced"
    small = decide("less", replace(proof, min_effect=0.005))
    assert small.verdict == "refuted" and "it is less than min_effect 0.005" in small.why
    assert decide("greater", replace(proof, min_effect=0.005)).verdict == "refuted"
    assert decide("best", replace(proof, min_effect=0.005)).verdict == "undecided"
    other = replace(proof, min_effect=0.005, metric="val_bpb")  # in other units
    assert decide("less", other).verdict == "reproduced"


@pytest.mark.parametrize(("tolerance", "verdict"), [(0.2, "reproduced"), (0.1, "undecided"), (0.01, "refuted")])
def test_equal_requires_the_interval_within_the_tolerance(tolerance: float, verdict: str) -> None:
    entry = decide("equal", two([4.10, 4.21, 4.29], [4.0, 4.1, 4.2]), tolerance=tolerance)
    assert entry.verdict == verdict


def row(*values: Sequence[Cell], **rules: Any) -> Evidence:
    """A phase of arms along alpha."""
    return evidence({"p": {f"a{i}": ({"alpha": 0.1 * i}, cells) for i, cells in enumerate(values)}}, **rules)


def along(proof: Evidence, direction: str = "decreasing", **fields: Any) -> dict[str, Any]:
    return decide("monotone", proof, setting="alpha", direction=direction, **fields)


def test_monotone_needs_every_step_and_is_refuted_by_a_wrong_one() -> None:
    steps = [[4.0, 4.11, 4.2], [3.8, 3.9, 4.01], [3.6, 3.71, 3.8]]
    assert along(row(*steps)).verdict == "reproduced"
    assert along(row(*steps), "increasing").verdict == "refuted"
    assert along(row(*reversed(steps)), "increasing").verdict == "reproduced"
    flat = along(row(steps[0], steps[1], [3.8, 3.92, 4.0]))
    assert flat.verdict == "undecided" and "1 of 2 steps" in flat.why
    hill = along(row(steps[1], steps[0], steps[2]))
    assert hill.verdict == "refuted" and "other way from 0 to 0.1" in hill.why
    assert along(row(*steps, min_effect=0.5)).verdict == "undecided"


def test_values_are_ordered_by_number_not_as_in_the_file() -> None:
    cells = {0.28: [3.6, 3.71, 3.8], 0.05: [4.0, 4.11, 4.2], 0.15: [3.8, 3.9, 4.01]}
    arms = {f"alpha={a}": ({"alpha": a}, values) for a, values in cells.items()}
    entry = along(evidence({"p": arms}))
    assert entry.verdict == "reproduced" and entry.observed == pytest.approx(-0.4)


def test_monotone_averages_rows_that_differ_in_another_setting() -> None:
    rng = np.random.default_rng(4)
    arms = {
        f"{a} {k}": ({"alpha": a, "project_every": k}, (4 - a + 0.1 * k + rng.normal(0, 1e-3, 3)).tolist())
        for a in (0.1, 0.2, 0.3)
        for k in (1, 7)
    }
    entry = along(evidence({"p": arms}))
    assert entry.verdict == "reproduced" and len(entry.trials) == 18
    assert entry.observed == pytest.approx(-0.2, abs=0.01)
    assert len(along(evidence({"p": arms}), left={"project_every": 7}).trials) == 9


def test_the_best_beats_all_others() -> None:
    arms = {"right": (RIGHT, SAME), "left": (LEFT, BETTER), "other": ({"alpha": 0.3}, [3.9, 4.0, 4.12])}
    entry = decide("best", evidence({"p": arms}))
    assert entry.verdict == "undecided" and "not beaten: other (undecided" in entry.why
    assert len(entry.trials) == 9
    arms["other"] = ({"alpha": 0.3}, WORSE)
    assert decide("best", evidence({"p": arms})).verdict == "reproduced"
    assert decide("best", evidence({"p": arms}, goal="maximize")).verdict == "refuted"


def test_best_is_judged_in_phases_where_one_of_several_arms_is_selected() -> None:
    good = {"right": (RIGHT, SAME), "left": (LEFT, BETTER)}
    bad = {"right": (RIGHT, BETTER), "left": (LEFT, SAME)}
    only = {"x": (LEFT | {"lr": 1}, BETTER), "y": (LEFT | {"lr": 2}, SAME)}
    assert decide("best", evidence({"p": good, "q": only})).verdict == "reproduced"
    assert decide("best", evidence({"p": good, "q": bad})).verdict == "refuted"
    assert decide("best", evidence({"p": good, "q": bad}), phase="p").verdict == "reproduced"
    assert decide("best", evidence({"q": only})).verdict == "no data"
    several = decide("best", evidence({"p": good | {"z": (LEFT | {"lr": 1}, WORSE)}}))
    assert several.verdict == "undecided" and "2 arms of phase p are alpha=0.28" in several.why


@pytest.mark.parametrize("selected", ["seed", "add_normalize"])
@pytest.mark.parametrize("trained", ["seed", "add_normalize"])
def test_a_rule_is_selected_under_its_old_and_its_new_name(selected: str, trained: str) -> None:
    arms = {"lerp": ({"model.residual": "lerp"}, SAME), "other": ({"model.residual": trained}, BETTER)}
    sides = {"left": {"model.residual": selected}, "right": {"model.residual": "lerp"}}
    assert decide("less", evidence({"p": arms}), **sides).verdict == "reproduced"


def test_arithmetic_needs_no_trial() -> None:
    proof = evidence({})
    fields = {"value": 18e9, "tolerance": 1e9, "expression": "110e3 * 20 * 60"}
    entry = decide("arithmetic", proof, **fields)
    assert (entry.verdict, entry.observed, entry.n, entry.trials) == ("refuted", 132e6, 0, ())
    assert decide("arithmetic", proof, **fields | {"value": 132e6, "tolerance": 0.0}).verdict == "reproduced"
    assert decide("arithmetic", proof, **fields | {"value": 131e6, "tolerance": 1e6}).verdict == "reproduced"


@pytest.mark.parametrize(
    ("relation", "value", "verdict"),
    [
        ("below", 4.3, "reproduced"),
        ("below", 3.7, "refuted"),
        ("below", 4.05, "undecided"),
        ("above", 3.7, "reproduced"),
        ("above", 4.3, "refuted"),
    ],
)
def test_an_arm_is_compared_with_a_number_by_the_t_interval_of_its_mean(
    relation: str, value: float, verdict: str
) -> None:
    values = [3.9, 4.0, 4.11, 4.02]
    entry = decide(relation, two(values, SAME), right=None, value=value)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(entry) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert entry.verdict == verdict and entry.observed == pytest.approx(np.mean(values)) and entry.n == 4
    assert ("which contains 4.05" in entry.why) == (verdict == "undecided")


def test_values_that_do_not_scatter_are_decided_by_two_seeds() -> None:
    proof = two([0.0, 0.0], [0.0, 0.0], metric="r_replaced")
    assert decide("below", proof, metric="r_replaced", right=None, value=0.5).verdict == "reproduced"
    assert decide("above", proof, metric="r_replaced", right=None, value=0.5).verdict == "refuted"


def joined(interaction: float, *, goal: str = "minimize") -> ClaimResult:
    """Two changes with gains of 0.1 and 0.2, joined: 0.3 plus `interaction`. Seeds act on all arms."""
    sign = -1 if goal == "minimize" else 1
    noise, level = np.random.default_rng(5).normal(0, 0.002, (4, 4)), np.array([4.0, 4.3, 3.8, 4.1])
    gains = {"baseline": 0.0, "a": 0.1, "b": 0.2, "both": 0.3 + interaction}
    rows = {name: (level + sign * gain + noise[i]).tolist() for i, (name, gain) in enumerate(gains.items())}
    proof = evidence({"p": {name: ({"x": name}, row) for name, row in rows.items()}}, min_effect=0.005, goal=goal)
    sides = {"left": {"arm": "both"}, "right": {"arm": "baseline"}, "parts": ({"arm": "a"}, {"arm": "b"})}
    entry = decide("synergy", proof, **sides)
    y = {name: np.array(row) for name, row in rows.items()}
    expected = stats.ttest_1samp(sign * (y["both"] - y["a"] - y["b"] + y["baseline"]), 0).confidence_interval(0.95)
    assert interval(entry) == pytest.approx((expected.low, expected.high), rel=1e-6)
    return entry


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_synergy_is_the_gain_beyond_the_sum_of_the_single_gains(goal: str) -> None:
    assert joined(0.05, goal=goal).verdict == "reproduced"
    assert joined(-0.05, goal=goal).verdict == "refuted"
    assert joined(0.0, goal=goal).verdict in ("refuted", "undecided")
    assert "gain of the arm both minus the sum of the gains of the arm a and the arm b" in joined(0.0).why


def test_synergy_needs_all_its_arms_in_one_phase() -> None:
    arms = {name: ({"x": name}, SAME) for name in ("baseline", "a", "b", "both")}
    sides = {"left": {"arm": "both"}, "right": {"arm": "a"}, "parts": ({"arm": "b"}, {"arm": "c"})}
    entry = decide("synergy", evidence({"p": arms}), **sides)
    assert (entry.verdict, entry.why) == ("no data", "no arm so far is the arm c")
    apart = {"p": arms, "q": {"c": ({"x": "c"}, SAME)}}
    assert "no phase so far has all of" in decide("synergy", evidence(apart), **sides).why


# ---- what is not judged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["less", "greater", "equal", "best", "ratio", "below", "above"])
def test_one_seed_decides_nothing(relation: str) -> None:
    entry = decide(relation, two([1.0], [2.0]), tolerance=9.0, value=1.0)
    assert entry.verdict == "undecided" and "n=1" in entry.why and entry.n == 1
    assert entry.ci_low is None and entry.ci_high is None


def test_surviving_seeds_alone_decide_nothing() -> None:
    for status in ("diverged", "failed", "stopped", "missing"):
        entry = decide("less", two([*BETTER, status], [*SAME, 4.0]))
        assert entry.verdict == "undecided" and f"1 of 8 trials has not finished (1 {status})" in entry.why
        assert decide("best", two([*BETTER, status], [*SAME, 4.0])).verdict == "undecided"
        assert along(row([4.0, 4.1], [3.0, status])).verdict == "undecided"


def test_no_finished_trial_or_no_metric_is_no_data() -> None:
    assert decide("less", two(["missing"] * 3, ["missing"] * 3)).verdict == "no data"
    assert decide("less", two(BETTER, SAME, metric="val_bpb")).verdict == "no data"
    assert decide("best", two(BETTER, SAME, metric="val_bpb")).verdict == "no data"
    assert decide("less", two(BETTER, SAME), left={"alpha": 0.5}).why == "no arm so far is alpha=0.5"
    assert decide("ratio", two([-1.0, 2.0], [1.0, 1.0]), value=1.0, tolerance=1.0).verdict == "no data"
    assert along(two(BETTER, SAME), left={"alpha": 0.28}).verdict == "no data"


def test_a_side_whose_seeds_all_diverged_loses() -> None:
    gone = ["diverged"] * 3
    assert decide("less", two(BETTER, gone)).verdict == "reproduced"
    entry = decide("less", two(gone, BETTER))
    assert entry.verdict == "refuted" and entry.observed is None and "alpha=0.28 diverged" in entry.why
    assert decide("greater", two(gone, BETTER)).verdict == "reproduced"
    assert decide("equal", two(gone, BETTER), tolerance=1.0).verdict == "refuted"
    for sides in ((gone, BETTER), (BETTER, gone)):
        entry = decide("ratio", two(*sides), value=1.0, tolerance=0.5)
        assert entry.verdict == "refuted" and "diverged with every seed" in entry.why
    assert decide("best", two(gone, BETTER)).verdict == "refuted"
    assert decide("best", two(BETTER, gone)).verdict == "reproduced"
    assert decide("less", two(BETTER[:2], gone[:2])).verdict == "undecided"  # chance does that in 1 of 16
    assert decide("less", two(gone, gone)).verdict == "undecided"
    fast = two([1.0] * 3, gone, metric="tokens_per_second")
    assert decide("less", fast, metric="tokens_per_second").verdict == "undecided"


# ---- which arms ------------------------------------------------------------------------------------------------------


def test_arms_that_are_equal_in_everything_else_are_compared() -> None:
    arms = {
        "base": ({"alpha": 0.05, "lr": 1}, SAME),
        "left": ({"alpha": 0.28, "lr": 1}, BETTER),
        "other": ({"alpha": 0.05, "lr": 2}, [3.5, 3.6, 3.71]),
    }
    entry = decide("less", evidence({"p": arms}))
    assert entry.verdict == "reproduced" and len(entry.trials) == 6


def test_arms_that_differ_in_more_are_compared_with_a_remark() -> None:
    arms = {"base": (RIGHT | {"lr": 1}, SAME), "left": (LEFT | {"lr": 2}, BETTER)}
    entry = decide("less", evidence({"p": arms}))
    assert entry.verdict == "reproduced" and "which also differ in lr" in entry.why
    named = decide("less", evidence({"p": arms}), left={"arm": "left"}, right={"arm": "baseline"})
    assert named.verdict == "reproduced" and "also differ" not in named.why


def test_all_phases_with_both_sides_count_but_shared_trials_count_once() -> None:
    arms = {"right": (RIGHT, SAME), "left": (LEFT, BETTER)}
    one = decide("less", evidence({"p": arms}, shared=True))
    again = decide("less", evidence({"p": arms, "q": arms, "r": {"x": (LEFT, SAME)}}, shared=True))
    assert replace(again, why="") == replace(one, why="")
    both = decide("less", evidence({"p": arms, "q": {"right": (RIGHT, BETTER), "left": (LEFT, SAME)}}))
    assert both.observed == pytest.approx(0.0, abs=1e-12) and len(both.trials) == 12
    assert decide("less", evidence({"p": arms, "q": arms}), phase="q").trials[0].startswith("q")


def test_one_and_true_are_different_settings() -> None:
    arms = {"right": ({"tied": False, "alpha": 1}, SAME), "left": ({"tied": True, "alpha": 1}, BETTER)}
    assert decide("less", evidence({"p": arms}), left={"tied": True}, right={"tied": False}).n == 3
    assert decide("less", evidence({"p": arms}), left={"tied": 1}, right={"tied": 0}).verdict == "no data"
    assert decide("less", evidence({"p": arms}), left={"tied": True, "alpha": 1.0}, right={"tied": False}).n == 3


values = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=3, max_size=3)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(values, values, values)
def test_swapping_the_sides_or_the_relation_swaps_the_verdict(a: Any, b: Any, c: Any) -> None:
    opposite = {"reproduced": "refuted", "refuted": "reproduced", "undecided": "undecided"}
    arms = {"right": (RIGHT, b), "left": (LEFT, a), "other": ({"alpha": 0.3}, c)}
    proof, reordered = evidence({"p": arms}), evidence({"p": dict(reversed(arms.items()))})
    entry = decide("less", proof)
    assert decide("less", reordered) == entry
    assert decide("greater", proof).verdict == opposite[entry.verdict]
    swapped = decide("less", proof, left=RIGHT, right=LEFT)
    assert swapped.verdict == opposite[entry.verdict]
    assert swapped.observed == pytest.approx(-entry.observed, abs=1e-9)


# ---- how often it is wrong -------------------------------------------------------------------------------------------

SIMULATED = 600  # simulated for each rate


def simulate(relation: str, means: Sequence[float], n: int, *, seeds: int = 3, **fields: Any) -> dict[str, int]:
    """Counts the verdicts of `n` claims about arms with these true means along alpha; seeds shift all arms alike."""
    rng = np.random.default_rng(len(means) * 7 + n)
    ended: dict[str, int] = dict.fromkeys(("reproduced", "refuted", "undecided"), 0)
    for _ in range(n):
        y = rng.normal(0, 0.01, (len(means), seeds)) + rng.normal(0, 0.1, seeds) + np.array(means)[:, None]
        ended[decide(relation, row(*y.tolist()), **fields).verdict] += 1
    return ended


SIDES: dict[str, Any] = {"left": {"alpha": 0.1}, "right": {"alpha": 0.0}}


@pytest.mark.slow
@pytest.mark.parametrize("others", [0, 2])
def test_less_without_a_difference_is_reproduced_in_at_most_one_of_forty(others: int) -> None:
    ended = simulate("less", [4.0, 4.0, 3.9, 4.3][: 2 + others], SIMULATED, **SIDES)
    for wrong in ("reproduced", "refuted"):
        assert at_most(ended[wrong], SIMULATED, 0.025), ended
    assert ended["undecided"] > 0.92 * SIMULATED


@pytest.mark.slow
def test_equal_at_the_edge_of_its_tolerance_is_reproduced_in_at_most_one_of_forty() -> None:
    ended = simulate("equal", [4.0, 4.03], SIMULATED, tolerance=0.03, **SIDES)
    assert at_most(ended["reproduced"], SIMULATED, 0.025) and at_most(ended["refuted"], SIMULATED, 0.025), ended


@pytest.mark.slow
def test_monotone_with_a_flat_step_is_reproduced_in_at_most_one_of_forty() -> None:
    ended = simulate("monotone", [4.1, 4.0, 4.0], SIMULATED, setting="alpha", direction="decreasing")
    assert at_most(ended["reproduced"], SIMULATED, 0.025) and at_most(ended["refuted"], SIMULATED, 0.025), ended


@pytest.mark.slow
def test_one_of_two_equally_good_arms_is_rarely_the_best() -> None:
    ended = simulate("best", [4.0, 4.0, 4.2], SIMULATED, left={"alpha": 0.0})
    assert at_most(ended["reproduced"], SIMULATED, 0.025) and at_most(ended["refuted"], SIMULATED, 0.025), ended


@pytest.mark.slow
def test_a_seed_effect_that_repeats_does_not_make_a_claim_more_certain() -> None:
    """Each seed has the same difference in every context, so averaging over contexts adds no information."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(SIMULATED):
        own = rng.normal(0, 0.1, 3)
        arms = {
            f"{a} {k}": ({"alpha": a, "k": k}, (4 + own * (a == 0.28) + rng.normal(0, 0.001, 3)).tolist())
            for a in (0.28, 0.05)
            for k in (1, 2)
        }
        wrong += decide("less", evidence({"p": arms})).verdict == "reproduced"
    assert at_most(wrong, SIMULATED, 0.025), wrong


@pytest.mark.parametrize(
    ("relation", "means", "fields"),
    [
        ("less", [4.1, 4.0, 4.0], SIDES),
        ("greater", [4.0, 4.1, 4.0], SIDES),
        ("equal", [4.0, 4.0, 4.2], SIDES | {"tolerance": 0.1}),
        ("best", [4.0, 4.1, 4.2], {"left": {"alpha": 0.0}}),
        ("monotone", [4.2, 4.1, 4.0], {"setting": "alpha", "direction": "decreasing"}),
    ],
)
def test_an_effect_of_ten_times_the_noise_is_reproduced(
    relation: str, means: list[float], fields: dict[str, Any]
) -> None:
    assert simulate(relation, means, 100, **fields)["reproduced"] >= 98


# ---- in a campaign ---------------------------------------------------------------------------------------------------

CLAIMS = """
  - name: alpha
    vary: {alpha: [0.05, 0.2, 0.4]}
  - name: projection
    inherit: alpha
    grid: {project_every: [1, 3]}
claims:
  - {id: longer, source: "002", says: "0.4 beats 0.05", left: {alpha: 0.4}, right: {alpha: 0.05}, relation: less}
  - {id: shorter, source: "002", says: "0.05 beats 0.4", left: {alpha: 0.05}, right: {alpha: 0.4}, relation: less}
  - {id: best, says: "[red]0.2[/] is | best", left: {alpha: 0.2}, relation: best, phase: alpha}
  - {id: falls, relation: monotone, setting: alpha, direction: decreasing}
  - {id: speed, relation: equal, metric: tokens_per_second, tolerance: 1, left: {alpha: 0.4}, right: {alpha: 0.2}}
  - {id: tokens, source: "003", says: "18B tokens", relation: arithmetic, value: 18e9, tolerance: 1e9,
     expression: 110e3 * 20 * 60}
  - {id: kept, relation: less, left: {alpha: 0.2, project_every: 3}, right: {alpha: 0.2, project_every: 1}}
"""
EXPECTED = {
    "longer": "reproduced",
    "shorter": "refuted",
    "best": "refuted",
    "falls": "reproduced",
    "speed": "reproduced",
    "tokens": "refuted",
    "kept": "no data",  # 0.4 has won, so that no phase has these arms
}


def run(
    folder: Path, corpus: Path, result_of: Any = pretend, *, seeds: str = "[1, 2, 3]", most: int | None = None
) -> CampaignSummary:
    file = write_file(folder, corpus, phases=CLAIMS, seeds=seeds)
    with session_on(file, folder / "tiny") as session:
        drive(begun(session), result_of, most=most)
        return session.end()


def test_a_campaign_ends_with_its_claims_ledger(tmp_path: Path, corpus: Path) -> None:
    summary = run(tmp_path, corpus)
    assert {entry.id: entry.verdict for entry in summary.claims} == EXPECTED
    written = strict((tmp_path / "tiny" / "summary.json").read_text())
    assert written["claims"] == to_json(summary.claims)
    fields = ["id", "source", "says", "relation", "metric", "verdict", "observed", "ci_low", "ci_high", "n", "trials"]
    assert all(sorted(entry) == sorted([*fields, "why", "scale"]) for entry in written["claims"])
    done = {e["trial_id"] for e in read_journal(tmp_path / "tiny" / "journal.jsonl") if e["event"] == "trial_finished"}
    rests = {entry["id"]: entry["trials"] for entry in written["claims"]}
    assert all(set(trials) <= done for trials in rests.values()) and len(rests["longer"]) == 6
    assert len(rests["best"]) == 9 and rests["tokens"] == []
    decided = next(entry for entry in summary.claims if entry.id == "longer")
    assert decided.verdict_at_scale == f"{decided.verdict} at 1.00k parameters, 6 steps"
    assert next(entry for entry in summary.claims if entry.id == "tokens").scale is None
    assert rebuild(tmp_path / "tiny").claims == summary.claims


def test_an_interrupted_campaign_leaves_its_claims_undecided(tmp_path: Path, corpus: Path) -> None:
    verdicts = {entry.id: entry.verdict for entry in run(tmp_path, corpus, most=7).claims}
    assert verdicts == EXPECTED | dict.fromkeys(("longer", "shorter", "best", "falls", "speed"), "undecided")
    assert {entry.id: entry.verdict for entry in run(tmp_path, corpus).claims} == EXPECTED


def test_a_diverged_arm_loses_its_claims_in_a_campaign(tmp_path: Path, corpus: Path) -> None:
    def result_of(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status="diverged" if spec.config.model.alpha == 0.4 else "finished")

    verdicts = {entry.id: entry.verdict for entry in run(tmp_path, corpus, result_of).claims}
    changed = {"longer": "refuted", "shorter": "reproduced", "best": "reproduced", "kept": "refuted"}
    assert verdicts == EXPECTED | changed | {"falls": "undecided", "speed": "undecided"}


def test_the_reports_and_the_final_screen_show_the_ledger(tmp_path: Path, corpus: Path) -> None:
    summary = run(tmp_path, corpus)
    ledger = claims_markdown(summary)
    assert ledger in render_markdown(summary) and ledger in (tmp_path / "tiny" / "report.md").read_text()
    rows = [line for line in ledger.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(EXPECTED)
    for entry, line in zip(summary.claims, rows[2:], strict=True):
        assert f"| {entry.verdict_at_scale} |" in line
        assert not entry.trials or f"- {entry.id}: {', '.join(entry.trials)}" in ledger
    assert "\\[red\\]0.2\\[/\\] is \\| best" in ledger and "not corrected for their number" in ledger.replace("\n", " ")
    page = render_html(summary, [])
    assert page.count('<section id="claims">') == 1
    assert all(f">{verdict}</span>" in page for verdict in EXPECTED.values())
    assert '<section id="claims">' not in render_html(replace(summary, claims=()), [])


@pytest.mark.parametrize("width", [40, 60, 80, 132])
def test_a_claim_is_one_line_of_the_final_screen(tmp_path: Path, corpus: Path, width: int) -> None:
    summary = run(tmp_path, corpus)
    screen = Console(file=io.StringIO(), width=width)
    screen.print(final_screen(summary, report=Path("report.html")))
    lines = screen.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, lines)) <= width
    start = next(i for i, line in enumerate(lines) if line.startswith("claims "))
    end = next(i for i, line in enumerate(lines) if line.startswith("╭"))
    named = [line.split()[0] for line in lines[start:end] if line.split() and line.split()[0] in EXPECTED]
    assert named == list(EXPECTED)
    if width >= 60:
        assert all(f" {verdict}" in "\n".join(lines[start:end]) for verdict in set(EXPECTED.values()))
    if width == 132:
        assert "[red]0.2[/] is | best" in "\n".join(lines[start:end])


def test_the_entries_of_every_relation_are_strict_json() -> None:
    fields = {"value": 1.0, "tolerance": 1.0, "expression": "1 + 1", "setting": "alpha", "direction": "decreasing"}
    for relation in RELATIONS:
        for proof in (evidence({}), two(BETTER, SAME), two(["diverged"] * 3, SAME), two([1.0], ["failed"])):
            claim = Claim("x", relation, left=LEFT, right=RIGHT, parts=(LEFT, RIGHT), **fields)
            entry = judge_claims([claim], proof)[0]
            json.dumps(to_json(entry), allow_nan=False)
            assert entry.verdict in ("reproduced", "refuted", "undecided", "no data") and entry.why


def test_every_metric_that_a_claim_may_name_is_recorded(tmp_path: Path, corpus: Path) -> None:
    """Each record has these by contract; drift and divisors exist only if the model has them."""
    metrics = pretend(begun_spec(tmp_path, corpus)).metrics
    assert set(BUILT_IN_GOALS) - set(metrics) == {*DIAGNOSTICS, "flops"}


def begun_spec(folder: Path, corpus: Path) -> TrialSpec:
    with session_on(write_file(folder, corpus), folder / "tiny") as session:
        spec = next_trial(begun(session))
        assert spec is not None
        return spec


UNJUDGEABLE = {
    "an unknown relation": (Claim("a", "better-than"), "does not know the relation 'better-than'"),
    "an unknown metric": (Claim("a", "best", left={"alpha": 1}, metric="speed"), "does not know its metric"),
    "an unknown direction": (
        Claim("a", "monotone", setting="x", direction="up"),
        "does not know its metric or direction",
    ),
    "no sides": (Claim("a", "less"), "the claim lacks left and right"),
    "no expression": (Claim("a", "arithmetic", value=1.0, tolerance=0.0, expression="__import__('os')"), "is not an"),
}


@pytest.mark.parametrize("kind", UNJUDGEABLE)
def test_a_claim_of_another_version_or_of_somebody_else_has_no_data(kind: str) -> None:
    claim, why = UNJUDGEABLE[kind]
    (result,) = judge_claims([claim], evidence({"alpha": {"baseline": ({}, [5.0, 5.1])}}))
    assert result.verdict == "no data" and why in result.why


def test_a_ratio_beyond_all_numbers_is_judged_without_an_overflow() -> None:
    claim = Claim("a", "ratio", left=LEFT, right=RIGHT, value=1.0, tolerance=0.5)
    row = {"left": (LEFT, [1e60, 1e50]), "right": (RIGHT, [1e-60, 1e-30])}
    (result,) = judge_claims([claim], evidence({"alpha": {"baseline": ({}, [1.0, 1.0]), **row}}))
    assert result.verdict in ("refuted", "undecided")
