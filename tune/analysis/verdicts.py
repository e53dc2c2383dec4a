"""Verdicts: which arms of a phase differ from its baseline by more than noise, and by how much.

Each value is modeled as arm effect + seed effect + noise: the two-way layout without replication (Fisher 1925), fitted
by least squares as an incomplete block design with seeds as blocks (Yates 1936), so arms may lack seeds. The noise is
pooled over all arms: 12 arms with 3 seeds leave 22 degrees of freedom, where a single paired test has 2. With two
complete arms this is the paired t test (Student 1908); without seed effects ("pooled") it is the two-sample t test.
P-values are corrected by Holm's method (1979).

Only arms that finished all their seeds, at least two, are compared. Judging the others by their surviving seeds would
be biased: they get no delta and do not affect the other arms. Arms that were stopped early count as comparisons with
p = 1 in Holm's correction, since they were compared before the end and dropped. The baseline is compared with the seeds
that it finished. A seed that an arm was not planned with (five baseline repeats, three seeds per arm) makes the design
unbalanced, not incomplete. Arms with bit-identical values count once in the noise. If there is no noise, a nonzero
delta has p 0 and an interval of width 0; a delta of 0 has p 1.

Pairing is valid for any correlation of the arms over seeds; pooling gains some degrees of freedom if there is no
correlation. But choosing the method from the same data adds false positives: with 2 arms x 5 seeds and no effects,
6.8 % of phases have a false verdict if they are pooled whenever the measured correlation is <= 0. With five or more
arms, the slack in Holm's correction absorbs this. So `auto` pools arms that share too few seeds to be paired, and five
or more arms whose correlation is between 0 and half of its lowest possible value, -1 / (arms - 1). Below that, the true
correlation may be negative, and pooled intervals would be too narrow. In simulations without true effects, 4.4 % of
phases with 5 arms x 8 seeds and 3.8 % with 12 x 3 have a false verdict. A `method` that is fixed beforehand is valid
for any number of arms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import floor, fsum, log10, sqrt
from statistics import fmean
from typing import Literal

from tune.analysis.least_squares import ROUNDING, LeastSquaresFit, Values, fit_layouts
from tune.storage.records import TrialOutcome
from tune.storage.summaries import ArmSummary, Delta, Spread

Method = Literal["paired", "pooled"]
Outcomes = Mapping[str, Mapping[int, TrialOutcome]]  # arm -> seed -> outcome
Verdict = Literal["baseline", "better", "worse", "tie", "diverged", "failed", "incomplete", "no claim"]

MIN_ARMS_TO_POOL = 5  # with fewer arms, `auto` does not choose by the correlation
MAX_VALUE = 1e100  # squares of larger values overflow
POWER_QUANTILE = 0.84  # standard normal quantile of 80 % power
RANK_OF_EXCLUDED = {"incomplete": 1, "failed": 2, "diverged": 3}  # after the arms that finished


@dataclass(frozen=True)
class Judgement:
    """The verdicts on a phase: its arms, best first, and the noise that they were compared with.

    `noise_sd` and `df` belong to `method`, or to the one-way layout if no arms are compared (method None).
    `correlation` is the intraclass correlation of the arms over seeds: the share of the variance that pairing removes.
    `smallest_detectable` is the true effect that passes Holm's first step and `min_effect` with 80 % power.
    """

    arms: list[ArmSummary]  # without measurements other than the metric
    winner: str
    why: str
    method: Method | None
    df: int | None
    noise_sd: float | None
    correlation: float | None
    smallest_detectable: float | None
    warnings: list[str]


def judge(
    outcomes: Outcomes,
    *,
    baseline: str,
    goal: Literal["minimize", "maximize"] = "minimize",
    confidence: float = 0.95,
    min_effect: float = 0.005,
    metric: str = "val_loss",
    method: Method | Literal["auto"] = "auto",
) -> Judgement:
    """Compares every arm of a phase with its baseline; the module docstring describes the method.

    An arm is `better` or `worse` if its Holm-corrected p is below `1 - confidence` and its delta, in units of the
    metric, is at least `min_effect`; otherwise it is a `tie`. `metric` is the name of the values in messages.
    """
    if baseline not in outcomes or not 0 < confidence < 1:
        raise ValueError(f"baseline {baseline!r} must be one of {sorted(outcomes)}, 0 < confidence={confidence} < 1")
    sign, alpha = {"minimize": 1.0, "maximize": -1.0}[goal], 1 - confidence
    values, excluded, warnings = _finished_values(outcomes, baseline)
    compared = {a: v for a, v in values.items() if len(v) > 1 and (a == baseline or a not in excluded)}
    one_way, two_way = fit_layouts(compared) if compared else (None, None)
    correlation = _intraclass_correlation(one_way, two_way)

    chosen, fit, deltas, detectable = None, one_way, dict[str, Delta](), None
    if one_way and baseline in compared and len(compared) > 1:
        chosen = _choose_method(method, two_way, correlation)
        fit = two_way if two_way and chosen == "paired" else one_way
        if two_way is None and method != "pooled" and len(fit.effects) > 1:
            warnings.append("the arms share too few seeds to be paired: compared by the pooled spread")
        warnings += _noise_warnings(fit, compared)
        n_stopped = sum("stopped" in {outcome.status for outcome in row.values()} for row in outcomes.values())
        deltas, detectable = _deltas(fit, baseline, confidence, n_stopped, min_effect)

    spread_df = _spread_df(one_way, two_way) if one_way else 0.0
    level = fmean(values[baseline].values() or [0.0])
    arms, difference = [], {}  # arm mean minus baseline mean, to sort the arms
    for arm, sample in values.items():
        difference[arm] = deltas[arm].mean if arm in deltas else fmean(sample.values() or [level]) - level
        if arm not in {baseline, *deltas, *excluded} and values[baseline]:
            deltas[arm] = Delta(difference[arm])
        verdict = excluded.get(arm) or _verdict(deltas.get(arm), sign, alpha, min_effect * (1 - 1e-9))
        verdict = "baseline" if arm == baseline else verdict
        score = _spread(sample, one_way, spread_df, confidence)
        arms.append(ArmSummary(arm, n=len(sample), score=score, delta=deltas.get(arm), verdict=verdict))
    arms.sort(key=lambda arm: (sign * difference[arm.arm], arm.arm != baseline, arm.arm))
    arms.sort(key=lambda arm: RANK_OF_EXCLUDED.get(arm.verdict, not arm.n))
    winner = next((arm.arm for arm in arms if arm.verdict == "better"), baseline)
    if fit and chosen:
        contrasts = fit.contrasts(winner, confidence)
        tied = {arm for arm, contrast in contrasts.items() if abs(contrast.difference) <= contrast.half_width}
        arms = [replace(arm, tied_with_winner=arm.arm in tied - {winner}) for arm in arms]
    why = _why(arms, winner, metric, chosen, alpha, detectable or 0.0)
    df, sd = (fit.df, sqrt(fit.variance)) if fit else (None, None)
    return Judgement(arms, winner, why, chosen, df, sd, correlation, detectable, warnings)


def smallest_detectable_effect(
    n_seeds: int, n_arms: int, noise_sd: float, *, method: Method = "paired", confidence: float = 0.95
) -> float | None:
    """The true effect that a phase of `n_arms`, baseline included, detects with 80 % power; None if there is none.

    Such an effect passes Holm's first step, by the noncentral t distribution. `noise_sd` comes from an earlier phase.
    """
    if n_seeds < 2 or n_arms < 2:
        return None
    df = (n_seeds - 1) * (n_arms - (method == "paired"))
    return noise_sd * sqrt(2 / n_seeds) * _noncentrality(df, (1 - confidence) / (n_arms - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: multiplies the k-th smallest of m p-values by m - k + 1; monotone, at most 1."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted = accumulate((min(1.0, (len(p) - k) * p[i]) for k, i in enumerate(order)), max)
    return [value for _, value in sorted(zip(order, adjusted, strict=True))]


def _finished_values(outcomes: Outcomes, baseline: str) -> tuple[Values, dict[str, Verdict], list[str]]:
    """Returns the finished values by arm, the verdicts of arms that are not compared, and warnings.

    All are sorted, so that floating-point sums do not depend on the order in which trials finished.
    """
    values, excluded, warnings = Values(), dict[str, Verdict](), []
    for arm in sorted(outcomes, key=lambda name: (name != baseline, name)):
        statuses = {outcome.status for outcome in outcomes[arm].values()}
        finished = {seed: o.value for seed, o in sorted(outcomes[arm].items()) if o.status == "finished"}
        values[arm] = {seed: float(x) for seed, x in finished.items() if x is not None and abs(x) < MAX_VALUE}  # no NaN
        if unusable := sorted(finished.keys() - values[arm].keys()):
            warnings.append(f"{arm}: finished without a finite value with seeds {unusable}, taken as missing")
        if len(values[arm]) < len(outcomes[arm]) or not outcomes[arm]:
            excluded[arm] = "diverged" if "diverged" in statuses else "failed" if "failed" in statuses else "incomplete"
    if baseline in excluded and values[baseline]:
        warnings.append(f"the baseline lost seeds ({excluded[baseline]}): only the finished ones are compared")
    return values, excluded, warnings


def _intraclass_correlation(one_way: LeastSquaresFit | None, two_way: LeastSquaresFit | None) -> float | None:
    if not (one_way and two_way and one_way.variance and len(two_way.effects) > 1):
        return None
    return max(-1.0, min(1.0, 1 - two_way.variance / one_way.variance))


def _choose_method(method: str, two_way: LeastSquaresFit | None, correlation: float | None) -> Method:
    """Chooses `paired` unless it is impossible, not requested, or `auto` finds no correlation among enough arms."""
    if two_way is None or method == "pooled":
        return "pooled"
    n_arms = len(two_way.effects)
    if method != "auto" or n_arms < MIN_ARMS_TO_POOL or correlation is None:
        return "paired"
    return "pooled" if -0.5 / (n_arms - 1) < correlation <= ROUNDING else "paired"


def _deltas(
    fit: LeastSquaresFit, baseline: str, confidence: float, n_stopped: int, min_effect: float
) -> tuple[dict[str, Delta], float]:
    """The deltas of all compared arms, and the smallest detectable effect. `n_stopped` counts arms stopped early."""
    contrasts = {arm: contrast for arm, contrast in fit.contrasts(baseline, confidence).items() if arm != baseline}
    adjusted = holm([contrast.p for contrast in contrasts.values()] + [1.0] * n_stopped)
    deltas = {
        arm: Delta(c.difference, c.difference - c.half_width, c.difference + c.half_width, c.p, p_holm)
        for (arm, c), p_holm in zip(contrasts.items(), adjusted[: len(contrasts)], strict=True)
    }
    se = max(contrast.standard_error for contrast in contrasts.values())
    detectable = se * _noncentrality(fit.df, (1 - confidence) / (len(contrasts) + n_stopped))
    return deltas, max(detectable, min_effect + POWER_QUANTILE * se)


def _spread_df(one_way: LeastSquaresFit, two_way: LeastSquaresFit | None) -> float:
    """Satterthwaite's degrees of freedom of the one-way variance, which is the sum of a seed and a residual part."""
    if two_way is None or not one_way.variance:
        return one_way.df
    total, residual = (float((fit.residuals**2).sum()) for fit in (one_way, two_way))
    return total**2 / ((total - residual) ** 2 / (one_way.df - two_way.df) + residual**2 / two_way.df)


