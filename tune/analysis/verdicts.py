"""Verdicts: which arms of a phase differ from its baseline beyond the noise, and by how much.

A value is arm + seed + noise: the two-way layout without replication (Fisher 1925), fitted by least squares as an
incomplete block design with seeds as blocks (Yates 1936), so arms may lack seeds. The noise is pooled over all arms:
12 arms x 3 seeds leave 22 degrees of freedom where a lone paired test has 2. With two complete arms this is the paired
t test (Student 1908); without seed effects, "pooled", the two-sample one. P-values are corrected after Holm (1979).

Only arms whose seeds all finished, two at least, take part. Others would be judged by their surviving seeds: they get
no delta, and change nothing for the rest. But arms that were stopped early were compared, by what they had reached, and
dropped: Holm counts them as comparisons with p 1, since the arms that are left were chosen among all. The baseline, the
yardstick, takes part with what it finished. A seed that an arm does not name was not planned (five baseline repeats,
three seeds per arm): unbalanced, not incomplete. Arms equal bit for bit count once in the noise. Without noise any
delta has p 0 and a point interval; a delta of 0 has p 1.

Paired is right whatever the correlation of the arms over seeds; pooled gains some degrees of freedom where there is
none. But choosing by the same data costs error: 2 arms x 5 seeds without effect err in 6.8 % of phases if a measured
correlation <= 0 means pooled. From five arms on Holm's slack pays for it. So `auto` pools arms that share too few seeds
to be paired, and five or more with a correlation from 0 down to half of its least possible value, -1 / (arms - 1);
below, it may be truly negative, and pooled intervals too narrow. Simulated without effects, 4.4 % of phases of 5 x 8
err, 3.8 % of 12 x 3. `method` settles it beforehand, which is right for any number of arms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import floor, fsum, log10, sqrt
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from tune.storage.records import TrialOutcome

if TYPE_CHECKING:  # numpy and scipy are imported where they are used: `--help` must not pay for them
    import numpy as np

Method = Literal["paired", "pooled"]
Outcomes = Mapping[str, Mapping[int, "TrialOutcome"]]  # arm -> seed -> outcome
Values = dict[str, dict[int, float]]  # arm -> seed -> finished value
Verdict = Literal["baseline", "better", "worse", "tie", "diverged", "failed", "incomplete", "no claim"]

POOLABLE = 5  # arms from which on the data may choose the method
ROUNDING = 1e-12  # spreads and deltas below this share of the largest value are rounding, not noise
LARGEST = 1e100  # squares of larger values overflow
LAST = {"incomplete": 1, "failed": 2, "diverged": 3}  # their order after the arms that finished


@dataclass(frozen=True)
class Delta:
    """Arm minus baseline: unadjusted interval, raw and Holm-corrected two-sided p; only the mean under `no claim`."""

    mean: float
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class ArmVerdict:
    """One arm: `n` finished seeds, their mean and sample sd, and what can be said against the baseline.

    The mean's interval has the spread of the one-way layout (all arms around their own means): one seed has one too.
    Its degrees of freedom are Satterthwaite's (1946): seeds that move all arms alike stay few, however many the arms.
    `tied_with_winner`: the unadjusted interval of arm minus winner holds 0; False for the winner itself.
    """

    arm: str
    n: int
    mean: float | None
    sd: float | None
    ci_low: float | None
    ci_high: float | None
    delta: Delta | None
    verdict: Verdict
    tied_with_winner: bool


@dataclass(frozen=True)
class Judgement:
    """A phase: arms best first, and the noise they were judged by.

    `noise_sd` and `df` are those of `method`; where nothing is compared (method None), of the one-way layout.
    `correlation` is the intraclass correlation of the arms over seeds: the share of the variance that pairing removes.
    `smallest_detectable` is the true effect that gets past Holm's first step and `min_effect` with 80 % power.
    """

    arms: list[ArmVerdict]
    winner: str
    why: str
    method: Method | None
    df: int | None
    noise_sd: float | None
    correlation: float | None
    smallest_detectable: float | None
    warnings: list[str]


@dataclass(frozen=True)
class LeastSquaresFit:
    """A fitted layout: the arms' effects, and c in var(effect_i - effect_k) = variance * (c_ii + c_kk - 2 c_ik)."""

    row: dict[str, int]  # of each arm; arms that are equal bit for bit share one
    effects: "np.ndarray"  # (A,)
    c: "np.ndarray"  # (A, A), or only its diagonal (A,) where the rest is 0
    residuals: "np.ndarray"  # (A, S), 0 where there is no trial
    df: int
    tiny: float  # what is rounding

    @property
    def variance(self) -> float:
        """Of one trial around the fit, on `df` degrees of freedom; 0 where it is no more than rounding."""
        variance = float((self.residuals**2).sum() / self.df)
        return variance if sqrt(variance) > self.tiny else 0.0

    def against(self, other: str, confidence: float) -> dict[str, tuple[float, ...]]:
        """Each arm minus `other`: the difference, its standard error, half-width of its interval, two-sided p."""
        import numpy as np
        from scipy.special import stdtr, stdtrit

        k = self.row[other]
        own = self.c if self.c.ndim == 1 else np.diag(self.c)
        common = self.c[k] if self.c.ndim == 2 else np.where(np.arange(len(own)) == k, own, 0.0)
        delta = self.effects - self.effects[k]
        delta[np.abs(delta) <= self.tiny] = 0.0
        se = np.sqrt(self.variance * np.maximum(own + own[k] - 2 * common, 0.0))
        t = np.divide(delta, se, out=np.where(delta == 0, 0.0, np.inf), where=se > 0)
        half, p = se * stdtrit(self.df, 0.5 + confidence / 2), 2 * stdtr(self.df, -np.abs(t))
        columns = list(zip(delta.tolist(), se.tolist(), half.tolist(), p.tolist(), strict=True))
        return {arm: columns[i] for arm, i in self.row.items()}


