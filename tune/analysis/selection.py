"""Shrinks the estimate of a winner, which was chosen because it looked good.

The best of several arms is partly lucky, and so is every arm that passes a test: on average both seem better than they
are (the winner's curse). `shrunken_effect` subtracts the excess to be expected. If arm means are independent and normal
around their centres, and the baseline around 0, the expected excess of the best arm that passes the test is a
one-dimensional integral. The centres are the observed effects, shrunk to their mean by the factor of James and Stein
(Efron and Morris 1973). To subtract a plug-in estimate of the excess is the idea of the bootstrap corrections of genome
studies (Ferguson et al. 2013); Zhong and Prentice (2008) treat the selection by a test.
`python -m tune.bench confirmations` measures the bias that is left.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING

from tune.storage.summaries import ArmSummary

if TYPE_CHECKING:
    import numpy as np

GRID = 301  # points of the integral
MIN_ARMS_TO_SHRINK = 3  # fewer arms say too little about their spread
REACH = 6.0  # standard errors beyond the centres
STEPS = 2  # more steps scatter more than they correct


def shrunken_effect(
    effects: Mapping[str, float],
    winner: str,
    *,
    standard_errors: Mapping[str, float],
    threshold: float,
) -> float:
    """The effect of `winner` after allowing for its selection, between 0 and its observed effect.

    Args:
        effects: observed effect of every compared arm against the baseline, positive if it is better.
        standard_errors: of these effects, positive.
        threshold: the smallest effect that would have been called better.
    """
    import numpy as np
    from scipy.special import ndtr

    observed = np.array([effects[arm] for arm in effects])
    squared = np.array([standard_errors[arm] for arm in effects]) ** 2
    if not squared.min() > 0:
        return effects[winner]
    baseline_variance = float(squared.min()) / 2
    variances = squared - baseline_variance
    centres = _shrunken(observed, float(variances.mean()))
    sd, baseline_sd = np.sqrt(variances), sqrt(baseline_variance)

    estimate = effects[winner]
    for _ in range(STEPS):
        low, high = float(np.min(centres - REACH * sd)), float(np.max(centres + REACH * sd))
        x = np.linspace(low, high, GRID)[:, None]
        z = (x - centres) / sd
        log_cdf = np.log(np.maximum(ndtr(z), 1e-300))
        # The density of arm i at x where all other arms are below it.
        is_best = np.exp(-z * z / 2 + log_cdf.sum(1, keepdims=True) - log_cdf) / sd
        # The baseline is a normal variable w with mean 0; the arm passes if x - w exceeds the threshold.
        margin = (x - threshold) / baseline_sd
        passes = ndtr(margin)
        luck_of_baseline = baseline_sd * np.exp(-margin * margin / 2) / sqrt(2 * np.pi)  # -E[w; it passes]
        chance = float((passes * is_best).sum())
        if not chance > 0:
            return 0.0  # far below the threshold, so that all of the effect is luck
        excess = float((((x - centres) * passes + luck_of_baseline) * is_best).sum()) / chance
        estimate = effects[winner] - excess
        # The baseline's luck has raised all effects alike: move the centres towards the estimate.
        expected = float((centres * passes * is_best).sum()) / chance
        centres = centres - (expected - estimate) / 2
    return min(max(estimate, 0.0), max(effects[winner], 0.0))


def _shrunken(effects: "np.ndarray", variance: float) -> "np.ndarray":
    """The effects, shrunk to their mean by the share of their spread that noise of this variance explains."""
    if len(effects) < MIN_ARMS_TO_SHRINK:
        return effects
    spread = float(effects.var(ddof=1))
    share = min(1.0, variance / spread) if spread else 1.0
    return effects + share * (effects.mean() - effects)


def shrunken_delta(
    arms: Sequence[ArmSummary],
    winner: str,
    *,
    goal: str,
    confidence: float,
    min_effect: float,
    most_seeds: int | None = None,
) -> float | None:
    """The delta of the winner of a judged phase after allowing for its selection; None if no arm was better.

    `most_seeds` are those that the winner could have had with `until: decided`. It stops at the look that it passes, so
    its effect is always just above the threshold of this look; what selects it is that it passes by the last one.
    """
    from scipy.special import stdtrit

    sign = 1.0 if goal == "maximize" else -1.0
    deltas = {arm.arm: arm.delta for arm in arms if arm.delta and arm.delta.p_holm is not None and arm.delta.df}
    chosen = next((arm for arm in arms if arm.arm == winner), None)
    if chosen is None or chosen.verdict != "better" or winner not in deltas:
        return None
    errors = {
        arm: ((delta.ci_high or 0.0) - (delta.ci_low or 0.0)) / 2 / float(stdtrit(delta.df, 0.5 + confidence / 2))
        for arm, delta in deltas.items()
    }
    # Holm's first step, which the best arm has to pass
    quantile = float(stdtrit(deltas[winner].df, 1 - (1 - confidence) / 2 / len(deltas)))
    share = 1.0 if most_seeds is None else min(1.0, chosen.n / most_seeds)
    threshold = max(errors[winner] * quantile * sqrt(share), min_effect)
    effects = {arm: sign * delta.mean for arm, delta in deltas.items()}
    return sign * shrunken_effect(effects, winner, standard_errors=errors, threshold=threshold)