def _noise_warnings(fit: LeastSquaresFit, values: Values) -> list[str]:
    """Warns of unequal seeds, identical arms, no noise, and arms with larger variance (F test, Bonferroni, 1 %)."""
    import numpy as np
    from scipy.special import fdtrc

    warnings, first = [], {i: arm for arm, i in reversed(fit.index.items())}
    if len({tuple(sample) for sample in values.values()}) > 1:
        warnings.append("the arms ran different seeds: a least-squares delta is not the difference of the means")
    for arm, i in fit.index.items():
        if arm != first[i]:
            warnings.append(f"{arm}: every result equals that of {first[i]}; what varies has no effect")
    if not fit.variance:
        warnings.append("no noise between seeds: does the seed reach the run? A p of 0 means only that")
    elif len(first) > 2:
        squares = (fit.residuals**2).sum(1)
        arm_df = np.array([len(values[first[i]]) - 1 for i in sorted(first)])
        df = fit.df * arm_df / arm_df.sum()  # each arm's share of the degrees of freedom
        ratio = squares / df * (fit.df - df) / np.maximum(squares.sum() - squares, ROUNDING * squares.sum())
        for i in np.flatnonzero((fdtrc(arm_df, fit.df - df, ratio) * len(first) < 0.01) & (arm_df > 1)).tolist():
            factor = f"{sqrt(ratio[i]):.1f} times as much as the other arms"
            warnings.append(f"{first[i]} scatters {factor}: its own interval is too narrow, theirs are too wide")
    return warnings


