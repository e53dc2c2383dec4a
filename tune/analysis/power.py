"""Power of a phase: which effects it finds, and how many seeds it takes to decide.

Everything follows the full rule of `tune/analysis/verdicts.py`: three readings of the noise, Holm's first step over all
arms, and `min_effect`. The noise of phases is simulated once for each design; an effect only shifts the differences.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from tune.analysis.noise import Method
from tune.analysis.readings import NoisePrior, read_noise, read_unpaired_noise

if TYPE_CHECKING:
    import numpy as np

POWER = 0.8  # share of phases that find an effect which counts as detectable
PHASES = 1000  # simulated for each design
SIMULATED_ARMS = 16  # more arms hardly change the noise, only the correction
SIMULATED_SEEDS = 24  # with more seeds, the readings agree and scale with the square root of the number of seeds
MAX_SEEDS = 1000  # questions that need more seeds cannot be decided


class Design(NamedTuple):
    """A phase with the same number of seeds for all arms; `sd` is the noise of one trial, in units of the metric."""

    n_arms: int  # with the baseline, and with arms that were stopped early
    sd: float
    method: Method = "paired"
    confidence: float = 0.95
    min_effect: float = 0.0
    prior_df: float | None = None  # of the noise of earlier phases, if it is borrowed


def power(effect: float, n_seeds: int, design: Design) -> float:
    """The probability that an arm with this true effect is called better or worse, if no other arm has an effect."""
    if min(n_seeds, design.n_arms) < 2:
        return 0.0
    return float((_needed_effect(n_seeds, design) <= abs(effect)).mean())


def smallest_detectable(n_seeds: int, design: Design) -> float | None:
    """The true effect that is called better or worse in 80 % of phases; None if the phase finds none."""
    import numpy as np

    if min(n_seeds, design.n_arms) < 2:
        return None
    return float(np.quantile(_needed_effect(n_seeds, design), POWER))


def seeds_to_decide(effect: float, design: Design) -> int | None:
    """The number of seeds that decides an arm with this true effect with 80 % power; None if 1,000 do not.

    An arm whose effect exceeds `min_effect` is decided by the verdict better or worse, any other by equivalent.
    """
    if design.n_arms < 2:
        return None
    differs = abs(effect) > design.min_effect

    def is_enough(n_seeds: int) -> bool:
        if differs:
            return power(effect, n_seeds, design) >= POWER
        error, half_width = _noise(n_seeds, design, design.confidence)
        return float((abs(effect + error) + half_width <= design.min_effect).mean()) >= POWER

    if not is_enough(MAX_SEEDS):
        return None
    low, high = 1, MAX_SEEDS  # `low` is not enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _needed_effect(n_seeds: int, design: Design) -> "np.ndarray":
    """The smallest true effect that each of the simulated phases would find, (PHASES,)."""
    import numpy as np

    error, half_width = _noise(n_seeds, design, 1 - (1 - design.confidence) / (design.n_arms - 1))
    return np.maximum(half_width, design.min_effect) - error


def _noise(n_seeds: int, design: Design, confidence: float) -> tuple["np.ndarray", "np.ndarray"]:
    """Errors of an arm's difference and half-widths of its interval, (PHASES,)."""
    n = min(n_seeds, SIMULATED_SEEDS)
    numbers = _simulate(n, min(design.n_arms, SIMULATED_ARMS), design.method, confidence, design.prior_df)
    error, half_width = numbers * (design.sd * (n / n_seeds) ** 0.5)
    return error, half_width


@lru_cache(maxsize=256)
def _simulate(n_seeds: int, n_arms: int, method: Method, confidence: float, prior_df: float | None) -> "np.ndarray":
    """Errors and half-widths (2, PHASES) for noise with standard deviation 1."""
    import numpy as np

    y = np.random.default_rng(0).normal(size=(PHASES, n_arms, n_seeds))
    read = read_noise if method == "paired" else read_unpaired_noise
    prior = None if prior_df is None else NoisePrior(prior_df, 2.0)
    readings = read(y, np.ones(y.shape[1:], dtype=bool), 0, prior=prior)
    return np.stack([readings.difference[:, 1], np.nanmax(readings.half_width(confidence)[:, :, 1], axis=0)])
