"""Finds the arms and trials that a claim compares, and estimates their difference with a confidence interval."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, inf, log, sqrt
from statistics import fmean, stdev
from typing import Any, Literal

from tune import format as fmt
from tune.analysis.importance import is_number
from tune.analysis.verdicts import MAX_VALUE, Judgement, Outcomes, judge
from tune.claims.selectors import ClaimArm, Selector, describe, matches, same, varied
from tune.spec.metrics import LOSS_METRICS
from tune.spec.reading import short
from tune.spec.schema import Claim
from tune.storage.records import TrialOutcome
from tune.storage.summaries import Delta

Pair = tuple[ClaimArm, ClaimArm]
Transform = Callable[[float], float]  # applied to the metric: `float` (identity) or `log`


@dataclass(frozen=True)
class ClaimVerdict:
    """The verdict on a claim, its reason, and the numbers and trials behind it."""

    verdict: Literal["reproduced", "refuted", "undecided", "no data"]
    why: str
    observed: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int = 0  # seeds
    trials: Sequence[str] = ()


ONE_SEED = ClaimVerdict("undecided", "n=1: one seed has no spread to judge by")


@dataclass(frozen=True)
class Difference:
    """Left minus right; infinite if one side lost by divergence. `place` reads like `on 3 seeds of phase alpha`."""

    mean: float
    low: float
    high: float
    n: int  # seeds
    trials: Sequence[str]
    place: str
    df: float | None = None  # degrees of freedom of the interval

    def verdict(self, verdict: Literal["reproduced", "refuted", "undecided"], why: str) -> ClaimVerdict:
        return ClaimVerdict(verdict, why, self.mean, self.low, self.high, self.n, self.trials)


@dataclass(frozen=True)
class Series:
    """Arms that differ in one numeric setting, sorted by its value, with the outcomes used to judge them."""

    outcomes: Outcomes
    names: Sequence[str]  # of the arms, in the order of `values`
    values: Sequence[float]
    method: str
    n: int  # seeds
    trials: Sequence[str]
    place: str


@dataclass(frozen=True)
class Evidence:
    """All arms with the outcomes of their trials, and the campaign's settings for judging them."""

    arms: Sequence[ClaimArm]
    outcome: Callable[[str, str], TrialOutcome]  # (trial id, metric)
    metric: str
    goal: Literal["minimize", "maximize"]
    confidence: float
    min_effect: float

    def min_effect_of(self, claim: Claim) -> float:
        """`min_effect` is in units of the campaign's metric; it is 0 for any other."""
        return self.min_effect if claim.metric == self.metric else 0.0

    def in_phase(self, phase: str) -> list[ClaimArm]:
        return [arm for arm in self.arms if arm.phase == phase]

    def outcomes(self, arms: Iterable[ClaimArm], metric: str, transform: Transform = float) -> Outcomes:
        """The outcomes of the arms' trials, by arm name and seed."""
        return {arm.name: {seed: self.trial(i, metric, transform) for seed, i in arm.trial_ids.items()} for arm in arms}

    def trial(self, trial_id: str, metric: str, transform: Transform = float) -> TrialOutcome:
        """The outcome of a trial; its transformed value is None if it is missing, MAX_VALUE or more, or has no log."""
        outcome = self.outcome(trial_id, metric)
        value = outcome.value
        if value is None or abs(value) >= MAX_VALUE or (transform is log and value <= 0):
            return replace(outcome, value=None)
        return replace(outcome, value=transform(value))

    def judge(
        self, outcomes: Outcomes, claim: Claim, baseline: str, *, method: Any = "auto", goal: Any = "minimize"
    ) -> Judgement:
        """Judges the arms of a phase against one of them, `baseline`."""
        return judge(
            outcomes,
            baseline=baseline,
            goal=goal,
            confidence=self.confidence,
            min_effect=self.min_effect_of(claim),
            metric=claim.metric,
            method=method,
        )

    def deltas(
        self, outcomes: Outcomes, claim: Claim, names: Sequence[str], method: str
    ) -> dict[tuple[str, str], Delta]:
        """The differences between the arms `names`: (a, b) -> a minus b.

        The noise of a difference is read from the differences of all arms from one of the two. The reading of the two
        with the larger p-value counts, so that the sides of a claim can be swapped.
        """
        found: dict[tuple[str, str], Delta] = {}
        for baseline in names:
            judgement = self.judge(outcomes, claim, baseline, method=method)
            found |= {(arm.arm, baseline): arm.delta for arm in judgement.arms if arm.delta and arm.arm in names}
        return {(a, b): max(delta, _negated(found[b, a]), key=_caution) for (a, b), delta in found.items()}

    def lost(self, loser: Iterable[TrialOutcome], winner: Iterable[TrialOutcome], n: int, metric: str) -> bool:
        """Whether all `loser` trials diverged and all `winner` trials finished, on enough seeds to exclude chance.

        tune/claims/relations.py explains the bound on that probability. Applies to losses only.
        """
        statuses = {outcome.status for outcome in loser}, {outcome.status for outcome in winner}
        is_unlikely = 4.0**-n <= (1 - self.confidence) / 2
        return metric in LOSS_METRICS and statuses == ({"diverged"}, {"finished"}) and is_unlikely