def _noncentrality(df: int, alpha: float) -> float:
    """The true effect, in standard errors, that is significant with 80 % power (neglecting the opposite tail)."""
    from scipy.special import nctdtrinc, stdtrit

    return float(nctdtrinc(df, 0.2, -stdtrit(df, alpha / 2)))


def _verdict(delta: Delta | None, sign: float, alpha: float, min_effect: float) -> Verdict:
    if delta is None or delta.p_holm is None:
        return "no claim"
    if delta.p_holm >= alpha or abs(delta.mean) < min_effect:
        return "tie"
    return "better" if sign * delta.mean < 0 else "worse"


def _spread(sample: dict[int, float], one_way: LeastSquaresFit | None, df: float, confidence: float) -> Spread:
    """Mean and standard deviation of an arm over its seeds, and the confidence interval of the mean.

    The interval uses the pooled variance of the one-way layout (all arms around their own means), so that an arm with
    one seed has an interval too. `df` are Satterthwaite's degrees of freedom (1946): if seeds shift all arms alike,
    many arms do not make up for few seeds.
    """
    from scipy.special import stdtrit

    n, mean, low, high = len(sample), fmean(sample.values() or [0.0]), None, None
    sd = sqrt(fsum((x - mean) ** 2 for x in sample.values()) / (n - 1)) if n > 1 else None
    if n and one_way:
        half_width = sqrt(one_way.variance / n) * float(stdtrit(df, 0.5 + confidence / 2))
        low, high = mean - half_width, mean + half_width
    return Spread(mean if n else None, sd, low, high)


