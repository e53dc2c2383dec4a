"""The power of a phase against the verdicts of simulated phases, and against closed forms where there are any."""

import math

import numpy as np
import pytest
from scipy import stats

from tune.analysis.power import MAX_SEEDS, Design, power, seeds_to_decide, smallest_detectable
from tune.analysis.verdicts import judge
from tune.storage.records import TrialOutcome


def share_found(effect: float, n_seeds: int, design: Design, phases: int = 120) -> float:
    """The share of simulated phases in which `judge` finds the effect of one arm."""
    rng = np.random.default_rng(13)
    found = 0
    for _ in range(phases):
        y = rng.normal(6, design.sd, (design.n_arms, n_seeds)) + rng.normal(0, 1, n_seeds)
        y[1] -= effect
        cells = {
            f"arm{i}": {s: TrialOutcome("finished", float(x)) for s, x in enumerate(row)} for i, row in enumerate(y)
        }
        judgement = judge(cells, baseline="arm0", min_effect=design.min_effect)
        found += {arm.arm: arm.verdict for arm in judgement.arms}["arm1"] == "better"
    return found / phases


@pytest.mark.parametrize(
    ("n_arms", "n_seeds", "min_effect"), [pytest.param(12, 3, 0.0, marks=pytest.mark.slow), (6, 4, 0.3), (2, 5, 0.0)]
)
def test_the_smallest_detectable_effect_is_found_in_four_of_five_phases(
    n_arms: int, n_seeds: int, min_effect: float
) -> None:
    design = Design(n_arms, 0.1, min_effect=min_effect)
    effect = smallest_detectable(n_seeds, design)
    assert effect is not None
    assert share_found(effect, n_seeds, design) == pytest.approx(0.8, abs=0.13)


def test_for_two_arms_the_power_is_that_of_the_noncentral_t_distribution() -> None:
    n, sd = 6, 0.1
    for effect in (0.1, 0.2, 0.3):
        shift, critical = effect / (sd * math.sqrt(2 / n)), stats.t.isf(0.025, n - 1)
        exact = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        assert power(effect, n, Design(2, sd)) == pytest.approx(float(exact), abs=0.05)


def test_an_effect_of_the_size_of_min_effect_is_never_found_in_four_of_five_phases() -> None:
    design = Design(12, 0.001, min_effect=0.005)
    assert power(0.005, MAX_SEEDS, design) == pytest.approx(0.5, abs=0.05)
    assert power(0.0033, 3, design) < 0.1
    detectable = smallest_detectable(3, design)
    assert detectable is not None and detectable > 0.005


def test_the_seeds_that_decide_an_effect_give_it_the_power_of_80_percent() -> None:
    design = Design(12, 0.1, min_effect=0.01)
    n = seeds_to_decide(0.1, design)
    assert n is not None
    assert power(0.1, n, design) >= 0.8 > power(0.1, n - 1, design)
    assert share_found(0.1, n, design) == pytest.approx(0.8, abs=0.12)


def test_an_effect_below_min_effect_is_decided_by_an_interval_that_lies_inside() -> None:
    design = Design(2, 0.01, min_effect=0.01)
    n = seeds_to_decide(0.0, design)
    assert n is not None
    # 80 % of intervals of a true 0 lie within +-min_effect: both tails of the estimate share the other 20 %
    margin = 0.01 - stats.t.isf(0.025, n - 1) * 0.01 * math.sqrt(2 / n)
    assert 2 * stats.norm.cdf(margin / (0.01 * math.sqrt(2 / n))) - 1 == pytest.approx(0.8, abs=0.12)


def test_what_thousand_seeds_cannot_decide_has_no_number() -> None:
    assert seeds_to_decide(0.0001, Design(12, 1.0)) is None
    assert seeds_to_decide(0.01, Design(12, 0.1, min_effect=0.01)) is None  # at the limit itself
    assert seeds_to_decide(0.1, Design(1, 0.1)) is None


def test_borrowed_noise_adds_power_to_a_phase_of_two_arms() -> None:
    alone, borrowed = Design(2, 1.0), Design(2, 1.0, prior_df=22)
    assert power(3, 4, alone) == pytest.approx(0.8, abs=0.06)
    assert power(3, 4, borrowed) > 0.95


def test_nothing_is_detectable_with_one_seed_or_one_arm() -> None:
    assert smallest_detectable(1, Design(5, 0.02)) is None
    assert smallest_detectable(3, Design(1, 0.02)) is None
    assert power(1.0, 1, Design(5, 0.02)) == 0.0


def test_more_seeds_and_fewer_arms_never_need_larger_effects() -> None:
    found = [smallest_detectable(n, Design(6, 1.0)) or 0.0 for n in (3, 5, 8, 13, 24, 60, 200)]
    assert found == sorted(found, reverse=True)
    found = [smallest_detectable(5, Design(arms, 1.0)) or 0.0 for arms in (4, 8, 16, 100)]
    assert found == sorted(found)