def judge(
    cells: Outcomes,
    *,
    baseline: str,
    goal: Literal["minimize", "maximize"] = "minimize",
    confidence: float = 0.95,
    min_effect: float = 0.005,
    metric: str = "val_loss",
    method: Method | Literal["auto"] = "auto",
) -> Judgement:
    """Compares every arm of a phase (arm -> seed -> outcome) with its baseline; the module's docstring says how.

    An arm is `better` or `worse` when its Holm-corrected p is below `1 - confidence` and its delta, in units of the
    metric, is at least `min_effect`; else it is a `tie`. `metric` is the name of the values, for the sentences.
    """
    if baseline not in cells or not 0 < confidence < 1:
        raise ValueError(f"baseline {baseline!r} must be one of {sorted(cells)}, 0 < confidence={confidence} < 1")
    sign, alpha = {"minimize": 1.0, "maximize": -1.0}[goal], 1 - confidence
    values, excluded, warnings = _read(cells, baseline)
    fitted = {a: v for a, v in values.items() if len(v) > 1 and (a == baseline or a not in excluded)}
    one_way, paired = _layouts(fitted) if fitted else (None, None)
    correlation = None
    if one_way and paired and one_way.variance and len(paired.effects) > 1:
        correlation = max(-1.0, min(1.0, 1 - paired.variance / one_way.variance))

    used, layout, deltas, detected = None, one_way, dict[str, Delta](), None
    if one_way and baseline in fitted and len(fitted) > 1:
        used = _choose(method, paired, correlation)
        layout = paired if paired and used == "paired" else one_way
        if paired is None and method != "pooled" and len(layout.effects) > 1:
            warnings.append("the arms share too few seeds to be paired: compared by the pooled spread")
        warnings += _noise_warnings(layout, fitted)
        table = {a: columns for a, columns in layout.against(baseline, confidence).items() if a != baseline}
        dropped = [1.0 for row in cells.values() if "stopped" in {cell.status for cell in row.values()}]
        corrected = holm([c[3] for c in table.values()] + dropped)[: len(table)]
        for (a, (d, _, half, p)), adjusted in zip(table.items(), corrected, strict=True):
            deltas[a] = Delta(d, d - half, d + half, p, adjusted)
        se = max(columns[1] for columns in table.values())
        detected = max(
            se * _noncentrality(layout.df, alpha / (len(table) + len(dropped))), min_effect + 0.84 * se
        )  # z of 80 %

    spread_df = _spread_df(one_way, paired) if one_way else 0.0
    arms, gaps, origin = [], {}, fmean(values[baseline].values() or [0.0])
    for a, sample in values.items():
        gaps[a] = deltas[a].mean if a in deltas else fmean(sample.values() or [origin]) - origin
        if a not in {baseline, *deltas, *excluded} and values[baseline]:
            deltas[a] = Delta(gaps[a])
        verdict = excluded.get(a) or _verdict(deltas.get(a), sign, alpha, min_effect * (1 - 1e-9))
        verdict = "baseline" if a == baseline else verdict
        arms.append(_arm(a, sample, one_way, spread_df, confidence, deltas.get(a), verdict))
    arms.sort(key=lambda arm: (LAST.get(arm.verdict, not arm.n), sign * gaps[arm.arm], arm.arm != baseline, arm.arm))
    winner = next((arm.arm for arm in arms if arm.verdict == "better"), baseline)
    if layout and used:
        tied = {a for a, (d, _, half, _) in layout.against(winner, confidence).items() if abs(d) <= half}
        arms = [replace(arm, tied_with_winner=arm.arm in tied - {winner}) for arm in arms]
    why = _why(arms, winner, metric, used, alpha, detected or 0.0)
    df, sd = (layout.df, sqrt(layout.variance)) if layout else (None, None)
    return Judgement(arms, winner, why, used, df, sd, correlation, detected, warnings)


