"""The noise of each comparison of a phase: how far arm minus baseline may lie from the truth.

Arms of a real sweep do not share one standard deviation: some settings are less stable than others. So the noise of a
difference is read in several ways, and the reading that gives the largest p-value counts, with its interval:

- `pooled`: the residual variance of the two-way layout, arm + seed + noise (Fisher 1925), one for all arms.
- `moderated`: the variance of the paired differences of this arm, shrunk towards that of the other arms by an
  empirical-Bayes prior (Smyth 2004); t with the degrees of freedom of both.
- `arm`: the variances of the two arms, each from its own residuals and moderated the same way; degrees of freedom by
  Satterthwaite (1946).
- `own`: the arm's own paired differences alone (Student 1908).

An arm that scatters grossly (see `gross_scatterers`) does not enter the readings of the others and is judged by `own`.
So are two arms without a third, for which all readings coincide. Arms that share fewer than two seeds with the baseline
cannot be paired: then seeds are ignored, `pooled` is the one-way layout, `own` is the test of Welch (1947), and there
is no `moderated`.

`docs/statistics.md` has the error rates and the power that follow from this, by simulation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # numpy and scipy are imported lazily, so that `--help` stays fast
    import numpy as np

Values = dict[str, dict[int, float]]  # arm -> seed -> value of the finished trial
Method = Literal["paired", "unpaired"]

READINGS = ("pooled", "moderated", "arm", "own")
POOLED, MODERATED, ARM, OWN = range(4)
ROUNDING = 1e-12  # spreads and differences below this fraction of the largest value are rounding errors
GROSS = 0.999  # quantile of F above which an arm scatters grossly
UNUSUAL = 0.05  # share of phases with equal noise in which an arm is named for its spread
UNUSUAL_RATIO = 2.0  # standard deviations that differ by less are not named
CERTAIN_DF = 1e6  # degrees of freedom of a prior whose variances do not differ by more than chance


class NoisePrior(NamedTuple):
    """What other arms say about the variance of a difference: a scaled inverse chi-squared distribution."""

    df: float
    variance: float  # of arm minus baseline on one seed


class Contrast(NamedTuple):
    """One arm minus another."""

    difference: float
    standard_error: float
    half_width: float  # of the confidence interval
    p: float  # two-sided
    df: float
    reading: str  # of the noise, that these numbers are from: one of READINGS
    n: int  # seeds that were compared


@dataclass(frozen=True)
class Readings:
    """The noise of all arms of R phases with the same layout, by each reading; NaN where a reading does not apply.

    The entries of the reference itself have no meaning, but for its variances.
    """

    difference: "np.ndarray"  # (R, A), arm minus reference
    standard_error: "np.ndarray"  # (4, R, A) in the order of READINGS
    df: "np.ndarray"  # (4, R, A)
    gross: "np.ndarray"  # (R, A), arms that scatter grossly
    arm_variance: "np.ndarray"  # (R, A), of one trial around its arm and seed, from the arm's own residuals
    moderated: "np.ndarray"  # (2, R, A), the same variance moderated by the other arms, and its degrees of freedom
    pooled_variance: "np.ndarray"  # (R,), without arms that scatter grossly
    pooled_df: "np.ndarray"  # (R,)

    def p(self) -> "np.ndarray":
        """Two-sided p-values of the differences, (4, R, A)."""
        import numpy as np
        from scipy.special import stdtr

        exact = np.where(self.difference == 0, 0.0, np.inf)  # without noise, any difference is certain
        exact = np.where(np.isnan(self.standard_error), np.nan, exact)
        size = np.broadcast_to(np.abs(self.difference), exact.shape)
        t = np.divide(size, self.standard_error, out=exact, where=self.standard_error > 0)
        return 2 * stdtr(self.df, -t)

    def half_width(self, confidence: float) -> "np.ndarray":
        """Half the width of the confidence interval of each difference, (4, R, A)."""
        from scipy.special import stdtrit

        return self.standard_error * stdtrit(self.df, 0.5 + confidence / 2)


class Variance(NamedTuple):
    """An estimated variance and its degrees of freedom."""

    value: float
    df: float


@dataclass(frozen=True)
class ArmNoise:
    """The noise of one trial of an arm around the means of its arm and its seed."""

    sd: float  # from the arm's own residuals
    moderated: Variance  # by the other arms
    is_gross: bool  # scatters so much that the others are judged without it
    ratio: float | None  # `sd` divided by that of the other arms, if that is unusual


@dataclass(frozen=True)
class Comparison:
    """The arms of a phase compared with one of them."""

    contrasts: dict[str, Contrast]  # of all other arms
    method: Method
    pooled: Variance  # of one trial, over the arms that do not scatter grossly
    seeds: Variance  # of the effect that a seed has on all arms alike; 0 if arms are not paired
    correlation: float | None  # of the arms over seeds: the share of the variance that pairing removes
    noise: dict[str, ArmNoise]  # of each arm
    same_as: dict[str, str]  # arms whose values are bit-identical to those of an earlier arm
    prior: NoisePrior | None  # of the differences, for a later phase that compares the same kind of arms

    def mean_half_width(self, arm: str, n: int, confidence: float) -> float:
        """Half the width of the confidence interval of an arm's mean over `n` seeds, which vary like the phase's seeds.

        The degrees of freedom are Satterthwaite's (1946): if seeds shift all arms alike, many arms do not make up for
        few seeds. An arm that was not compared has the pooled noise.
        """
        from scipy.special import stdtrit

        own = self.noise[arm].moderated if arm in self.noise else self.pooled
        total = self.seeds.value + own.value
        if not total:
            return 0.0
        df = 1 / sum((part.value / total) ** 2 / part.df for part in (self.seeds, own) if part.value)
        return (total / n) ** 0.5 * float(stdtrit(df, 0.5 + confidence / 2))


def compare_arms(
    values: Values,
    baseline: str,
    confidence: float = 0.95,
    *,
    method: Method | Literal["auto"] = "auto",
    prior: NoisePrior | None = None,
) -> Comparison:
    """Compares each arm with `baseline`; every arm has at least two seeds.

    A difference is the mean over the seeds that both arms have, or the difference of the means if arms are not paired.
    Arms with bit-identical values count once in the noise. A `prior` from earlier phases replaces the one from the
    other arms.
    """
    import numpy as np

    distinct: dict[tuple[tuple[int, float], ...], str] = {}
    twin = {arm: distinct.setdefault(tuple(sorted(sample.items())), arm) for arm, sample in values.items()}
    arms, seeds = list(distinct.values()), sorted({seed for sample in values.values() for seed in sample})
    present = np.array([[seed in values[arm] for seed in seeds] for arm in arms])
    y = np.array([[values[arm].get(seed, 0.0) for seed in seeds] for arm in arms])
    rounding = ROUNDING * float(np.abs(y).max())
    y = present * (y - y.sum() / present.sum())  # centering avoids cancellation if all values share a large offset
    k = arms.index(twin[baseline])
    can_pair = (present & present[k]).sum(1).min() > 1
    chosen: Method = "paired" if can_pair and method != "unpaired" else "unpaired"
    read = read_noise if chosen == "paired" else read_unpaired_noise
    readings = read(y[None], present, k, prior=prior, rounding=rounding)
    n = (present & present[k]).sum(1) if chosen == "paired" else present.sum(1)
    contrasts = dict(zip(arms, _contrasts(readings, n, confidence), strict=True))
    noise = dict(zip(arms, _arm_noise(readings, present.sum(1) - 1), strict=True))
    pooled = Variance(float(readings.pooled_variance[0]), float(readings.pooled_df[0]))
    kept = ~readings.gross[0]
    total = float(one_way_variance(y[None, kept], present[kept])[0])
    is_paired = chosen == "paired" and kept.sum() > 1
    by_seed = max(total - pooled.value, 0.0) if is_paired else 0.0
    return Comparison(
        contrasts={arm: contrasts[twin[arm]] for arm in values if arm != baseline},
        method=chosen,
        pooled=pooled,
        seeds=Variance(by_seed if by_seed > rounding**2 else 0.0, max(len(seeds) - 1.0, 1.0)),
        correlation=min(max(1 - pooled.value / total, -1.0), 1.0) if is_paired and total else None,
        noise={arm: noise[twin[arm]] for arm in values},
        same_as={arm: first for arm, first in twin.items() if arm != first},
        prior=_prior_of(y[None], present, k, readings) if chosen == "paired" else None,
    )


def read_noise(
    y: "np.ndarray", present: "np.ndarray", reference: int, *, prior: NoisePrior | None = None, rounding: float = 0.0
) -> Readings:
    """Reads the noise of R phases whose arms are paired by seed.

    Args:
        y: values (R, A, S), 0 for missing trials.
        present: which trials there are (A, S), the same in all phases; each arm shares two seeds with the reference.
        reference: index of the baseline.
        prior: of the variances of the differences; None estimates it from the other arms.
        rounding: standard deviations and differences up to this size are rounding errors.
    """
    import numpy as np

    difference, variance, n = _paired_differences(y, present, reference, rounding)
    residuals, df = two_way_residuals(y, present)
    gross = gross_scatterers(residuals, present, reference, rounding)
    if prior is not None:
        gross |= (variance > _f_quantile(GROSS, n - 1, prior.df) * prior.variance) & (np.arange(len(n)) != reference)
    arm_df = present.sum(1) - 1
    readings = _empty_readings(difference, gross, arm_variances(residuals, arm_df), arm_df)
    readings.standard_error[OWN], readings.df[OWN] = np.sqrt(variance / n), n - 1
    for pattern in np.unique(gross, axis=0):  # the phases in which the same arms scatter grossly
        rows, kept = np.flatnonzero((gross == pattern).all(1)), np.flatnonzero(~pattern)
        residuals, df = two_way_residuals(y[np.ix_(rows, kept)], present[kept])
        pooled = (residuals**2).sum((1, 2)) / max(df, 1)
        pooled[pooled <= rounding**2] = 0.0
        readings.pooled_variance[rows], readings.pooled_df[rows] = pooled, df
        at = np.ix_(rows, kept)
        if len(kept) > 1:
            readings.arm_variance[at] = readings.moderated[0][at] = arm_variances(residuals, present[kept].sum(1) - 1)
        if len(kept) < 3 and (prior is None or len(kept) < 2):
            continue  # the own differences are all there is
        own, own_df, k = variance[at], n[kept] - 1, int(np.flatnonzero(kept == reference)[0])
        others = kept != reference
        if prior is None:
            moderated, moderated_df = _moderate(own, own_df, *fit_prior(own[:, others], own_df[others]))
            moderated_df = np.minimum(moderated_df, df)
        else:
            borrowed = (np.full(len(rows), number) for number in prior)
            moderated, moderated_df = _moderate(own, own_df, *borrowed)
        _put(readings, MODERATED, at, moderated / n[kept], moderated_df)
        readings.standard_error[OWN][at] = np.nan
        if len(kept) < 3:
            continue
        _put(readings, POOLED, at, 2 * pooled[:, None] / n[kept], df)
        arm_df = present[kept].sum(1) - 1
        of_arm = readings.arm_variance[at]
        of_arm, arm_df = _moderate(of_arm, arm_df, *fit_prior(of_arm, arm_df))
        arm_df = np.minimum(arm_df, df)
        readings.moderated[np.ix_(np.arange(2), rows, kept)] = of_arm, arm_df
        _put(readings, ARM, at, *_sum_with(k, of_arm / n[kept], arm_df))
    return readings


def read_unpaired_noise(
    y: "np.ndarray", present: "np.ndarray", reference: int, *, prior: NoisePrior | None = None, rounding: float = 0.0
) -> Readings:
    """Reads the noise of R phases whose arms do not share seeds; see `read_noise`. A `prior` of pairs is not used."""
    import numpy as np

    n = present.sum(1)
    means = y.sum(2) / n
    difference = means - means[:, reference : reference + 1]
    difference[np.abs(difference) <= rounding] = 0.0
    squares = (np.where(present, y - means[:, :, None], 0.0) ** 2).sum(2)
    variance = squares / (n - 1)
    variance[variance <= rounding**2] = 0.0
    arms = np.arange(len(n))
    others = np.stack([np.median(variance[:, arms != a], axis=1) for a in arms], axis=1)
    gross = variance > _f_quantile(GROSS, n - 1, n.sum() - len(n) - (n - 1)) * others
    gross &= (arms != reference) & (len(n) > 2)
    readings = _empty_readings(difference, gross, variance, n - 1)
    _put(readings, OWN, ..., *_sum_with(reference, variance / n, n - 1))
    for pattern in np.unique(gross, axis=0):
        rows, kept = np.flatnonzero((gross == pattern).all(1)), np.flatnonzero(~pattern)
        at, df = np.ix_(rows, kept), n[kept].sum() - len(kept)
        pooled = squares[at].sum(1) / df
        pooled[pooled <= rounding**2] = 0.0
        readings.pooled_variance[rows], readings.pooled_df[rows] = pooled, df
        if len(kept) > 1:
            _put(readings, POOLED, at, pooled[:, None] * (1 / n[kept] + 1 / n[reference]), df)
        if len(kept) > 2:
            of_arm, arm_df = _moderate(variance[at], n[kept] - 1, *fit_prior(variance[at], n[kept] - 1))
            k, arm_df = int(np.flatnonzero(kept == reference)[0]), np.minimum(arm_df, df)
            readings.moderated[np.ix_(np.arange(2), rows, kept)] = of_arm, arm_df
            _put(readings, ARM, at, *_sum_with(k, of_arm / n[kept], arm_df))
            readings.standard_error[OWN][at] = np.nan
    return readings


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
    gross = (scatter > _f_quantile(GROSS, own_df, df) * _medians_without(variance)) & (scatter > rounding**2)
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


def _moderate(
    variance: "np.ndarray", df: "np.ndarray", prior_df: "np.ndarray", prior_variance: "np.ndarray"
) -> tuple["np.ndarray", "np.ndarray"]:
    """Posterior variances (R, A) and their degrees of freedom (R, A)."""
    d0, s0 = prior_df[:, None], prior_variance[:, None]
    return (d0 * s0 + df * variance) / (d0 + df), d0 + df


def _sum_with(k: int, squared_error: "np.ndarray", df: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
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


def _paired_differences(
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


def _prior_of(y: "np.ndarray", present: "np.ndarray", reference: int, readings: Readings) -> NoisePrior | None:
    """What the differences of a single phase say about those of a later one; None if there are none, or no noise.

    It is worth at most as many degrees of freedom as the phase has.
    """
    import numpy as np

    _, variance, n = _paired_differences(y, present, reference, 0.0)
    used = ~readings.gross[0] & (np.arange(len(n)) != reference)
    if not used.any() or not readings.pooled_variance[0]:
        return None
    if used.sum() == 1:
        return NoisePrior(float(n[used][0] - 1), float(variance[0, used][0]))
    df, mean = fit_prior(variance[:, used], n[used] - 1)
    return NoisePrior(min(float(df[0]), float(readings.pooled_df[0])), float(mean[0]))


def _contrasts(readings: Readings, n: "np.ndarray", confidence: float) -> list[Contrast]:
    """The contrast of each arm of a single phase: for each, the reading with the largest p-value."""
    import numpy as np

    p, half_width = readings.p()[:, 0], readings.half_width(confidence)[:, 0]
    widest = np.lexsort((half_width, np.nan_to_num(p, nan=-1.0)), axis=0)[-1]  # of equal p-values, the widest interval
    arms = np.arange(p.shape[1])
    error, df = readings.standard_error[widest, 0, arms], readings.df[widest, 0, arms]
    numbers = np.stack([readings.difference[0], error, half_width[widest, arms], p[widest, arms], df], axis=1)
    return [
        Contrast(*row, reading=READINGS[reading], n=count)
        for row, reading, count in zip(numbers.tolist(), widest.tolist(), n.tolist(), strict=True)
    ]


def _arm_noise(readings: Readings, df: "np.ndarray") -> list[ArmNoise]:
    """The noise of each arm of a single phase.

    A ratio to the other arms is unusual if it is above 2 or below a half, and more than chance by an F test at 5 %,
    corrected for the number of arms. Two arms cannot be told apart.
    """
    import numpy as np

    variance, gross, arms = readings.arm_variance[0], readings.gross[0], np.arange(len(df))
    tail = UNUSUAL / len(arms)
    noise = []
    for arm in arms:
        used = ~gross & (arms != arm)
        others = float((variance[used] * df[used]).sum() / df[used].sum()) if used.any() and len(arms) > 2 else 0.0
        ratio = float(variance[arm] / others) ** 0.5 if others else 1.0
        own_df = df[arm] / _loss_of_df(len(arms))
        low, high = (float(_f_quantile(q, own_df, df[used].sum())) ** 0.5 for q in (tail, 1 - tail))
        is_unusual = gross[arm] or ratio > max(UNUSUAL_RATIO, high) or ratio < min(1 / UNUSUAL_RATIO, low)
        moderated = Variance(*readings.moderated[:, 0, arm].tolist())
        noise.append(ArmNoise(float(variance[arm]) ** 0.5, moderated, bool(gross[arm]), ratio if is_unusual else None))
    return noise


def _loss_of_df(arms: int) -> float:
    """How many times as variable the estimates of `arm_variances` are as sample variances, if all arms are alike.

    It follows from the covariance of the residuals, 1 - 1/A on the diagonal and -1/A beside it.
    """
    if arms < 3:
        return 1.0
    own, other, k = (1 - 1 / arms) ** 2, 1 / arms**2, 1 / (arms * (arms - 1))
    others = arms - 1
    variance = (1 - k) ** 2 * own + k**2 * others * own
    variance += k**2 * others * (others - 1) * other - 2 * (1 - k) * k * others * other
    return variance / (1 - 2 / arms) ** 2


def _empty_readings(
    difference: "np.ndarray", gross: "np.ndarray", arm_variance: "np.ndarray", arm_df: "np.ndarray"
) -> Readings:
    """Readings without noise of the differences; the variance of the arms is not moderated."""
    import numpy as np

    error, df = np.full((2, len(READINGS), *difference.shape), np.nan)
    moderated = np.stack([arm_variance, np.broadcast_to(arm_df, arm_variance.shape)]).astype(float)
    pooled_variance, pooled_df = np.zeros((2, len(difference)))
    return Readings(difference, error, df, gross, arm_variance, moderated, pooled_variance, pooled_df)


def _put(readings: Readings, reading: int, at: Any, squared_error: "np.ndarray", df: Any) -> None:
    readings.standard_error[reading][at] = squared_error**0.5
    readings.df[reading][at] = df


def _f_quantile(q: float, df: "np.ndarray", other_df: Any) -> "np.ndarray":
    from scipy.special import fdtri

    return fdtri(df, other_df, q)
