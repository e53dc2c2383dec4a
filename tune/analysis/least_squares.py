"""Least-squares fits of a phase's values: arm effects (one-way layout), or arm and seed effects (two-way layout)."""

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # numpy and scipy are imported lazily, so that `--help` stays fast
    import numpy as np

Values = dict[str, dict[int, float]]  # arm -> seed -> value of the finished trial

ROUNDING = 1e-12  # spreads and differences below this fraction of the largest value are rounding errors


class Contrast(NamedTuple):
    """One arm minus another."""

    difference: float
    standard_error: float
    half_width: float  # of the confidence interval
    p: float  # two-sided


@dataclass(frozen=True)
class LeastSquaresFit:
    """A fitted model. Var(effect_i - effect_k) is `variance` * (c_ii + c_kk - 2 c_ik) with c = `covariance`."""

    index: dict[str, int]  # of each arm's effect; arms with bit-identical values share an effect
    effects: "np.ndarray"  # (A,)
    covariance: "np.ndarray"  # unscaled, (A, A); or (A,) if it is diagonal
    residuals: "np.ndarray"  # (A, S), 0 for missing trials
    df: int
    rounding: float  # absolute size below which differences and spreads are rounding errors

    @property
    def variance(self) -> float:
        """The residual variance of one trial with `df` degrees of freedom; 0 if it is only rounding error."""
        variance = float((self.residuals**2).sum() / self.df)
        return variance if sqrt(variance) > self.rounding else 0.0

    def contrasts(self, reference: str, confidence: float) -> dict[str, Contrast]:
        """Compares each arm with `reference` by a t test with the pooled residual variance."""
        import numpy as np
        from scipy.special import stdtr, stdtrit

        k = self.index[reference]
        is_diagonal = self.covariance.ndim == 1
        own = self.covariance if is_diagonal else np.diag(self.covariance)
        shared = np.where(np.arange(len(own)) == k, own, 0.0) if is_diagonal else self.covariance[k]
        difference = self.effects - self.effects[k]
        difference[np.abs(difference) <= self.rounding] = 0.0
        standard_error = np.sqrt(self.variance * np.maximum(own + own[k] - 2 * shared, 0.0))
        if_exact = np.where(difference == 0, 0.0, np.inf)  # without noise, any difference is certain
        t = np.divide(difference, standard_error, out=if_exact, where=standard_error > 0)
        half_width = standard_error * stdtrit(self.df, 0.5 + confidence / 2)
        p = 2 * stdtr(self.df, -np.abs(t))
        columns = (difference.tolist(), standard_error.tolist(), half_width.tolist(), p.tolist())
        rows = [Contrast(*row) for row in zip(*columns, strict=True)]
        return {arm: rows[i] for arm, i in self.index.items()}


def fit_layouts(values: Values) -> tuple[LeastSquaresFit, LeastSquaresFit | None]:
    """Fits the one-way and the two-way layout to arms with at least two seeds.

    The two-way fit is None if it leaves no degrees of freedom or the seeds do not connect all arms.
    """
    import numpy as np

    distinct: dict[tuple[tuple[int, float], ...], int] = {}
    index = {arm: distinct.setdefault(tuple(sample.items()), len(distinct)) for arm, sample in values.items()}
    samples = [dict(items) for items in distinct]
    seeds = sorted(set().union(*samples))
    present = np.array([[seed in sample for seed in seeds] for sample in samples], dtype=float)  # (A, S)
    y = np.array([[sample.get(seed, 0.0) for seed in seeds] for sample in samples])
    rounding = ROUNDING * float(np.abs(y).max())
    y = present * (y - y.sum() / present.sum())  # centering avoids cancellation if all values share a large offset
    per_arm = present.sum(1)
    means = y.sum(1) / per_arm
    df = int(present.sum()) - len(samples)
    one_way = LeastSquaresFit(index, means, 1 / per_arm, present * (y - means[:, None]), df, rounding)
    df -= len(seeds) - 1
    if df < 1:
        return one_way, None
    if present.all():  # orthogonal: the effects are the means, so no (A, A) matrix is inverted
        residuals = y - means[:, None]
        return one_way, LeastSquaresFit(index, means, 1 / per_arm, residuals - residuals.mean(0), df, rounding)
    weights = present / present.sum(0)
    information = np.diag(per_arm) - weights @ present.T  # of the arms, with seeds eliminated (Yates 1936)
    if np.linalg.matrix_rank(information) < len(samples) - 1:  # the seeds do not connect all arms
        return one_way, None
    covariance = np.linalg.inv(information + 1 / len(samples))  # contrasts are the same as with the pseudo-inverse
    effects = covariance @ (y.sum(1) - weights @ y.sum(0))
    residuals = present * (y - effects[:, None])
    residuals -= weights * residuals.sum(0)
    return one_way, LeastSquaresFit(index, effects, covariance, residuals, df, rounding)
