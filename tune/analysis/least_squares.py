"""Least-squares fits of a phase's values: by arm (one-way layout), or by arm and seed (two-way layout)."""

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # numpy and scipy are imported where they are used, so that `--help` does not wait for them
    import numpy as np

Values = dict[str, dict[int, float]]  # arm -> seed -> finished value

ROUNDING = 1e-12  # spreads and differences below this share of the largest value are rounding errors, not noise


class Contrast(NamedTuple):
    """One arm minus another."""

    difference: float
    standard_error: float
    half_width: float  # of the confidence interval
    p: float  # two-sided


@dataclass(frozen=True)
class LeastSquaresFit:
    """A fitted layout. Var(effect_i - effect_k) is `variance` * (c_ii + c_kk - 2 c_ik) with c = `covariance`."""

    index: dict[str, int]  # of each arm's effect; arms that are equal bit for bit share one
    effects: "np.ndarray"  # (A,)
    covariance: "np.ndarray"  # unscaled: (A, A), or only the diagonal (A,) where the rest is 0
    residuals: "np.ndarray"  # (A, S), 0 where there is no trial
    df: int
    rounding: float  # differences and spreads below it are rounding errors

    @property
    def variance(self) -> float:
        """The residual variance of one trial on `df` degrees of freedom; 0 where it is only rounding."""
        variance = float((self.residuals**2).sum() / self.df)
        return variance if sqrt(variance) > self.rounding else 0.0

    def contrasts(self, reference: str, confidence: float) -> dict[str, Contrast]:
        """Each arm minus `reference`, by t tests with the pooled residual variance."""
        import numpy as np
        from scipy.special import stdtr, stdtrit

        k = self.index[reference]
        is_diagonal = self.covariance.ndim == 1
        own = self.covariance if is_diagonal else np.diag(self.covariance)
        shared = np.where(np.arange(len(own)) == k, own, 0.0) if is_diagonal else self.covariance[k]
        difference = self.effects - self.effects[k]
        difference[np.abs(difference) <= self.rounding] = 0.0
        standard_error = np.sqrt(self.variance * np.maximum(own + own[k] - 2 * shared, 0.0))
        if_exact = np.where(difference == 0, 0.0, np.inf)  # without noise a difference is certain
        t = np.divide(difference, standard_error, out=if_exact, where=standard_error > 0)
        half_width = standard_error * stdtrit(self.df, 0.5 + confidence / 2)
        p = 2 * stdtr(self.df, -np.abs(t))
        columns = (difference.tolist(), standard_error.tolist(), half_width.tolist(), p.tolist())
        rows = [Contrast(*row) for row in zip(*columns, strict=True)]
        return {arm: rows[i] for arm, i in self.index.items()}


def fit_layouts(values: Values) -> tuple[LeastSquaresFit, LeastSquaresFit | None]:
    """Fits the one-way and the two-way layout to arms with two seeds or more.

    The two-way fit is None where no degree of freedom is left, or the seeds do not link all arms.
    """
    import numpy as np

    distinct: dict[tuple[tuple[int, float], ...], int] = {}
    index = {arm: distinct.setdefault(tuple(sample.items()), len(distinct)) for arm, sample in values.items()}
    samples = [dict(items) for items in distinct]
    seeds = sorted(set().union(*samples))
    present = np.array([[seed in sample for seed in seeds] for sample in samples], dtype=float)  # (A, S)
    y = np.array([[sample.get(seed, 0.0) for seed in seeds] for sample in samples])
    rounding = ROUNDING * float(np.abs(y).max())
    y = present * (y - y.sum() / present.sum())  # keeps all digits where all values share a large level
    per_arm = present.sum(1)
    means = y.sum(1) / per_arm
    df = int(present.sum()) - len(samples)
    one_way = LeastSquaresFit(index, means, 1 / per_arm, present * (y - means[:, None]), df, rounding)
    df -= len(seeds) - 1
    if df < 1:
        return one_way, None
    if present.all():  # orthogonal: the effects are the means, and no matrix of thousands of arms is inverted
        residuals = y - means[:, None]
        return one_way, LeastSquaresFit(index, means, 1 / per_arm, residuals - residuals.mean(0), df, rounding)
    weights = present / present.sum(0)
    information = np.diag(per_arm) - weights @ present.T  # of the arms, seeds eliminated (Yates 1936)
    if np.linalg.matrix_rank(information) < len(samples) - 1:  # the seeds do not link all arms
        return one_way, None
    covariance = np.linalg.inv(information + 1 / len(samples))  # its contrasts are those of the pseudo-inverse
    effects = covariance @ (y.sum(1) - weights @ y.sum(0))
    residuals = present * (y - effects[:, None])
    residuals -= weights * residuals.sum(0)
    return one_way, LeastSquaresFit(index, effects, covariance, residuals, df, rounding)
