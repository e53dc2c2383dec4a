"""Estimates of variances in R phases with the same layout of A arms and S seeds, as arrays.

Every function takes all phases at once, since simulations judge thousands of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numpy and scipy are imported lazily, so that `--help` stays fast
    import numpy as np

GROSS = 0.999  # quantile of F above which an arm scatters grossly
CERTAIN_DF = 1e6  # degrees of freedom of a prior whose variances do not differ by more than chance


def two_way_residuals(y: "np.ndarray", present: "np.ndarray") -> tuple["np.ndarray", int]:
    """Residuals (R, A, S) of arm + seed + noise by least squares, 0 for missing trials, and their degrees of freedom.

    With missing trials this is the intra-block analysis of an incomplete block design, with seeds as blocks (Yates
    1936). Seeds must connect all arms.
    """
    import numpy as np

    arms = len(present)
    df = int(present.sum()) - arms - int(present.any(0).sum()) + 1
    if present.all():
        residuals = y - y.mean(2, keepdims=True)
        return residuals - residuals.mean(1, keepdims=True), df
    weights = present / np.maximum(present.sum(0), 1)
    information = np.diag(present.sum(1)) - weights @ present.T  # of the arms, with seeds eliminated
    effects = (y.sum(2) - y.sum(1) @ weights.T) @ np.linalg.inv(information + 1 / arms)
    residuals = np.where(present, y - effects[:, :, None], 0.0)
    return residuals - weights * residuals.sum(1, keepdims=True), df


def gross_scatterers(
    residuals: "np.ndarray", present: "np.ndarray", reference: int, rounding: float = 0.0
) -> "np.ndarray":
    """Which arms (R, A) scatter so much that the others must not be judged by their noise; never the reference.

    An arm's scatter is the median variance of its differences from each other arm. It is gross if it exceeds the median
    variance of the differences between the other arms by more than the 99.9 % quantile of F.
    """
    import numpy as np

    mask = present.astype(float)
    shared = mask @ mask.T  # seeds of each pair of arms
    sums = residuals @ mask.T
    squares = (residuals**2) @ mask.T
    squares = squares + squares.swapaxes(1, 2) - 2 * residuals @ residuals.swapaxes(1, 2)
    usable = (shared > 1) & ~np.eye(len(present), dtype=bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (squares - (sums - sums.swapaxes(1, 2)) ** 2 / shared) / (shared - 1)
    variance = np.where(usable, np.maximum(variance, 0.0), np.nan)  # (R, A, A)
    if len(present) < 3:
        return np.zeros(residuals.shape[:2], dtype=bool)
    own_df = present.sum(1) - 1
    df = np.maximum(present.sum() - len(present) - present.any(0).sum() + 1 - own_df, own_df)
    scatter = np.nanmedian(variance, axis=2)
    gross = (scatter > f_quantile(GROSS, own_df, df) * _medians_without(variance)) & (scatter > rounding**2)
    gross[:, reference] = False
    return gross


def _medians_without(pairs: "np.ndarray") -> "np.ndarray":
    """For each arm (R, A), the median of the entries of `pairs` that do not involve it.

    `pairs` (R, A, A) is symmetric, with NaN in the same places of each phase. All pairs are sorted once; the pairs of
    an arm that precede the median are counted.
    """
    import numpy as np

    arms = len(pairs[0])
    first, second = np.triu_indices(arms, 1)
    values = pairs[:, first, second]
    order = values.argsort(axis=1)  # NaN last
    values = np.take_along_axis(values, order, axis=1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(first))[None], axis=1)
    position = np.full(pairs.shape, len(first))
    position[:, first, second] = position[:, second, first] = ranks
    position[np.isnan(pairs)] = len(first)
    position.sort(axis=2)
    usable = np.isfinite(pairs[0])
    n_others = usable.sum() // 2 - usable.sum(1)  # pairs without each arm

    def entry(index: "np.ndarray") -> "np.ndarray":
        """The entry at `index` (A,) among the sorted pairs without each arm."""
        before = (position - np.arange(arms) <= index[:, None]).sum(2)
        return np.take_along_axis(values, np.minimum(index + before, len(first) - 1), axis=1)

    medians = (entry((n_others - 1) // 2) + entry(n_others // 2)) / 2
    return np.where(n_others > 0, medians, np.inf)


def arm_variances(residuals: "np.ndarray", arm_df: "np.ndarray") -> "np.ndarray":
    """The variance of each arm (R, A) from two-way residuals (R, A, S), unbiased if variances differ between arms.

    The mean square of an arm's residuals has the expectation (1 - 2/A) v_a + mean(v) / A. Estimates are at least 5 % of
    the mean variance. The variances of two arms cannot be told apart: both get the mean.
    """
    import numpy as np

    arms = residuals.shape[1]
    squares = (residuals**2).sum(2) / arm_df
    mean = squares.sum(1, keepdims=True) / max(arms - 1, 1)
    if arms < 3:
        return np.broadcast_to(mean, squares.shape).copy()
    return np.maximum((squares - mean / arms) / (1 - 2 / arms), 0.05 * mean)


def fit_prior(variance: "np.ndarray", df: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
    """Degrees of freedom and variance of the prior (R,) that sample variances (R, A) with `df` (A,) come from.

    The method of moments on the logarithms (Smyth 2004, section 6.2).
    """
    import numpy as np
    from scipy.special import psi, zeta

    floor = 1e-6 * variance.mean(1, keepdims=True)
    log = np.log(np.maximum(np.maximum(variance, floor), np.finfo(float).tiny))
    centered = log - psi(df / 2) + np.log(df / 2)
    mean = centered.mean(1)
    excess = centered.var(1, ddof=1) - zeta(2, df / 2).mean()  # trigamma(x) = zeta(2, x)
    d0 = np.full(len(mean), CERTAIN_DF)
    varies = excess > 1e-3
    d0[varies] = 2 * _inverse_trigamma(excess[varies])
    return d0, np.exp(mean + psi(d0 / 2) - np.log(d0 / 2))


def _inverse_trigamma(x: "np.ndarray") -> "np.ndarray":
    """Solves trigamma(y) = x by Newton's method on 1 / trigamma, which converges from below (Smyth 2004, appendix)."""
    from scipy.special import zeta

    y = 0.5 + 1 / x
    for _ in range(20):
        trigamma = zeta(2, y)
        y = y + trigamma * (1 - trigamma / x) / (-2 * zeta(3, y))
    return y


