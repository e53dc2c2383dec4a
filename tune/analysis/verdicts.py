"""Verdicts: which arms of a phase differ from its baseline by more than noise, and by how much.

Arms are paired by seed, so that what a seed does to all arms alike cancels. The noise of each difference is read in
several ways, and the most cautious one counts (`tune/analysis/noise.py`). P-values are corrected by Holm's method
(1979). With two arms this is the paired t test (Student 1908).

Only arms that finished all their seeds, at least two, are compared. Judging the others by their surviving seeds would
be biased: they get no delta and do not affect the other arms. Arms that were stopped early count as comparisons with
p = 1 in Holm's correction, since they were compared before the end and dropped. The baseline is compared with the seeds
that it finished; if it diverged with others, it looks better than it is, so no arm is called worse or equivalent. Arms
with bit-identical values count once in the noise. If there is no noise, a nonzero delta has p 0 and an interval of
width 0; a delta of 0 has p 1.

`docs/statistics.md` explains the method, its sources and its limits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import floor, fsum, log10, sqrt
from statistics import fmean
from typing import Literal

from tune import format as fmt
from tune.analysis.noise import Comparison, Method, Values, compare_arms
from tune.analysis.power import MAX_SEEDS, Design, seeds_to_decide, smallest_detectable
from tune.analysis.readings import NoisePrior
from tune.storage.records import TrialOutcome
from tune.storage.summaries import ArmSummary, Delta, PhaseNoise, Spread

Goal = Literal["minimize", "maximize"]
Outcomes = Mapping[str, Mapping[int, TrialOutcome]]  # arm -> seed -> outcome
Verdict = Literal[
    "baseline", "better", "worse", "equivalent", "undecided", "diverged", "failed", "incomplete", "no claim"
]

MAX_VALUE = 1e100  # squares of larger values overflow
RANK_OF_EXCLUDED = {"incomplete": 1, "failed": 2, "diverged": 3}  # after the arms that finished


@dataclass(frozen=True)
class Judgement:
    """The verdicts on a phase: its arms, best first, and the noise that they were compared with.

    `prior` is what the noise of the differences says about that of a later phase with arms of the same kind.
    """

    arms: list[ArmSummary]  # without measurements other than the metric
    winner: str
    why: str
    noise: PhaseNoise
    warnings: list[str]
    prior: NoisePrior | None


@dataclass(frozen=True)
class _Rules:
    """How arms are judged."""

    sign: float  # 1 if small values are better, otherwise -1
    confidence: float
    min_effect: float
    metric: str
    is_biased: bool  # in favor of the baseline, which diverged with some seeds

    @property
    def alpha(self) -> float:
        return 1 - self.confidence


def judge(
    outcomes: Outcomes,
    *,
    baseline: str,
    goal: Goal = "minimize",
    confidence: float = 0.95,
    min_effect: float = 0.005,
    metric: str = "val_loss",
    method: Method | Literal["auto"] = "auto",
    prior: NoisePrior | None = None,
) -> Judgement:
    """Compares every arm of a phase with its baseline; the module docstring describes the method.

    An arm is `better` or `worse` if its Holm-corrected p is below `1 - confidence` and its delta, in units of the
    metric, is at least `min_effect`. It is `equivalent` if the interval of its delta lies within +-`min_effect`,
    otherwise `undecided`. `metric` is the name of the values in messages. `prior` is the noise of earlier phases.
    """
    if baseline not in outcomes or not 0 < confidence < 1:
        raise ValueError(f"baseline {baseline!r} must be one of {sorted(outcomes)}, 0 < confidence={confidence} < 1")
    values, excluded, warnings = _finished_values(outcomes, baseline, metric)
    is_biased, sign = excluded.get(baseline) == "diverged", {"minimize": 1.0, "maximize": -1.0}[goal]
    rules = _Rules(sign, confidence, min_effect, metric, is_biased)
    compared = {a: v for a, v in values.items() if len(v) > 1 and (a == baseline or a not in excluded)}
    comparison = None
    if baseline in compared and len(compared) > 1:
        comparison = compare_arms(compared, baseline, confidence, method=method, prior=prior)
        warnings += _noise_warnings(comparison, compared, method)
    n_stopped = sum("stopped" in {outcome.status for outcome in row.values()} for row in outcomes.values())
    deltas = _deltas(comparison, n_stopped) if comparison else {}
    design = _design(comparison, n_stopped, rules, prior) if comparison else None

    level = fmean(values[baseline].values() or [0.0])
    arms, difference = [], {}  # arm mean minus baseline mean, to sort the arms
    for arm, sample in values.items():
        difference[arm] = deltas[arm].mean if arm in deltas else fmean(sample.values() or [level]) - level
        if arm not in {baseline, *deltas, *excluded} and values[baseline]:
            deltas[arm] = Delta(difference[arm])
        verdict = excluded.get(arm) or _verdict(deltas.get(arm), rules)
        verdict = "baseline" if arm == baseline else verdict
        arms.append(
            ArmSummary(
                arm,
                n=len(sample),
                score=_spread(arm, sample, comparison, compared, confidence),
                noise_sd=comparison.noise[arm].sd if comparison and arm in comparison.noise else None,
                delta=deltas.get(arm),
                verdict=verdict,
                seeds_to_decide=_seeds_to_decide(arm, comparison, design, rules) if verdict == "undecided" else None,
            )
        )
    arms.sort(key=lambda arm: (rules.sign * difference[arm.arm], arm.arm != baseline, arm.arm))
    arms.sort(key=lambda arm: RANK_OF_EXCLUDED.get(arm.verdict, not arm.n))
    winner = next((arm.arm for arm in arms if arm.verdict == "better"), baseline)
    if comparison:
        others = compare_arms(compared, winner, confidence, method=method, prior=prior).contrasts
        tied = {arm for arm, contrast in others.items() if abs(contrast.difference) <= contrast.half_width}
        arms = [replace(arm, tied_with_winner=arm.arm in tied - {winner}) for arm in arms]
    noise = _phase_noise(comparison, design, values[baseline])
    why = _why(arms, winner, noise, rules, comparison)
    return Judgement(arms, winner, why, noise, warnings, comparison.prior if comparison else None)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: multiplies the k-th smallest of m p-values by m - k + 1; monotone, at most 1."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted = accumulate((min(1.0, (len(p) - k) * p[i]) for k, i in enumerate(order)), max)
    return [value for _, value in sorted(zip(order, adjusted, strict=True))]


def _finished_values(outcomes: Outcomes, baseline: str, metric: str) -> tuple[Values, dict[str, Verdict], list[str]]:
    """Returns the finished values by arm, the verdicts of arms that are not compared, and warnings.

    All are sorted, so that floating-point sums do not depend on the order in which trials finished.
    """
    values, excluded, warnings = Values(), dict[str, Verdict](), []
    for arm in sorted(outcomes, key=lambda name: (name != baseline, name)):
        statuses = {outcome.status for outcome in outcomes[arm].values()}
        finished = {seed: o.value for seed, o in sorted(outcomes[arm].items()) if o.status == "finished"}
        values[arm] = {seed: float(x) for seed, x in finished.items() if x is not None and abs(x) < MAX_VALUE}  # no NaN
        if unusable := sorted(finished.keys() - values[arm].keys()):
            text = f"{metric} is missing, not finite or beyond {MAX_VALUE:g} with seeds {unusable}"
            warnings.append(f"{arm}: {text}, so these finished trials are not compared")
        if len(values[arm]) < len(outcomes[arm]) or not outcomes[arm]:
            excluded[arm] = "diverged" if "diverged" in statuses else "failed" if "failed" in statuses else "incomplete"
    if baseline in excluded and values[baseline]:
        text = f"the baseline lost seeds ({excluded[baseline]}): only the finished ones are compared"
        if excluded[baseline] == "incomplete":
            n, total = len(values[baseline]), len(outcomes[baseline])
            text = f"the baseline has {n} of {total} seeds: only these are compared"
        is_biased = excluded[baseline] == "diverged"
        bias = "; without its worst seeds it looks too good, so no arm is called worse or equivalent"
        warnings.append(text + bias if is_biased else text)
    return values, excluded, warnings


def _deltas(comparison: Comparison, n_stopped: int) -> dict[str, Delta]:
    """The deltas of all compared arms; `n_stopped` counts arms that were stopped early."""
    contrasts = comparison.contrasts
    adjusted = holm([contrast.p for contrast in contrasts.values()] + [1.0] * n_stopped)
    return {
        arm: Delta(
            mean=contrast.difference,
            ci_low=contrast.difference - contrast.half_width,
            ci_high=contrast.difference + contrast.half_width,
            p=contrast.p,
            p_holm=p_holm,
            df=contrast.df,
            reading=contrast.reading,
        )
        for (arm, contrast), p_holm in zip(contrasts.items(), adjusted[: len(contrasts)], strict=True)
    }


def _design(comparison: Comparison, n_stopped: int, rules: _Rules, prior: NoisePrior | None) -> Design:
    return Design(
        n_arms=len(comparison.contrasts) + 1 + n_stopped,
        sd=sqrt(comparison.pooled.value),
        method=comparison.method,
        confidence=rules.confidence,
        min_effect=rules.min_effect,
        prior_df=prior.df if prior else None,
    )


def _seeds_to_decide(arm: str, comparison: Comparison | None, design: Design | None, rules: _Rules) -> int | None:
    """The seeds that would decide an undecided arm if its effect and its noise are as estimated: more than it has."""
    if comparison is None or design is None or rules.is_biased:
        return None
    contrast = comparison.contrasts[arm]
    own_sd = contrast.standard_error * sqrt(contrast.n / 2)
    needed = seeds_to_decide(contrast.difference, design._replace(sd=own_sd))
    return needed and max(needed, contrast.n + 1)


def _phase_noise(comparison: Comparison | None, design: Design | None, baseline: Mapping[int, float]) -> PhaseNoise:
    """The noise of a phase; without a comparison, the standard deviation of the baseline over its seeds."""
    if comparison is None or design is None:
        n = len(baseline)
        return PhaseNoise(sd=_sd(list(baseline.values())), df=n - 1) if n > 1 else PhaseNoise()
    n_seeds = min(contrast.n for contrast in comparison.contrasts.values())
    return PhaseNoise(
        sd=design.sd,
        method=comparison.method,
        correlation=comparison.correlation,
        df=comparison.pooled.df,
        smallest_detectable=smallest_detectable(n_seeds, design),
    )


def _noise_warnings(comparison: Comparison, values: Values, method: str) -> list[str]:
    """Warns of unequal seeds, identical arms, no noise, and arms whose noise differs from that of the others."""
    warnings = []
    if comparison.method == "unpaired" and method != "unpaired":
        warnings.append("the arms share too few seeds to be paired: compared as independent samples")
    elif len({tuple(sample) for sample in values.values()}) > 1:
        warnings.append("the arms ran different seeds: a delta is the mean over the seeds that both arms have")
    for arm, first in comparison.same_as.items():
        warnings.append(f"{arm}: every result equals that of {first}; what varies has no effect")
    if not comparison.pooled.value and len(comparison.same_as) < len(comparison.contrasts):
        if all(len(set(sample.values())) == 1 for sample in values.values()):
            warnings.append("no noise between seeds: does the seed reach the run? A p of 0 means only that")
        else:
            text = "every seed gives the same differences, to rounding: a p of 0 means only that"
            warnings.append(f"{text}. Give the values with more digits, or more seeds")
    for arm, noise in comparison.noise.items():
        if noise.ratio is None or arm in comparison.same_as:
            continue
        ratio = f"{noise.ratio:.2g}" if noise.ratio < 10 else f"{noise.ratio:.0f}"
        text = f"{arm} scatters {ratio} times as much as the other arms"
        warnings.append(
            f"{text}; only its own seeds judge it, and the others are judged without it" if noise.is_gross else text
        )
    return warnings


def _verdict(delta: Delta | None, rules: _Rules) -> Verdict:
    if delta is None or delta.p_holm is None or delta.ci_low is None or delta.ci_high is None:
        return "no claim"
    least = rules.min_effect * (1 - 1e-9)
    is_worse = rules.sign * delta.mean > 0
    if delta.p_holm < rules.alpha and abs(delta.mean) >= least and delta.mean:
        return ("undecided" if rules.is_biased else "worse") if is_worse else "better"
    is_within = max(-delta.ci_low, delta.ci_high) <= rules.min_effect * (1 + 1e-9)
    return "equivalent" if is_within and not rules.is_biased else "undecided"


def _spread(
    arm: str, sample: Mapping[int, float], comparison: Comparison | None, compared: Values, confidence: float
) -> Spread:
    """Mean and standard deviation of an arm over its seeds, and the confidence interval of the mean.

    Without a comparison, the standard deviation is pooled over the arms that could be compared.
    """
    n = len(sample)
    if not n:
        return Spread()
    mean, half_width = fmean(sample.values()), None
    if comparison:
        half_width = comparison.mean_half_width(arm, n, confidence)
    elif df := sum(len(other) - 1 for other in compared.values()):
        half_width = _pooled_half_width(compared, df, n, confidence)
    low, high = (None, None) if half_width is None else (mean - half_width, mean + half_width)
    return Spread(mean, _sd(list(sample.values())) if n > 1 else None, low, high)


def _pooled_half_width(values: Values, df: int, n: int, confidence: float) -> float:
    """Half the width of the interval of a mean over `n` seeds, from the variance within arms, pooled with `df`."""
    from scipy.special import stdtrit

    squares = fsum(_sd(list(sample.values())) ** 2 * (len(sample) - 1) for sample in values.values())
    return sqrt(squares / df / n) * float(stdtrit(df, 0.5 + confidence / 2))


def _sd(sample: Sequence[float]) -> float:
    mean = fmean(sample)
    return sqrt(fsum((x - mean) ** 2 for x in sample) / (len(sample) - 1))


def _why(arms: list[ArmSummary], winner: str, noise: PhaseNoise, rules: _Rules, comparison: Comparison | None) -> str:
    """The result of the phase in one sentence, rounded to two digits of the interval's half-width."""
    others = [arm for arm in arms if arm.verdict != "baseline"]
    judged = [(arm, arm.delta) for arm in others if arm.delta and arm.delta.p is not None]
    if not judged or comparison is None:
        verdicts = [arm.verdict for arm in others]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts)))
        if not others:
            return "no arm is there to compare with the baseline"
        if {*verdicts} == {"incomplete"}:
            return "no other arm has a result of all its seeds"
        if "no claim" not in verdicts:
            return f"no other arm finished all its seeds ({counts}), so the baseline stays"
        why = "a comparison needs two seeds of both" if any(arm.n > 1 for arm in arms) else "one seed per arm"
        return f"{why}: no claim can be made, the baseline stays"
    best, delta = next((pair for pair in judged if pair[0].arm == winner), judged[0])
    n = comparison.contrasts[best.arm].n  # seeds; the arm or the baseline may have more
    seeds = f"{n} paired seeds" if noise.method == "paired" else f"{n} seeds, unpaired"
    low, high, p = delta.ci_low or 0.0, delta.ci_high or 0.0, delta.p_holm or 0.0
    digits = min(max(1 - floor(log10((high - low) / 2 or abs(delta.mean) / 10 or 1.0)), 0), 12)
    verb, low, high = ("raises", low, high) if delta.mean > 0 else ("lowers", 0.0 - high, 0.0 - low)
    verb = verb if delta.mean else "changes"
    interval = f"[{fmt.number(low, digits)}, {fmt.number(high, digits)}]"
    text = f"{best.arm} {verb} {rules.metric} by {abs(delta.mean):.{digits}f} {interval}"
    text += f" ({seeds}, Holm p {p:.2g})"
    if best.arm != winner:
        bar = "by min_effect" if p < rules.alpha and rules.sign * delta.mean < 0 else "beyond the noise"
        outlook = "with a baseline that diverged it is undecided" if rules.is_biased else _outlook(best, noise)
        return f"no arm is better than the baseline {bar}, so the baseline stays; {text}; {outlook}"
    tied = [arm.arm for arm, _ in judged if arm.tied_with_winner]
    separator = "; " if any("," in name for name in tied) else ", "  # a name may contain a list
    names = separator.join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    return text + (f"; {names} {'is' if len(tied) == 1 else 'are'} not distinguishable from it" if tied else "")


def _outlook(best: ArmSummary, noise: PhaseNoise) -> str:
    """What would decide the best arm, or what the phase could have found."""
    if best.verdict == "undecided" and best.seeds_to_decide:
        return f"about {best.seeds_to_decide} seeds would decide it"
    if best.verdict == "undecided":
        return f"it cannot be decided with {MAX_SEEDS:,} seeds"
    return f"an effect of {noise.smallest_detectable or 0.0:.2g} would be found in 4 of 5 such phases"
