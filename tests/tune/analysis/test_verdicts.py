"""Verdicts against scipy's classical tests, examples computed by hand and closed testing."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tune.analysis.power import Design, smallest_detectable
from tune.analysis.verdicts import Judgement, holm, judge
from tune.storage.records import TrialOutcome
from tune.storage.summaries import ArmSummary, Delta

Outcomes = dict[str, dict[int, TrialOutcome]]


def phase(**arms: Sequence[float] | Mapping[int, float]) -> Outcomes:
    """Finished cells: values by seed, or in the order of seeds 1, 2, 3, ..."""
    rows = {arm: v if isinstance(v, Mapping) else dict(enumerate(v, 1)) for arm, v in arms.items()}
    return {arm: {seed: TrialOutcome("finished", x) for seed, x in row.items()} for arm, row in rows.items()}


def simulated(
    rng: np.random.Generator,
    n_arms: int,
    n_seeds: int,
    correlation: float,
    *,
    effect: float = 0.0,
    baseline_seeds: int | None = None,
) -> Outcomes:
    """Arms of one phase with sd 1 over seeds; `effect` is the true difference of arm1 to the baseline."""
    width = baseline_seeds or n_seeds
    shared, own = rng.standard_normal((1, width)), rng.standard_normal((n_arms, width))
    y = 6 + math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    y[1] += effect
    rows = {"base" if i == 0 else f"arm{i}": row if i == 0 else row[:n_seeds] for i, row in enumerate(y.tolist())}
    return phase(**rows)


def find(judgement: Judgement, arm: str) -> ArmSummary:
    return next(row for row in judgement.arms if row.arm == arm)


def delta_of(judgement: Judgement, arm: str) -> Delta:
    delta = find(judgement, arm).delta
    assert delta is not None
    return delta


def verdicts(judgement: Judgement) -> dict[str, str]:
    return {row.arm: row.verdict for row in judgement.arms}


def assert_close(delta: Delta, mean: float, low: float, high: float, p: float) -> None:
    found = [delta.mean, delta.ci_low, delta.ci_high, delta.p]
    np.testing.assert_allclose(np.array(found, dtype=float), [mean, low, high, p], rtol=1e-9)


# --- references -------------------------------------------------------------------------------------------------


def test_two_complete_arms_give_the_paired_t_test_of_scipy() -> None:
    a, b = [6.1, 6.4, 6.2, 6.6], [5.9, 6.3, 6.1, 6.2]
    judgement = judge(phase(base=a, arm=b), baseline="base")
    reference = stats.ttest_rel(b, a)
    interval = reference.confidence_interval(0.95)
    assert (judgement.noise.method, judgement.noise.df) == ("paired", 3)
    mean = float(np.mean(b) - np.mean(a))
    assert_close(delta_of(judgement, "arm"), mean, interval.low, interval.high, np.asarray(reference)[1])


def test_arms_without_common_seeds_are_compared_unpaired_with_a_warning() -> None:
    a, b = {1: 6.1, 2: 6.4, 3: 6.2}, {4: 5.9, 5: 6.3, 6: 6.1}
    judgement = judge(phase(base=a, arm=b), baseline="base")
    assert judgement.noise.method == "unpaired" and judgement.noise.correlation is None
    samples = list(b.values()), list(a.values())
    expected = max(stats.ttest_ind(*samples, equal_var=equal)[1] for equal in (True, False))
    assert delta_of(judgement, "arm").p == pytest.approx(expected)
    assert any("too few seeds" in text for text in judgement.warnings)


def test_the_correlation_is_the_intraclass_correlation_of_shrout_and_fleiss() -> None:
    y = np.random.default_rng(5).normal(6, 1, (4, 3)) + np.array([0.0, 1.5, 3.0])
    a, n = y.shape
    seed_effects = y.mean(0) - y.mean()
    residuals = y - y.mean(1, keepdims=True) - seed_effects
    ms_seed, ms_noise = a * (seed_effects**2).sum() / (n - 1), (residuals**2).sum() / ((a - 1) * (n - 1))
    judgement = judge(phase(**{f"arm{i}": row for i, row in enumerate(y.tolist())}), baseline="arm0")
    assert judgement.noise.correlation == pytest.approx((ms_seed - ms_noise) / (ms_seed + (a - 1) * ms_noise))
    assert judgement.noise.sd == pytest.approx(math.sqrt(ms_noise))


def test_holm_agrees_with_an_example_computed_by_hand() -> None:
    # sorted .005 .01 .03 .04 -> 4 x .005, 3 x .01, 2 x .03, 1 x .04 raised to its predecessor
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# --- simulation -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("n_arms", "n_seeds", "correlation"), [(12, 3, 0.99), (5, 4, 0.95), (2, 3, 0.8), (12, 3, 0.0)])
def test_the_interval_of_a_mean_covers_it_even_if_seeds_move_all_arms_alike(
    n_arms: int, n_seeds: int, correlation: float
) -> None:
    rng = np.random.default_rng(7)
    covered = []
    for _ in range(300):
        base = find(judge(simulated(rng, n_arms, n_seeds, correlation), baseline="base"), "base").score
        assert base.ci_low is not None and base.ci_high is not None
        covered.append(base.ci_low <= 6 <= base.ci_high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_a_warning_names_an_arm_that_scatters_far_more_than_the_others() -> None:
    rng = np.random.default_rng(14)
    cells = simulated(rng, 8, 3, 0.5)
    assert not judge(cells, baseline="base").warnings
    cells |= phase(arm3=[2.0, 12.0, 5.0])
    (warning,) = judge(cells, baseline="base").warnings
    assert warning.startswith("arm3 scatters ") and "the others are judged without it" in warning


def test_the_company_of_a_noisy_arm_does_not_change_a_verdict() -> None:
    pair = phase(base=[5.00, 5.03, 4.98], arm=[4.90, 4.932, 4.885])
    alone = judge(pair, baseline="base")
    beside = judge(pair | phase(company=[5.4, 5.9, 5.3]), baseline="base")
    assert find(alone, "arm").verdict == find(beside, "arm").verdict == "better"
    assert delta_of(beside, "arm").p == pytest.approx(delta_of(alone, "arm").p)
    assert find(beside, "company").verdict == "undecided"


def test_an_arm_is_equivalent_only_if_its_interval_lies_inside_min_effect() -> None:
    rng = np.random.default_rng(1)
    seeds = rng.normal(6, 0.1, 8)
    rows = {"base": seeds, "near": seeds + rng.normal(0, 1e-4, 8), "wide": seeds + rng.normal(0, 0.05, 8)}
    for min_effect, expected in ((0.005, "equivalent"), (1e-6, "undecided")):
        judgement = judge(
            phase(base=rows["base"].tolist(), near=rows["near"].tolist()), baseline="base", min_effect=min_effect
        )
        assert find(judgement, "near").verdict == expected
    wide = find(judge(phase(base=rows["base"].tolist(), wide=rows["wide"].tolist()), baseline="base"), "wide")
    assert wide.verdict == "undecided" and (wide.seeds_to_decide or math.inf) > 8


def test_the_sentence_says_how_many_seeds_would_decide_the_best_arm() -> None:
    judgement = judge(phase(base=[6.0, 6.1, 6.2], arm=[5.9, 6.08, 6.09]), baseline="base")
    needed = find(judgement, "arm").seeds_to_decide
    assert find(judgement, "arm").verdict == "undecided" and needed and needed > 3
    assert judgement.why.endswith(f"about {needed} seeds would decide it")
    hopeless = judge(phase(base=[6.0, 6.1, 6.2], arm=[5.0, 7.2, 6.1]), baseline="base", min_effect=0.0)
    assert hopeless.why.endswith("it cannot be decided with 1,000 seeds")  # no difference, and any would matter


# --- planning ---------------------------------------------------------------------------------------------------


def test_a_complete_phase_reports_the_smallest_detectable_effect_of_its_plan() -> None:
    judgement = judge(simulated(np.random.default_rng(2), 6, 4, 0.5), baseline="base")
    assert judgement.noise.sd is not None and judgement.noise.method is not None
    planned = smallest_detectable(4, Design(6, judgement.noise.sd, judgement.noise.method, min_effect=0.005))
    assert judgement.noise.smallest_detectable == pytest.approx(planned)


# --- which arms count -------------------------------------------------------------------------------------------

BASE, GOOD, SAME = [6.00, 6.10, 6.20], [5.80, 5.91, 5.99], [6.01, 6.09, 6.21]


def test_a_simple_phase_has_a_verdict_a_winner_and_a_sentence() -> None:
    judgement = judge(phase(base=BASE, good=GOOD, near=[5.82, 5.90, 6.01], same=SAME), baseline="base")
    assert verdicts(judgement) == {"good": "better", "near": "better", "base": "baseline", "same": "undecided"}
    assert (judgement.winner, judgement.noise.method, judgement.noise.df) == ("good", "paired", 6)
    assert [row.arm for row in judgement.arms if row.tied_with_winner] == ["near"]
    good = delta_of(judgement, "good")
    assert judgement.why == (
        f"good lowers val_loss by 0.200 [{-(good.ci_high or 0):.3f}, {-(good.ci_low or 0):.3f}] "
        f"(3 paired seeds, Holm p {good.p_holm:.2g}); near is not distinguishable from it"
    )


def test_without_a_better_arm_the_baseline_stays_and_the_detectable_effect_is_reported() -> None:
    judgement = judge(phase(base=BASE, same=SAME, bad=[6.5, 6.61, 6.7]), baseline="base")
    assert verdicts(judgement) == {"base": "baseline", "same": "undecided", "bad": "worse"}
    assert judgement.winner == "base"
    assert judgement.why.startswith("no arm is better than the baseline beyond the noise, so the baseline stays; same")
    assert [row.arm for row in judgement.arms if row.tied_with_winner] == ["same"]


def test_a_significant_effect_below_min_effect_is_equivalent_and_the_sentence_explains_it() -> None:
    judgement = judge(phase(base=[6.0, 6.1, 6.2], arm=[5.9979, 6.0980, 6.1981]), baseline="base")
    delta = delta_of(judgement, "arm")
    assert delta.p_holm is not None and delta.p_holm < 0.05
    assert find(judgement, "arm").verdict == "equivalent"
    assert "better than the baseline by min_effect" in judgement.why
    assert judge(phase(base=[6.0, 6.1], arm=[5.99, 6.09]), baseline="base", min_effect=0.01).winner == "arm"


def test_one_seed_per_arm_gives_no_claim_but_shows_the_difference() -> None:
    judgement = judge(phase(base=[6.0], arm=[5.0]), baseline="base")
    assert verdicts(judgement) == {"arm": "no claim", "base": "baseline"}
    assert find(judgement, "arm").delta == Delta(-1.0)
    assert find(judgement, "arm").score.sd is None
    assert judgement.why == "one seed per arm: no claim can be made, the baseline stays"
    assert (judgement.winner, judgement.noise.method, judgement.noise.sd) == ("base", None, None)


def test_an_arm_with_one_seed_gets_no_claim_while_the_others_are_judged() -> None:
    judgement = judge(phase(base=BASE, good=GOOD, single=[5.0]), baseline="base")
    assert verdicts(judgement) == {"single": "no claim", "good": "better", "base": "baseline"}
    assert judgement.winner == "good"
    assert find(judgement, "single").score.ci_low is not None  # the pooled sd gives one seed an interval


def test_a_baseline_with_one_seed_allows_no_claim() -> None:
    judgement = judge(phase(base=[6.0], good=GOOD), baseline="base")
    assert find(judgement, "good").verdict == "no claim"
    assert judgement.winner == "base" and "no claim can be made, the baseline stays" in judgement.why


def test_a_baseline_alone_reports_the_noise_floor() -> None:
    judgement = judge(phase(base=[6.0, 6.1, 6.3]), baseline="base")
    assert (judgement.noise.method, judgement.noise.df, judgement.winner) == (None, 2, "base")
    assert judgement.noise.sd == pytest.approx(np.std([6.0, 6.1, 6.3], ddof=1))
    assert judgement.why == "no arm is there to compare with the baseline"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("diverged", "diverged"), ("failed", "failed"), ("stopped", "incomplete"), ("missing", "incomplete")],
)
def test_an_arm_with_a_lost_seed_is_ranked_last_and_never_wins(
    status: Literal["diverged", "failed", "stopped", "missing"], verdict: str
) -> None:
    cells = phase(base=BASE, good=GOOD, lost=[1.0, 1.1, 1.2])
    cells["lost"][3] = TrialOutcome(status)
    judgement = judge(cells, baseline="base")
    lost = judgement.arms[-1]
    assert (lost.arm, lost.verdict, lost.n, lost.delta, lost.tied_with_winner) == ("lost", verdict, 2, None, False)
    assert lost.score.mean == pytest.approx(1.05) and lost.score.ci_low is not None
    assert judgement.winner == "good"


def test_arms_that_lost_seeds_rank_incomplete_then_failed_then_diverged_even_without_values() -> None:
    cells = phase(base=BASE, good=GOOD)
    cells |= {
        "a": {1: TrialOutcome("diverged")},
        "b": {1: TrialOutcome("failed")},
        "c": {1: TrialOutcome("missing")},
        "d": {},
    }
    judgement = judge(cells, baseline="base")
    assert [row.arm for row in judgement.arms] == ["good", "base", "c", "d", "b", "a"]
    only = judge({"base": cells["base"], "a": cells["a"], "b": cells["b"]}, baseline="base")
    assert only.why == "no other arm finished all its seeds (1 diverged, 1 failed), so the baseline stays"
    only = judge({"base": cells["base"], "c": cells["c"]}, baseline="base")
    assert only.why == "no other arm has a result of all its seeds"


def test_a_baseline_that_lost_a_seed_is_compared_by_its_other_seeds_with_a_warning() -> None:
    cells = phase(base=BASE, good=GOOD)
    cells["base"][3] = TrialOutcome("failed")
    judgement = judge(cells, baseline="base")
    assert find(judgement, "good").verdict == "better"
    assert judgement.warnings[0] == "the baseline lost seeds (failed): only the finished ones are compared"
    cells["base"][3] = TrialOutcome("missing")  # it may still be training
    assert judge(cells, baseline="base").warnings[0] == "the baseline has 2 of 3 seeds: only these are compared"
    cells["base"] = {seed: TrialOutcome("diverged") for seed in (1, 2, 3)}
    judgement = judge(cells, baseline="base")
    assert (judgement.winner, find(judgement, "good").verdict) == ("base", "no claim")


def test_a_baseline_without_its_worst_seeds_calls_no_arm_worse_or_equivalent() -> None:
    cells = phase(
        base=[6.0, 6.1, 6.2, 6.3], good=[5.8, 5.91, 5.99, 6.1], bad=[6.5, 6.61, 6.7, 6.8], same=[6.0, 6.1, 6.2, 6.3]
    )
    cells["base"][4] = TrialOutcome("diverged")
    judgement = judge(cells, baseline="base")
    assert verdicts(judgement) == {"good": "better", "base": "baseline", "bad": "undecided", "same": "undecided"}
    assert "no arm is called worse or equivalent" in judgement.warnings[0]
    cells["base"][4] = TrialOutcome("failed")  # for a reason that has nothing to do with its loss
    assert verdicts(judge(cells, baseline="base"))["bad"] == "worse"


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1e300])
def test_a_finished_seed_without_a_usable_value_counts_as_missing(value: float | None) -> None:
    cells = phase(base=BASE, arm=GOOD)
    cells["arm"][2] = TrialOutcome("finished", value)
    judgement = judge(cells, baseline="base", metric="r_mean")
    assert find(judgement, "arm").verdict == "incomplete"
    reason = "r_mean is missing, not finite or beyond 1e+100 with seeds [2]"
    assert judgement.warnings == [f"arm: {reason}, so these finished trials are not compared"]


def test_arms_that_are_equal_bit_for_bit_do_not_count_twice_in_the_noise() -> None:
    single = judge(phase(base=BASE, good=GOOD), baseline="base")
    double = judge(phase(base=BASE, copy=BASE, good=GOOD, again=GOOD), baseline="base")
    assert (double.noise.df, double.noise.sd) == (single.noise.df, single.noise.sd)
    assert delta_of(double, "good").p == delta_of(single, "good").p
    copy = delta_of(double, "copy")
    assert (copy.mean, copy.ci_low, copy.ci_high, copy.p, copy.p_holm) == (0.0, 0.0, 0.0, 1.0, 1.0)
    alone = judge(phase(base=BASE, copy=BASE), baseline="base")
    assert verdicts(alone) == {"base": "baseline", "copy": "equivalent"}
    assert alone.warnings == ["copy: every result equals that of base; what varies has no effect"]
    assert "copy: every result equals that of base; what varies has no effect" in double.warnings


def test_without_noise_a_difference_is_certain_and_equality_is_equivalence() -> None:
    cells = phase(base=[6.1, 6.1, 6.1], low=[6.0, 6.0, 6.0], same=[6.1, 6.1, 6.1])
    judgement = judge(cells, baseline="base")
    low = delta_of(judgement, "low")
    assert low.p == low.p_holm == 0.0
    assert low.ci_low == low.ci_high == pytest.approx(-0.1)
    assert verdicts(judgement) == {"low": "better", "base": "baseline", "same": "equivalent"}
    assert delta_of(judgement, "same").p == 1.0
    assert (judgement.noise.sd, judgement.noise.correlation) == (0.0, None)
    assert any("no noise between seeds" in text for text in judgement.warnings)


def test_arms_that_differ_by_a_constant_have_no_noise_left_after_pairing() -> None:
    judgement = judge(phase(base=[6.1, 6.3, 6.7], low=[6.0, 6.2, 6.6]), baseline="base")
    assert (judgement.noise.method, judgement.noise.sd, judgement.noise.correlation) == ("paired", 0.0, 1.0)
    assert delta_of(judgement, "low").p == 0.0


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="baseline 'nobody'"):
        judge(phase(base=BASE), baseline="nobody")
    with pytest.raises(ValueError, match="confidence"):
        judge(phase(base=BASE), baseline="base", confidence=95)


def test_importing_the_module_loads_neither_numpy_nor_scipy() -> None:
    code = "import sys, tune.analysis.verdicts; sys.exit(any(m in sys.modules for m in ('numpy', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- properties -------------------------------------------------------------------------------------------------

numbers = st.integers(-3000, 3000).map(lambda n: n / 1000)
statuses = st.sampled_from(["finished"] * 9 + ["diverged", "failed", "stopped", "missing"])
outcomes = st.builds(lambda status, x: TrialOutcome(status, x if status == "finished" else None), statuses, numbers)
arms = st.dictionaries(st.integers(1, 5), outcomes, max_size=5)
phases = st.builds(
    lambda base, others: {"base": base, **{f"arm{i}": arm for i, arm in enumerate(others)}},
    arms,
    st.lists(arms, max_size=7),
)
many = settings(max_examples=150, deadline=None, derandomize=True)


def mapped(cells: Outcomes, scale: float, shift: float) -> Outcomes:
    return {
        arm: {s: TrialOutcome(c.status, None if c.value is None else c.value * scale + shift) for s, c in row.items()}
        for arm, row in cells.items()
    }


@many
@given(phases)
def test_every_judgement_is_strict_json(cells: Outcomes) -> None:
    judgement = judge(cells, baseline="base")
    json.dumps(dataclasses.asdict(judgement), allow_nan=False)
    assert sorted(row.arm for row in judgement.arms) == sorted(cells)
    assert (find(judgement, judgement.winner).verdict == "better") == (judgement.winner != "base")


@pytest.mark.slow
@many
@given(phases, st.randoms(use_true_random=False))
def test_the_order_of_arms_and_seeds_does_not_matter(cells: Outcomes, shuffler: random.Random) -> None:
    shuffled = {
        arm: dict(shuffler.sample(list(cells[arm].items()), len(cells[arm])))
        for arm in shuffler.sample(list(cells), len(cells))
    }
    assert judge(shuffled, baseline="base") == judge(cells, baseline="base")


@many
@given(phases, st.integers(-1000, 1000))
def test_a_constant_added_to_all_values_changes_no_verdict(cells: Outcomes, shift: int) -> None:
    moved = judge(mapped(cells, 1.0, shift), baseline="base")
    assert verdicts(moved) == verdicts(judge(cells, baseline="base"))


@many
@given(phases)
def test_maximizing_the_negated_values_mirrors_every_verdict(cells: Outcomes) -> None:
    down = judge(cells, baseline="base")
    up = judge(mapped(cells, -1.0, 0.0), baseline="base", goal="maximize")
    assert [(row.arm, row.verdict, row.tied_with_winner) for row in up.arms] == [
        (row.arm, row.verdict, row.tied_with_winner) for row in down.arms
    ]
    assert up.winner == down.winner


@many
@given(phases, st.lists(numbers, max_size=4), st.sampled_from(["diverged", "failed"]))
def test_an_arm_that_lost_a_seed_never_wins_or_changes_the_others(
    cells: Outcomes, values: list[float], status: Literal["diverged", "failed"]
) -> None:
    lost = {seed: TrialOutcome("finished", value) for seed, value in enumerate(values, 2)} | {1: TrialOutcome(status)}
    alone, together = judge(cells, baseline="base"), judge(cells | {"lost": lost}, baseline="base")
    assert together.winner == alone.winner
    assert [row for row in together.arms if row.arm != "lost"] == alone.arms


@pytest.mark.slow
@many
@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=2, max_size=5), st.integers(1, 3))
def test_arms_that_were_stopped_early_count_in_holms_correction(rows: list[list[float]], n: int) -> None:
    """Compares with closed testing (Marcus et al. 1976) by Bonferroni, where a stopped arm has p = 1."""
    cells = phase(base=rows[0], **{f"arm{i}": row for i, row in enumerate(rows[1:])})
    stopped = {f"stopped{i}": {1: TrialOutcome("stopped"), 2: TrialOutcome("finished", 1.0)} for i in range(n)}
    alone, together = judge(cells, baseline="base"), judge(cells | stopped, baseline="base")
    raw = {arm: delta_of(alone, arm).p or 0.0 for arm in cells if arm != "base"}
    p = [*raw.values(), *[1.0] * n]
    subsets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)]
    for i, arm in enumerate(raw):
        closed = max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
        assert delta_of(together, arm).p_holm == pytest.approx(closed, abs=1e-12)
        assert delta_of(together, arm).mean == delta_of(alone, arm).mean
    assert [row.verdict for row in together.arms[-n:]] == ["incomplete"] * n
    assert together.winner in {alone.winner, "base"}
