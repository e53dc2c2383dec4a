"""Differences during training, held against SciPy's paired t test and against numbers by hand."""

import random
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from tune.analysis.readings import NoisePrior
from tune.report.differences import LIMITS, MAX_ARMS, OTHER_ARMS, OTHER_LIMITS, differences
from tune.report.trial_logs import curves_by_arm
from tune.storage.records import Look
from tune.storage.summaries import ArmSummary, Delta, PhaseSummary, TrialRecord

SEEDS = (1, 2, 3, 4)
TOKENS = (0, 1000, 2000, 3000)
Losses = dict[str, dict[int, list[float]]]  # arm -> seed -> loss at each evaluation


def losses(*arms: str, seeds: tuple[int, ...] = SEEDS, evaluations: int = len(TOKENS)) -> Losses:
    luck = random.Random(7)
    return {
        arm: {seed: [5 - n - 0.1 * i + luck.gauss(0, 0.05) for n in range(evaluations)] for seed in seeds}
        for i, arm in enumerate(arms)
    }


def rows(values: Losses, step_tokens: int = 1000) -> list[dict[str, Any]]:
    return [
        {
            "phase": "p",
            "arm": arm,
            "trial_id": f"{arm}-{seed}",
            "seed": seed,
            "step": n,
            "tokens": n * step_tokens,
            "val_loss": y,
        }
        for arm, by_seed in values.items()
        for seed, curve in by_seed.items()
        for n, y in enumerate(curve)
    ]


def phase(*arms: str, **more: Any) -> PhaseSummary:
    """A phase whose first arm is the baseline."""
    summaries = [ArmSummary(arms[0], verdict="baseline")]
    summaries += [ArmSummary(arm, verdict="undecided", delta=Delta(-0.1, -0.2, 0.0, 0.05, 0.06)) for arm in arms[1:]]
    return PhaseSummary(phase="p", arms=tuple(summaries), baseline=arms[0], min_effect=0.005, **more)


def records(values: Losses) -> list[TrialRecord]:
    return [
        TrialRecord("c", "p", arm, f"{arm}-{seed}", seed, {}, {}, "finished", {"val_loss": curve[-1]})
        for arm, by_seed in values.items()
        for seed, curve in by_seed.items()
    ]


def found(own: PhaseSummary, values: Losses, **more: Any) -> dict[str, Any]:
    result = differences(own, curves_by_arm(rows(values)), **more)
    assert result is not None
    return result


def test_the_band_of_two_arms_is_the_interval_of_the_paired_t_test() -> None:
    values = losses("base", "arm")
    result = found(phase("base", "arm"), values)
    assert result["tokens"] == list(TOKENS) and not result["thinned"]
    ((arm, means, halves),) = result["baselines"][0]["arms"]
    assert arm == 1
    for n in range(len(TOKENS)):
        one, other = ([values[name][seed][n] for seed in SEEDS] for name in ("arm", "base"))
        test = stats.ttest_rel(one, other)
        interval = test.confidence_interval(0.95)
        assert means[n] == pytest.approx((interval.low + interval.high) / 2, abs=1e-5)
        assert halves[n] == pytest.approx((interval.high - interval.low) / 2, abs=1e-5)