def difference(claim: Claim, evidence: Evidence, transform: Transform = float) -> Difference | ClaimVerdict:
    """Left minus right of the transformed metric, with its interval; a verdict if it cannot be computed."""
    pairs, remark = paired_arms(claim, evidence.arms)
    by_seed: dict[int, dict[tuple[str, str], None]] = {}  # dicts as ordered sets: phases may share a pair of trials
    for left, right in pairs:
        for seed in sorted(left.trial_ids.keys() & right.trial_ids.keys()):
            by_seed.setdefault(seed, {})[left.trial_ids[seed], right.trial_ids[seed]] = None
    if not by_seed:
        return ClaimVerdict("no data", _explain_no_pairs(claim, evidence.arms))
    sides = [dict.fromkeys(ids[side] for pairs in by_seed.values() for ids in pairs) for side in (0, 1)]
    left, right = ([evidence.trial(i, claim.metric, transform) for i in side] for side in sides)
    trials, n, place = [*sides[0], *sides[1]], len(by_seed), _place(pairs, len(by_seed)) + remark
    for loser, winner, end in ((left, right, inf), (right, left, -inf)):
        if evidence.lost(loser, winner, n, claim.metric):
            return Difference(end, end, end, n, trials, place)
    if problem := incomplete([*left, *right], claim.metric):
        return replace(problem, trials=trials)
    delta = _delta(claim, evidence, pairs, by_seed, transform)
    if delta.ci_low is None or delta.ci_high is None:
        return replace(ONE_SEED, observed=delta.mean, n=n, trials=trials)
    return Difference(delta.mean, delta.ci_low, delta.ci_high, n, trials, place, delta.df)


def weighted_sum(
    claim: Claim, evidence: Evidence, terms: Sequence[tuple[Selector, float]]
) -> Difference | ClaimVerdict:
    """The sum of weight times metric of the arms that `terms` select, with the t interval over seeds (Student 1908).

    It is computed per seed, so that effects of a seed on all arms cancel if the weights add up to 0. An arm that is
    selected in several phases counts with its mean. Only phases that have an arm for every term count.
    """
    phases = [evidence.in_phase(phase) for phase in dict.fromkeys(arm.phase for arm in evidence.arms)]
    found = [[[arm for arm in arms if matches(selector, arm)] for selector, _ in terms] for arms in phases]
    found = [selected for selected in found if all(selected)]
    if not found:
        missing = [selector for selector, _ in terms if not any(matches(selector, arm) for arm in evidence.arms)]
        wanted = fmt.listing([describe(selector) for selector in missing or [selector for selector, _ in terms]])
        return ClaimVerdict(
            "no data", f"no arm so far is {wanted}" if missing else f"no phase so far has all of {wanted}"
        )
    arms = [[arm for selected in found for arm in selected[i]] for i in range(len(terms))]
    trials = list(dict.fromkeys(i for side in arms for arm in side for i in arm.trial_ids.values()))
    by_term = [_averaged(side, evidence, claim.metric) for side in arms]
    seeds = [seed for seed in by_term[0] if all(seed in outcomes for outcomes in by_term)]
    if problem := incomplete([outcomes[seed] for outcomes in by_term for seed in seeds], claim.metric):
        return replace(problem, trials=trials)
    sums = [fsum(w * (o[seed].value or 0.0) for o, (_, w) in zip(by_term, terms, strict=True)) for seed in seeds]
    n, mean = len(seeds), fmean(sums)
    if n < 2:
        return replace(ONE_SEED, observed=mean, n=n, trials=trials)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, 0.5 + evidence.confidence / 2)) * stdev(sums) / sqrt(n)
    place = _place([(arm, arm) for side in arms for arm in side], n)
    return Difference(mean, mean - half, mean + half, n, trials, place, n - 1)


