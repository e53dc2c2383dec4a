"""Reads the noise of the differences of a phase in four ways; `tune/analysis/noise.py` explains them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tune.analysis.variances import (
    GROSS,
    arm_variances,
    f_quantile,
    fit_prior,
    gross_scatterers,
    moderate,
    paired_differences,
    sum_with,
    two_way_residuals,
)

if TYPE_CHECKING:  # numpy and scipy are imported lazily, so that `--help` stays fast
    import numpy as np

READINGS = ("pooled", "moderated", "arm", "own")
POOLED, MODERATED, ARM, OWN = range(4)


class NoisePrior(NamedTuple):
    """What other arms say about the variance of a difference: a scaled inverse chi-squared distribution."""

    df: float
    variance: float  # of arm minus baseline on one seed


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

    difference, variance, n = paired_differences(y, present, reference, rounding)
    residuals, df = two_way_residuals(y, present)
    gross = gross_scatterers(residuals, present, reference, rounding)
    if prior is not None:
        gross |= (variance > f_quantile(GROSS, n - 1, prior.df) * prior.variance) & (np.arange(len(n)) != reference)
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
            moderated, moderated_df = moderate(own, own_df, *fit_prior(own[:, others], own_df[others]))
            moderated_df = np.minimum(moderated_df, df)
        else:
            borrowed = (np.full(len(rows), number) for number in prior)
            moderated, moderated_df = moderate(own, own_df, *borrowed)
        _put(readings, MODERATED, at, moderated / n[kept], moderated_df)
        readings.standard_error[OWN][at] = np.nan
        if len(kept) < 3:
            continue
        _put(readings, POOLED, at, 2 * pooled[:, None] / n[kept], df)
        arm_df = present[kept].sum(1) - 1
        of_arm = readings.arm_variance[at]
        of_arm, arm_df = moderate(of_arm, arm_df, *fit_prior(of_arm, arm_df))
        arm_df = np.minimum(arm_df, df)
        readings.moderated[np.ix_(np.arange(2), rows, kept)] = of_arm, arm_df
        _put(readings, ARM, at, *sum_with(k, of_arm / n[kept], arm_df))
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
    gross = variance > f_quantile(GROSS, n - 1, n.sum() - len(n) - (n - 1)) * others
    gross &= (arms != reference) & (len(n) > 2)
    readings = _empty_readings(difference, gross, variance, n - 1)
    _put(readings, OWN, ..., *sum_with(reference, variance / n, n - 1))
    for pattern in np.unique(gross, axis=0):
        rows, kept = np.flatnonzero((gross == pattern).all(1)), np.flatnonzero(~pattern)
        at, df = np.ix_(rows, kept), n[kept].sum() - len(kept)
        pooled = squares[at].sum(1) / df
        pooled[pooled <= rounding**2] = 0.0
        readings.pooled_variance[rows], readings.pooled_df[rows] = pooled, df
        if len(kept) > 1:
            _put(readings, POOLED, at, pooled[:, None] * (1 / n[kept] + 1 / n[reference]), df)
        if len(kept) > 2:
            of_arm, arm_df = moderate(variance[at], n[kept] - 1, *fit_prior(variance[at], n[kept] - 1))
            k, arm_df = int(np.flatnonzero(kept == reference)[0]), np.minimum(arm_df, df)
            readings.moderated[np.ix_(np.arange(2), rows, kept)] = of_arm, arm_df
            _put(readings, ARM, at, *sum_with(k, of_arm / n[kept], arm_df))
            readings.standard_error[OWN][at] = np.nan
    return readings


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