def moderate(
    variance: "np.ndarray", df: "np.ndarray", prior_df: "np.ndarray", prior_variance: "np.ndarray"
) -> tuple["np.ndarray", "np.ndarray"]:
    """Posterior variances (R, A) and their degrees of freedom (R, A)."""
    d0, s0 = prior_df[:, None], prior_variance[:, None]
    return (d0 * s0 + df * variance) / (d0 + df), d0 + df


def sum_with(k: int, squared_error: "np.ndarray", df: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
    """The squared standard error of each arm minus arm `k`, with Satterthwaite's degrees of freedom (1946)."""
    import numpy as np

    other, df = squared_error[:, k : k + 1], np.broadcast_to(df, squared_error.shape)
    total = squared_error + other
    parts = squared_error**2 / df + other**2 / df[:, k : k + 1]
    return total, np.divide(total**2, parts, out=np.ones_like(total), where=parts > 0)


def one_way_variance(y: "np.ndarray", present: "np.ndarray") -> "np.ndarray":
    """The variance (R,) of values (R, A, S) around the mean of their arm, pooled over arms."""
    import numpy as np

    n = present.sum(1)
    deviations = np.where(present, y - (y.sum(2) / n)[:, :, None], 0.0)
    return (deviations**2).sum((1, 2)) / (n.sum() - len(n))


def paired_differences(
    y: "np.ndarray", present: "np.ndarray", reference: int, rounding: float
) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
    """Mean (R, A) and variance (R, A) of arm minus reference over the seeds that both have, and their number (A,)."""
    import numpy as np

    shared = present & present[reference]
    n = shared.sum(1)
    d = np.where(shared, y - y[:, reference : reference + 1], 0.0)
    mean = d.sum(2) / n
    variance = (np.where(shared, d - mean[:, :, None], 0.0) ** 2).sum(2) / (n - 1)
    variance[variance <= rounding**2] = 0.0
    mean[np.abs(mean) <= rounding] = 0.0
    return mean, variance, n


def f_quantile(q: float, df: "np.ndarray", other_df: Any) -> "np.ndarray":
    """The `q` quantile of the F distribution, with degrees of freedom that broadcast."""
    from scipy.special import fdtri

    return fdtri(df, other_df, q)