def paired_arms(claim: Claim, arms: Sequence[ClaimArm]) -> tuple[list[Pair], str]:
    """The pairs of a left and a right arm to compare within each phase, and a remark for the sentence.

    The arms of a pair have equal values of all other settings that vary in their phase, unless the claim selects one of
    them by name. If there is no such pair, all pairs are compared, and the remark names the other settings that differ.
    """
    equal: list[Pair] = []
    unequal: dict[str, list[Pair]] = {}  # by the other settings that differ
    left_of, right_of = claim.left or {}, claim.right or {}
    for phase in dict.fromkeys(arm.phase for arm in arms):
        in_phase = [arm for arm in arms if arm.phase == phase]
        other_settings = varied(in_phase) - left_of.keys() - right_of.keys()
        right = [arm for arm in in_phase if matches(right_of, arm)]
        for pair in ((a, b) for a in in_phase if matches(left_of, a) for b in right if a is not b):
            differing = [name for name in other_settings if not same(*(arm.settings.get(name) for arm in pair))]
            if not differing or "arm" in left_of or "arm" in right_of:
                equal.append(pair)
            else:
                unequal.setdefault(fmt.listing(map(short, sorted(differing))), []).append(pair)
    if equal or not unequal:
        return equal, ""
    return [pair for pairs in unequal.values() for pair in pairs], f", which also differ in {' or '.join(unequal)}"


def series_along(claim: Claim, evidence: Evidence) -> Series | None:
    """A row of arms that differ only in `claim.setting`; None if no phase has such a row.

    If there are several rows, those with the same values as the longest are averaged seed by seed.
    """
    setting, rows = claim.setting or "", list[dict[float, ClaimArm]]()
    for phase in dict.fromkeys(arm.phase for arm in evidence.arms):
        arms = [arm for arm in evidence.in_phase(phase) if matches(claim.left or {}, arm)]
        groups: dict[str, dict[float, ClaimArm]] = {}  # by the values of all other settings
        for arm in arms:
            value, other_settings = arm.settings.get(setting), sorted(varied(arms) - {setting})
            if is_number(value):
                groups.setdefault(repr([arm.settings.get(name) for name in other_settings]), {})[value] = arm
        rows += [dict(sorted(group.items())) for group in groups.values() if len(group) > 1]
    if not rows:
        return None
    values = list(max(rows, key=len))
    distinct = {tuple(tuple(arm.trial_ids.values()) for arm in row.values()): row for row in rows}
    rows = [row for row in distinct.values() if list(row) == values]
    arms = [arm for row in rows for arm in row.values()]
    trials = list(dict.fromkeys(i for arm in arms for i in arm.trial_ids.values()))
    if len(rows) == 1:
        names, method = [arm.name for arm in arms], "auto"
        outcomes = evidence.outcomes(evidence.in_phase(arms[0].phase), claim.metric)
    else:
        names, method = [repr(value) for value in values], "paired"
        outcomes = {
            name: _averaged([row[value] for row in rows], evidence, claim.metric)
            for name, value in zip(names, values, strict=True)
        }
    n = len(outcomes[names[0]])
    return Series(outcomes, names, values, method, n, trials, _place([(arm, arm) for arm in arms], n))


