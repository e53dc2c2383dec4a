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
from typing import TYPE_CHECKING, Literal, NamedTuple

from tune.analysis.readings import READINGS, NoisePrior, Readings, read_noise, read_unpaired_noise
from tune.analysis.variances import f_quantile, fit_prior, one_way_variance, paired_differences

if TYPE_CHECKING:  # numpy and scipy are imported lazily, so that `--help` stays fast
    import numpy as np

Values = dict[str, dict[int, float]]  # arm -> seed -> value of the finished trial
Method = Literal["paired", "unpaired"]

ROUNDING = 1e-12  # spreads and differences below this fraction of the largest value are rounding errors
UNUSUAL = 0.05  # share of phases with equal noise in which an arm is named for its spread
UNUSUAL_RATIO = 2.0  # standard deviations that differ by less are not named


class Contrast(NamedTuple):
    """One arm minus another."""

    difference: float
    standard_error: float
    half_width: float  # of the confidence interval
    p: float  # two-sided
    df: float
    reading: str  # of the noise, that these numbers are from: one of READINGS
    n: int  # seeds that were compared


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


def _prior_of(y: "np.ndarray", present: "np.ndarray", reference: int, readings: Readings) -> NoisePrior | None:
    """What the differences of a single phase say about those of a later one; None if there are none, or no noise.

    It is worth at most as many degrees of freedom as the phase has.
    """
    import numpy as np

    _, variance, n = paired_differences(y, present, reference, 0.0)
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
        low, high = (float(f_quantile(q, own_df, df[used].sum())) ** 0.5 for q in (tail, 1 - tail))
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