def test_another_baseline_turns_the_difference_round() -> None:
    values = losses("base", "arm")
    result = found(phase("base", "arm"), values, records=records(values))
    ((_, means, halves),) = result["baselines"][0]["arms"]
    ((arm, turned, same),) = result["baselines"][1]["arms"]
    assert arm == 0
    assert turned == [-mean for mean in means] and same == halves
    ((_, mean, low, high, p, _),) = result["baselines"][1]["final"]
    test = stats.ttest_rel([values["base"][s][-1] for s in SEEDS], [values["arm"][s][-1] for s in SEEDS])
    assert (low, high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (mean, p) == pytest.approx(((low + high) / 2, test.pvalue))


def test_the_table_against_the_own_baseline_is_that_of_the_phase() -> None:
    result = found(phase("base", "arm"), losses("base", "arm"))
    assert result["baselines"][0]["final"] == [[1, -0.1, -0.2, 0.0, 0.06, "undecided"]]


def test_the_noise_that_a_phase_borrows_narrows_its_bands() -> None:
    values = losses("base", "arm", seeds=(1, 2))
    result = found(phase("base", "arm"), values, prior=NoisePrior(30.0, 0.004))
    own = stats.tvar([values["arm"][seed][-1] - values["base"][seed][-1] for seed in (1, 2)])
    error = ((30 * 0.004 + own) / 31 / 2) ** 0.5  # Smyth (2004): degrees of freedom and variances of both
    assert result["baselines"][0]["arms"][0][2][-1] == pytest.approx(stats.t.ppf(0.975, 31) * error, abs=1e-5)


def test_an_arm_that_was_evaluated_at_other_tokens_has_gaps() -> None:
    values = losses("base", "arm", "odd")
    logged = rows({name: values[name] for name in ("base", "arm")}) + rows({"odd": values["odd"]}, step_tokens=1500)
    result = differences(phase("base", "arm", "odd"), curves_by_arm(logged))
    assert result is not None
    means = {arm: means for arm, means, _ in result["baselines"][0]["arms"]}
    assert result["tokens"] == list(TOKENS)
    assert [mean is None for mean in means[2]] == [False, True, True, False]
    assert None not in means[1]


def test_arms_that_lost_seeds_are_left_out() -> None:
    values = losses("base", "arm", "gone")
    own = phase("base", "arm", "gone")
    own = replace(own, arms=(*own.arms[:2], replace(own.arms[2], verdict="diverged")))
    result = found(own, values, records=records(values))
    assert [arm for arm, _, _ in result["baselines"][0]["arms"]] == [1]
    assert 2 not in result["baselines"]


def test_one_seed_has_no_differences() -> None:
    assert differences(phase("base", "arm"), curves_by_arm(rows(losses("base", "arm", seeds=(1,))))) is None
    assert differences(phase("base", "arm"), {}) is None


def test_a_phase_with_looks_is_not_judged_against_another_baseline() -> None:
    values = losses("base", "arm")
    looked = phase("base", "arm", looks=(Look(1, 4, 0.05, "arm", ()),))
    result = found(looked, values, records=records(values))
    assert result["baselines"][1]["final"] == [] and result["baselines"][0]["final"]


def test_many_arms_and_evaluations_are_limited() -> None:
    names = ["base", *(f"a{n}" for n in range(19))]
    values = losses(*names, seeds=(1, 2), evaluations=100)
    result = found(phase(*names), values, records=records(values))
    assert result["thinned"] and len(result["tokens"]) == LIMITS[40][0]
    assert len(result["baselines"]) == LIMITS[40][1]
    assert {len(rows["arms"]) for rows in result["baselines"].values()} == {MAX_ARMS}


def test_a_metric_without_verdicts_is_compared_for_fewer_arms_and_evaluations_and_has_no_table() -> None:
    names = ["base", *(f"a{n}" for n in range(OTHER_ARMS + 5))]
    values = losses(*names, seeds=(1, 2), evaluations=30)
    logged = curves_by_arm([row | {"val_bpb": row["val_loss"] / 2} for row in rows(values)])
    result = differences(phase(*names), logged, records(values), NoisePrior(30.0, 0.004), "val_bpb")
    assert result is not None
    assert result["thinned"] and (len(result["tokens"]), len(result["baselines"])) == OTHER_LIMITS
    assert not any(rows["final"] for rows in result["baselines"].values())
    shown = [arm for rows in result["baselines"].values() for arm, _, _ in rows["arms"]]
    assert max(shown) < OTHER_ARMS


def test_the_noise_that_a_phase_borrows_is_not_that_of_another_metric() -> None:
    values = losses("base", "arm")
    logged = curves_by_arm([row | {"val_bpb": row["val_loss"] / 2} for row in rows(values)])
    result = differences(phase("base", "arm"), logged, prior=NoisePrior(30.0, 0.004), metric="val_bpb")
    assert result is not None
    ((_, _, halves),) = result["baselines"][0]["arms"]
    one, other = ([values[arm][seed][-1] / 2 for seed in SEEDS] for arm in ("arm", "base"))
    test = stats.ttest_rel(one, other)
    interval = test.confidence_interval(0.95)
    assert halves[-1] == pytest.approx((interval.high - interval.low) / 2, abs=1e-5)