def incomplete(outcomes: Sequence[TrialOutcome], metric: str) -> ClaimVerdict | None:
    """The verdict if trials have not finished or lack the metric; None if every trial has a value."""
    unfinished = Counter(outcome.status for outcome in outcomes if outcome.status != "finished")
    if unfinished:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(unfinished.items()))
        text = f"{_share_of(unfinished.total(), outcomes)} not finished ({counts})"
        is_empty = unfinished.total() == len(outcomes) and "diverged" not in unfinished
        return ClaimVerdict("no data" if is_empty else "undecided", text)
    lacking = sum(outcome.value is None for outcome in outcomes)
    text = f"{_share_of(lacking, outcomes)} no {metric} that can be compared"
    return ClaimVerdict("no data", text) if lacking or not outcomes else None


def _share_of(number: int, outcomes: Sequence[TrialOutcome]) -> str:
    """Begins a sentence: `1 of 8 trials has`, `2 of 8 trials have`."""
    return f"{number} of {fmt.counted(len(outcomes), 'trial')} {'has' if number == 1 else 'have'}"


def _delta(
    claim: Claim,
    evidence: Evidence,
    pairs: Sequence[Pair],
    by_seed: Mapping[int, Mapping[tuple[str, str], None]],
    transform: Transform,
) -> Delta:
    """Left minus right. A single pair is judged with the noise of its phase; several are first averaged per seed."""
    distinct = {tuple(tuple(arm.trial_ids.values()) for arm in pair) for pair in pairs}
    if len(distinct) == 1:
        left, right = (arm.name for arm in pairs[0])
        outcomes = evidence.outcomes(evidence.in_phase(pairs[0][0].phase), claim.metric, transform)
        method = "auto"
    else:
        left, right, method = "left", "right", "paired"
        outcomes = {
            name: {
                seed: _mean([evidence.trial(ids[side], claim.metric, transform) for ids in trials])
                for seed, trials in by_seed.items()
            }
            for side, name in enumerate((left, right))
        }
    return evidence.deltas(outcomes, claim, (left, right), method)[left, right]


def _negated(delta: Delta) -> Delta:
    low, high = (None if end is None else 0.0 - end for end in (delta.ci_high, delta.ci_low))
    return replace(delta, mean=0.0 - delta.mean, ci_low=low, ci_high=high)


def _caution(delta: Delta) -> tuple[float, float]:
    """Sorts estimates of the same difference: by p-value, then by the width of the interval."""
    return (inf if delta.p is None else delta.p), (delta.ci_high or 0.0) - (delta.ci_low or 0.0)


def _averaged(arms: Sequence[ClaimArm], evidence: Evidence, metric: str) -> dict[int, TrialOutcome]:
    """The outcome per seed, averaged over the arms that have a trial with it."""
    seeds = sorted({seed for arm in arms for seed in arm.trial_ids})
    ids = {seed: dict.fromkeys(arm.trial_ids[seed] for arm in arms if seed in arm.trial_ids) for seed in seeds}
    return {seed: _mean([evidence.trial(i, metric) for i in trials]) for seed, trials in ids.items()}


def _mean(outcomes: Sequence[TrialOutcome]) -> TrialOutcome:
    """The mean of the outcomes if all have a value; otherwise the first one without a value."""
    values = [outcome.value for outcome in outcomes if outcome.value is not None]
    if len(values) == len(outcomes):
        return TrialOutcome("finished", fmean(values))
    return next(outcome for outcome in outcomes if outcome.value is None)


def _place(pairs: Sequence[Pair], n: int) -> str:
    """The seeds and phases of a comparison as text, such as `on 3 seeds of phase alpha`."""
    phases = list(dict.fromkeys(arm.phase for pair in pairs for arm in pair))
    return f"on {fmt.counted(n, 'seed')} of phase{'' if len(phases) == 1 else 's'} {fmt.listing(phases)}"


def _explain_no_pairs(claim: Claim, arms: Sequence[ClaimArm]) -> str:
    for selector in (claim.left, claim.right):
        if not any(matches(selector or {}, arm) for arm in arms):
            return f"no arm so far is {describe(selector)}"
    return f"no phase so far has both {describe(claim.left)} and {describe(claim.right)}"
