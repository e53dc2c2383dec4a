"""Spends an error rate over several looks at the same trials; `tune/analysis/sequential.py` explains the method."""

from functools import lru_cache
from math import e, log, log1p, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy and scipy are imported lazily, so that `--help` stays fast
    import numpy as np

GROWTH = 1.25  # number of seeds at a look, relative to the look before; at least one more
NODES = 48  # of the Gauss-Legendre quadrature


def look_sizes(start: int, most: int) -> tuple[int, ...]:
    """The number of seeds at each look: each about a quarter more than the last, at least one more, up to `most`."""
    sizes = [start]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, round(GROWTH * sizes[-1]))))
    return tuple(sizes)


def spent_alpha(share: float, alpha: float) -> float:
    """The error rate that may be spent by the time `share` of the seeds is used (Lan and DeMets 1983, Pocock type)."""
    return alpha * log1p((e - 1) * share)


@lru_cache(maxsize=512)
def nominal_levels(sizes: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The two-sided p below which a look rejects, for each look, so that all looks together reject in `alpha`.

    The statistics at the looks are those of a Brownian motion at the shares `sizes` / `sizes[-1]`. Its density inside
    the earlier boundaries is integrated look by look (Armitage, McPherson and Rowe 1969).
    """
    import numpy as np
    from scipy.special import ndtr

    unit, weights = np.polynomial.legendre.leggauss(NODES)
    shares = [size / sizes[-1] for size in sizes]
    # Before the first look, all mass is at 0.
    x, mass, earlier, levels, spent = np.zeros(1), np.ones(1), 0.0, list[float](), 0.0
    for share in shares:
        step, target = sqrt(share - earlier), spent_alpha(share, alpha) - spent
        bound = _boundary(x, mass, step, sqrt(share), target)
        levels.append(2 * float(ndtr(-bound)))
        inside = bound * sqrt(share) * unit
        density = np.exp(-0.5 * ((inside[:, None] - x) / step) ** 2) / (step * sqrt(2 * np.pi)) @ mass
        x, mass = inside, weights * bound * sqrt(share) * density
        earlier, spent = share, spent_alpha(share, alpha)
    return tuple(levels)


def _boundary(x: "np.ndarray", mass: "np.ndarray", step: float, root: float, target: float) -> float:
    """The boundary of |z| at a look that the motion crosses with probability `target`, from `mass` at `x`."""
    from scipy.special import ndtr

    low, high = 0.0, 40.0
    for _ in range(60):
        bound = (low + high) / 2
        outside = ndtr((x - bound * root) / step) + ndtr((-x - bound * root) / step)
        low, high = (bound, high) if float((mass * outside).sum()) > target else (low, bound)
    return high


@lru_cache(maxsize=64)
def _level_table(sizes: tuple[int, ...]) -> tuple[list[float], list[list[float]]]:
    """Logarithms of error rates, and of their nominal levels for each look."""
    rates = [10 ** (-i / 3) for i in range(36, 0, -1)]
    levels = zip(*(nominal_levels(sizes, rate) for rate in rates), strict=True)
    return [log(rate) for rate in rates], [[log(level) for level in row] for row in levels]


def corrected_for_looks(sizes: tuple[int, ...], number: int, p: float) -> float:
    """The smallest error rate at which look `number` (from 0) rejects `p`; interpolated, at most 1."""
    import numpy as np

    rates, levels = _level_table(sizes)
    if p <= 0:
        return 0.0
    if log(p) < levels[number][0]:  # beyond the table: in proportion
        return p * float(np.exp(rates[0] - levels[number][0]))
    return min(1.0, float(np.exp(np.interp(log(p), levels[number], rates, right=0.0))))
