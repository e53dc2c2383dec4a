"""The estimate of a winner after allowing for its selection, against simulated phases."""

import numpy as np
import pytest

from tune.analysis.selection import shrunken_delta, shrunken_effect
from tune.storage.summaries import ArmSummary, Delta

ERROR = (2 / 3) ** 0.5  # of a difference on three seeds with noise 1
THRESHOLD = 3.0 * ERROR


def mean_errors(effects: list[float], *, phases: int = 1500) -> tuple[float, float]:
    """Mean error of the winner's observed and shrunken effect over simulated phases that have a winner."""
    rng = np.random.default_rng(5)
    naive, shrunken = [], []
    for _ in range(phases):
        means = rng.normal(size=len(effects) + 1) / 3**0.5
        observed = {str(i): effect + means[i + 1] - means[0] for i, effect in enumerate(effects)}
        winner = max(observed, key=lambda arm: observed[arm])
        if observed[winner] > THRESHOLD:
            errors = dict.fromkeys(observed, ERROR)
            estimate = shrunken_effect(observed, winner, standard_errors=errors, threshold=THRESHOLD)
            naive.append(observed[winner] - effects[int(winner)])
            shrunken.append(estimate - effects[int(winner)])
    return float(np.mean(naive)), float(np.mean(shrunken))


@pytest.mark.parametrize("effects", [[3.0] * 8, [5.0] * 8, [4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
def test_a_winner_of_many_good_arms_is_too_good_and_its_shrunken_effect_is_not(effects: list[float]) -> None:
    naive, shrunken = mean_errors(effects)
    assert naive > 0.2
    assert abs(shrunken) < 0.2


def test_a_lone_winner_far_above_the_noise_keeps_its_effect() -> None:
    observed = {"good": 12.0, "a": 0.1, "b": -0.2, "c": 0.0}
    estimate = shrunken_effect(observed, "good", standard_errors=dict.fromkeys(observed, ERROR), threshold=THRESHOLD)
    assert estimate == pytest.approx(12.0, abs=0.05)


def test_equal_effects_shrink_to_their_mean_minus_the_luck_of_the_baseline() -> None:
    observed = {"a": 9.0, "b": 9.0, "c": 9.0}
    estimate = shrunken_effect(observed, "a", standard_errors=dict.fromkeys(observed, 1.0), threshold=3.0)
    # the expected maximum of three standard normal variables is 3 / (2 sqrt(pi)); half of the variance is the arm's
    assert estimate == pytest.approx(9.0 - 1.5 / np.pi**0.5 * 0.5**0.5, abs=1e-3)


def test_the_estimate_is_never_below_zero_or_above_what_was_observed() -> None:
    observed = {"a": 2.46, "b": 2.45, "c": 2.44, "d": 2.43}
    errors = dict.fromkeys(observed, ERROR)
    assert 0 <= shrunken_effect(observed, "a", standard_errors=errors, threshold=2.45) <= 2.46
    assert shrunken_effect({"a": 2.0}, "a", standard_errors={"a": 0.0}, threshold=1.0) == 2.0


def arm(name: str, mean: float, verdict: str) -> ArmSummary:
    return ArmSummary(name, n=3, delta=Delta(mean, mean - 0.1, mean + 0.1, 1e-4, 1e-3, df=20), verdict=verdict)


def test_a_delta_keeps_its_sign_and_only_a_better_arm_has_an_estimate() -> None:
    arms = [arm("a", -0.5, "better"), arm("b", -0.49, "better"), arm("c", -0.48, "better")]
    limits = {"confidence": 0.95, "min_effect": 0.005}
    shrunken = shrunken_delta(arms, "a", goal="minimize", **limits)
    assert shrunken is not None and -0.5 < shrunken < -0.4
    assert shrunken_delta(arms, "baseline", goal="minimize", **limits) is None
    assert shrunken_delta([arm("a", -0.5, "undecided")], "a", goal="minimize", **limits) is None


def test_an_arm_that_could_have_had_more_seeds_was_selected_less_strictly() -> None:
    arms, limits = [arm("a", -0.12, "better")], {"goal": "minimize", "confidence": 0.95, "min_effect": 0.005}
    fixed, rounds = (shrunken_delta(arms, "a", **limits, most_seeds=n) for n in (None, 30))
    assert fixed == shrunken_delta(arms, "a", **limits, most_seeds=3)
    assert fixed is not None and fixed > -0.10  # just above the threshold of 0.1
    assert rounds == pytest.approx(-0.12, abs=0.005)  # far above that of 30 seeds