def smallest_detectable_effect(
    n_seeds: int, n_arms: int, noise_sd: float, *, method: Method = "paired", confidence: float = 0.95
) -> float | None:
    """The true effect that a phase of `n_arms` with the baseline finds with 80 % power; None where it finds nothing.

    `noise_sd` is `Judgement.noise_sd` of an earlier phase, for the same method. The effect must get past Holm's first
    step (`1 - confidence` divided by the comparisons), by the noncentral t distribution.
    """
    if n_seeds < 2 or n_arms < 2:
        return None
    df = (n_seeds - 1) * (n_arms - (method == "paired"))
    return noise_sd * sqrt(2 / n_seeds) * _noncentrality(df, (1 - confidence) / (n_arms - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of m p-values times m - k + 1, never decreasing, at most 1."""
    order = sorted(range(len(p)), key=p.__getitem__)
    steps = accumulate((min(1.0, (len(p) - k) * p[i]) for k, i in enumerate(order)), max)
    return [adjusted for _, adjusted in sorted(zip(order, steps, strict=True))]


def _read(cells: Outcomes, baseline: str) -> tuple[Values, dict[str, Verdict], list[str]]:
    """Finished values, and arms with other seeds too; sorted, so that no sum depends on the order of the cells."""
    values, excluded, warnings = Values(), dict[str, Verdict](), []
    for arm in sorted(cells, key=lambda name: (name != baseline, name)):
        seen = {cell.status for cell in cells[arm].values()}
        done = {seed: cell.value for seed, cell in sorted(cells[arm].items()) if cell.status == "finished"}
        values[arm] = {seed: float(x) for seed, x in done.items() if x is not None and abs(x) < LARGEST}  # no NaN
        if unusable := sorted(done.keys() - values[arm].keys()):
            warnings.append(f"{arm}: finished without a finite value with seeds {unusable}, taken as missing")
        if len(values[arm]) < len(cells[arm]) or not cells[arm]:
            excluded[arm] = "diverged" if "diverged" in seen else "failed" if "failed" in seen else "incomplete"
    if baseline in excluded and values[baseline]:
        warnings.append(f"the baseline lost seeds ({excluded[baseline]}): only the finished ones are compared")
    return values, excluded, warnings


def _layouts(fitted: Values) -> tuple[LeastSquaresFit | None, LeastSquaresFit | None]:
    """The one-way and the two-way layout; None where no degree of freedom is left or seeds do not link all arms."""
    import numpy as np

    distinct: dict[tuple[tuple[int, float], ...], int] = {}
    row = {arm: distinct.setdefault(tuple(sample.items()), len(distinct)) for arm, sample in fitted.items()}
    samples = [dict(items) for items in distinct]
    seeds = sorted(set().union(*samples))
    has = np.array([[seed in sample for seed in seeds] for sample in samples], dtype=float)  # (A, S)
    y = np.array([[sample.get(seed, 0.0) for seed in seeds] for sample in samples])
    tiny = ROUNDING * float(np.abs(y).max())
    y = has * (y - y.sum() / has.sum())  # no digits are lost to a large common level
    per_arm, share = has.sum(1), has / has.sum(0)
    means, df = y.sum(1) / per_arm, int(has.sum()) - len(samples)
    one_way = LeastSquaresFit(row, means, 1 / per_arm, has * (y - means[:, None]), df, tiny)
    df -= len(seeds) - 1
    if df < 1:
        return one_way, None
    if has.all():  # orthogonal: the effects are the means, and no matrix of thousands of arms has to be inverted
        rest = y - means[:, None]
        return one_way, LeastSquaresFit(row, means, 1 / per_arm, rest - rest.mean(0), df, tiny)
    information = np.diag(per_arm) - share @ has.T  # about the arms, seeds eliminated (Yates)
    if np.linalg.matrix_rank(information) < len(samples) - 1:  # seeds do not link all arms
        return one_way, None
    c = np.linalg.inv(information + 1 / len(samples))  # its contrasts are those of the pseudo-inverse
    effects = c @ (y.sum(1) - share @ y.sum(0))
    rest = has * (y - effects[:, None])
    return one_way, LeastSquaresFit(row, effects, c, rest - share * rest.sum(0), df, tiny)


def _spread_df(one_way: LeastSquaresFit, paired: LeastSquaresFit | None) -> float:
    """Degrees of freedom of the one-way variance as the sum of its parts, between seeds and what pairing leaves."""
    if paired is None or not one_way.variance:
        return one_way.df
    total, noise = (float((layout.residuals**2).sum()) for layout in (one_way, paired))
    return total**2 / ((total - noise) ** 2 / (one_way.df - paired.df) + noise**2 / paired.df)


def _choose(method: str, paired: LeastSquaresFit | None, correlation: float | None) -> Method:
    """Paired, unless it is impossible, not wanted, or brings nothing where there are arms enough to say so."""
    if paired is None or method != "auto" or len(paired.effects) < POOLABLE or correlation is None:
        return "pooled" if paired is None or method == "pooled" else "paired"
    return "pooled" if -0.5 / (len(paired.effects) - 1) < correlation <= ROUNDING else "paired"


def _noise_warnings(layout: LeastSquaresFit, fitted: Values) -> list[str]:
    """Unequal seeds, equal arms, no noise, an arm that scatters more than the rest (F test, Bonferroni, 1 %)."""
    import numpy as np
    from scipy.special import fdtrc

    warnings, first = [], {i: arm for arm, i in reversed(layout.row.items())}
    if len({tuple(sample) for sample in fitted.values()}) > 1:
        warnings.append("the arms ran different seeds: a least-squares delta is not the difference of the means")
    for arm, twin in ((arm, first[i]) for arm, i in layout.row.items() if arm != first[i]):
        warnings.append(f"{arm}: every result equals that of {twin}; what varies has no effect")
    if not layout.variance:
        warnings.append("no noise between seeds: does the seed reach the run? A p of 0 says no more than that")
    elif len(first) > 2:
        square, spare = (layout.residuals**2).sum(1), np.array([len(fitted[first[i]]) - 1 for i in sorted(first)])
        own = layout.df * spare / spare.sum()  # each arm's part of the degrees of freedom
        ratio = square / own * (layout.df - own) / np.maximum(square.sum() - square, ROUNDING * square.sum())
        for i in np.flatnonzero((fdtrc(spare, layout.df - own, ratio) * len(first) < 0.01) & (spare > 1)).tolist():
            times = f"{sqrt(ratio[i]):.1f} times as much as the other arms"
            warnings.append(f"{first[i]} scatters {times}: its own interval is too narrow, theirs are too wide")
    return warnings


def _noncentrality(df: int, alpha: float) -> float:
    """How many standard errors a true effect must measure to be significant with 80 % power (far tail left out)."""
    from scipy.special import nctdtrinc, stdtrit

    return float(nctdtrinc(df, 0.2, -stdtrit(df, alpha / 2)))


def _verdict(delta: Delta | None, sign: float, alpha: float, least: float) -> Verdict:
    if delta is None or delta.p_holm is None:
        return "no claim"
    if delta.p_holm >= alpha or abs(delta.mean) < least:
        return "tie"
    return "better" if sign * delta.mean < 0 else "worse"


def _arm(
    arm: str,
    sample: dict[int, float],
    noise: LeastSquaresFit | None,
    df: float,
    confidence: float,
    delta: Delta | None,
    verdict: Verdict,
) -> ArmVerdict:
    from scipy.special import stdtrit

    n, mean, low, high = len(sample), fmean(sample.values() or [0.0]), None, None
    sd = sqrt(fsum((x - mean) ** 2 for x in sample.values()) / (n - 1)) if n > 1 else None
    if n and noise:
        half = sqrt(noise.variance / n) * float(stdtrit(df, 0.5 + confidence / 2))
        low, high = mean - half, mean + half
    return ArmVerdict(arm, n, mean if n else None, sd, low, high, delta, verdict, False)


def _why(arms: list[ArmVerdict], winner: str, metric: str, method: str | None, alpha: float, detected: float) -> str:
    """What the phase says, in one sentence; numbers to two digits of the interval's half-width."""
    others = [arm for arm in arms if arm.verdict != "baseline"]
    judged = [(arm, arm.delta) for arm in others if arm.delta and arm.delta.p is not None]
    if not judged:
        states = [arm.verdict for arm in others]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "there is none"
        if "no claim" not in states:
            return f"no other arm finished all its seeds ({counts}), so the baseline stays"
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
        seen = f"an effect of {detected:.2g} would be found in 4 of 5 such phases"
        return f"no arm is better than the baseline {bar}, so the baseline stays; {text}; {seen}"
    tied = [arm.arm for arm, _ in judged if arm.tied_with_winner]
    gap = "; " if any("," in name for name in tied) else ", "  # a name may be a list itself
    names = gap.join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    return text + (f"; {names} {'is' if len(tied) == 1 else 'are'} not distinguishable from it" if tied else "")