def _why(arms: list[ArmSummary], winner: str, metric: str, method: str | None, alpha: float, detectable: float) -> str:
    """The result of the phase in one sentence, rounded to two digits of the interval's half-width."""
    others = [arm for arm in arms if arm.verdict != "baseline"]
    judged = [(arm, arm.delta) for arm in others if arm.delta and arm.delta.p is not None]
    if not judged:
        verdicts = [arm.verdict for arm in others]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts)))
        if "no claim" not in verdicts:
            return f"no other arm finished all its seeds ({counts or 'there are no others'}), so the baseline stays"
        why = "a comparison needs two seeds of both" if any(arm.n > 1 for arm in arms) else "one seed per arm"
        return f"{why}: no claim can be made, the baseline stays"
    best, delta = next((pair for pair in judged if pair[0].arm == winner), judged[0])
    seeds = f"{best.n} paired seeds" if method == "paired" else f"{best.n} seeds, pooled spread"
    low, high, p = delta.ci_low or 0.0, delta.ci_high or 0.0, delta.p_holm or 0.0
    digits = min(max(1 - floor(log10((high - low) / 2 or abs(delta.mean) / 10 or 1.0)), 0), 12)
    verb, low, high = ("raises", low, high) if delta.mean > 0 else ("lowers", 0.0 - high, 0.0 - low)
    verb = verb if delta.mean else "changes"
    text = f"{best.arm} {verb} {metric} by {abs(delta.mean):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    text += f" ({seeds}, Holm p {p:.2g})"
    if best.arm != winner:
        bar = "by min_effect" if best.verdict == "tie" and p < alpha else "beyond the noise"
        power = f"an effect of {detectable:.2g} would be found in 4 of 5 such phases"
        return f"no arm is better than the baseline {bar}, so the baseline stays; {text}; {power}"
    tied = [arm.arm for arm, _ in judged if arm.tied_with_winner]
    separator = "; " if any("," in name for name in tied) else ", "  # a name may contain a list
    names = separator.join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    return text + (f"; {names} {'is' if len(tied) == 1 else 'are'} not distinguishable from it" if tied else "")
