"""What a claim rests on: how the arms that it selects are paired, and their difference with its interval."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log
from statistics import fmean
from typing import Any, Literal

from tune import format as fmt
from tune.analysis.verdicts import LARGEST, Delta, Judgement, Outcomes, judge
from tune.claims.selectors import ClaimArm, describe, is_number, matches, same, short, varied
from tune.spec.schema import LOSS_METRICS, Claim
from tune.storage.records import TrialOutcome

Verdict = Literal["reproduced", "refuted", "undecided", "no data"]
Pair = tuple[ClaimArm, ClaimArm]


@dataclass(frozen=True)
class ClaimVerdict:
    """What the records say of a claim, and the trials that it rests on."""

    verdict: Verdict
    why: str
    observed: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int = 0  # seeds
    trials: Sequence[str] = ()


ONE_SEED = ClaimVerdict("undecided", "n=1: one seed has no spread to judge by")


@dataclass(frozen=True)
class Difference:
    """Left minus right; infinite where one side lost by divergence. `where` is a phrase for the sentence."""

    mean: float
    low: float
    high: float
    n: int  # seeds
    trials: Sequence[str]
    where: str


@dataclass(frozen=True)
class Chain:
    """Arms along the values of a setting: what to judge, the names in order of the values, and the values."""

    cells: Outcomes
    names: Sequence[str]
    values: Sequence[float]
    method: str
    seeds: int
    trials: Sequence[str]
    where: str


@dataclass(frozen=True)
class Evidence:
    """What claims are judged by: all arms, what came of a trial in terms of a metric, and the campaign's rules."""

    arms: Sequence[ClaimArm]
    outcome: Callable[[str, str], TrialOutcome]  # (trial id, metric)
    metric: str
    goal: Literal["minimize", "maximize"]
    confidence: float
    min_effect: float

    def least(self, claim: Claim) -> float:
        """The smallest effect that matters; it is in units of the campaign's metric, and 0 for any other."""
        return self.min_effect if claim.metric == self.metric else 0.0

    def in_phase(self, phase: str) -> list[ClaimArm]:
        return [arm for arm in self.arms if arm.phase == phase]

    def cells(self, arms: Iterable[ClaimArm], metric: str, of: Callable[[float], float] = float) -> Outcomes:
        """The arms' outcomes by name and seed, each value as `of` it; one that has none is missing."""
        return {arm.name: {seed: self.cell(i, metric, of) for seed, i in arm.trial_ids.items()} for arm in arms}

    def cell(self, trial_id: str, metric: str, of: Callable[[float], float] = float) -> TrialOutcome:
        """What came of a trial, as `of` it; no value where there is none, from LARGEST on, or without a logarithm."""
        seen = self.outcome(trial_id, metric)
        if seen.value is None or abs(seen.value) >= LARGEST or (of is log and seen.value <= 0):
            return replace(seen, value=None)
        return replace(seen, value=of(seen.value))

    def judge(
        self, cells: Outcomes, claim: Claim, baseline: str, *, method: Any = "auto", goal: Any = None
    ) -> Judgement:
        """The verdicts of a phase against any of its arms."""
        return judge(
            cells,
            baseline=baseline,
            goal=goal or "minimize",
            confidence=self.confidence,
            min_effect=self.least(claim),
            metric=claim.metric,
            method=method,
        )

    def lost(self, loser: Iterable[TrialOutcome], winner: Iterable[TrialOutcome], seeds: int, metric: str) -> bool:
        """Whether all of one side diverged and none of the other, over enough seeds; the module claims.py says why."""
        sides = {outcome.status for outcome in loser}, {outcome.status for outcome in winner}
        return (
            metric in LOSS_METRICS
            and sides == ({"diverged"}, {"finished"})
            and 4.0**-seeds <= (1 - self.confidence) / 2
        )


def gap(claim: Claim, evidence: Evidence, of: Callable[[float], float] = float) -> Difference | ClaimVerdict:
    """Left minus right with its interval, in terms of `of` the metric; or why there is none."""
    pairs, remark = paired_arms(claim, evidence.arms)
    by_seed: dict[int, dict[tuple[str, str], None]] = {}  # each pair of trials once, however many phases have it
    for left, right in pairs:
        for seed in sorted(left.trial_ids.keys() & right.trial_ids.keys()):
            by_seed.setdefault(seed, {})[left.trial_ids[seed], right.trial_ids[seed]] = None
    if not by_seed:
        return ClaimVerdict("no data", _unpaired(claim, evidence.arms))
    sides = [dict.fromkeys(ids[side] for pairs in by_seed.values() for ids in pairs) for side in (0, 1)]
    outcomes = [[evidence.cell(i, claim.metric, of) for i in side] for side in sides]
    trials, n, where = [*sides[0], *sides[1]], len(by_seed), _where(pairs, len(by_seed), remark)
    for k, sign in ((0, 1.0), (1, -1.0)):
        if evidence.lost(outcomes[k], outcomes[1 - k], n, claim.metric):
            return Difference(sign * inf, sign * inf, sign * inf, n, trials, where)
    if problem := incomplete([*outcomes[0], *outcomes[1]], claim.metric):
        return replace(problem, trials=trials)
    delta = _delta(claim, evidence, pairs, by_seed, of)
    if delta.ci_low is None or delta.ci_high is None:
        return replace(ONE_SEED, observed=delta.mean, n=n, trials=trials)
    return Difference(delta.mean, delta.ci_low, delta.ci_high, n, trials, where)


def paired_arms(claim: Claim, arms: Sequence[ClaimArm]) -> tuple[list[Pair], str]:
    """The arms to compare, phase by phase: those that agree on all else that varies there, or else all, with a remark.

    An arm that a claim names is compared as it is.
    """
    alike: list[Pair] = []
    other: dict[str, list[Pair]] = {}  # by what else they differ in
    left_of, right_of = claim.left or {}, claim.right or {}
    for phase in dict.fromkeys(arm.phase for arm in arms):
        here = [arm for arm in arms if arm.phase == phase]
        else_varied = varied(here) - left_of.keys() - right_of.keys()
        right = [arm for arm in here if matches(right_of, arm)]
        for pair in ((a, b) for a in here if matches(left_of, a) for b in right if a is not b):
            differing = [name for name in else_varied if not same(*(arm.settings.get(name) for arm in pair))]
            if not differing or "arm" in left_of or "arm" in right_of:
                alike.append(pair)
            else:
                other.setdefault(fmt.listing(map(short, sorted(differing))), []).append(pair)
    if alike or not other:
        return alike, ""
    return [pair for pairs in other.values() for pair in pairs], f", which also differ in {' or '.join(other)}"


def chain(claim: Claim, evidence: Evidence) -> Chain | None:
    """The arms along `claim.setting` that agree on all else; None where there are none.

    Of several such rows those with the most values are averaged seed by seed.
    """
    setting, rows = claim.setting or "", list[dict[float, ClaimArm]]()
    for phase in dict.fromkeys(arm.phase for arm in evidence.arms):
        here = [arm for arm in evidence.in_phase(phase) if matches(claim.left or {}, arm)]
        groups: dict[str, dict[float, ClaimArm]] = {}
        for arm in here:
            value, rest = arm.settings.get(setting), sorted(varied(here) - {setting})
            if is_number(value):
                groups.setdefault(repr([arm.settings.get(name) for name in rest]), {})[value] = arm
        rows += [dict(sorted(group.items())) for group in groups.values() if len(group) > 1]
    if not rows:
        return None
    longest = max(rows, key=len)
    unlike = {tuple(tuple(arm.trial_ids.values()) for arm in row.values()): row for row in rows}  # each once
    rows = [row for row in unlike.values() if list(row) == list(longest)]
    values, arms = list(longest), [arm for row in rows for arm in row.values()]
    trials = list(dict.fromkeys(i for arm in arms for i in arm.trial_ids.values()))
    if len(rows) == 1:
        names, method = [arm.name for arm in arms], "auto"
        cells = evidence.cells(evidence.in_phase(arms[0].phase), claim.metric)
    else:
        names, method = [repr(value) for value in values], "paired"
        cells = {
            name: _averaged([row[value] for row in rows], evidence, claim.metric)
            for name, value in zip(names, values, strict=True)
        }
    seeds = len(cells[names[0]])
    return Chain(cells, names, values, method, seeds, trials, _where([(arm, arm) for arm in arms], seeds, ""))


def incomplete(outcomes: Sequence[TrialOutcome], metric: str) -> ClaimVerdict | None:
    """What keeps a claim open whatever the values are: trials that did not finish, or that lack the metric."""
    open_ones = Counter(outcome.status for outcome in outcomes if outcome.status != "finished")
    if open_ones:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(open_ones.items()))
        text = f"{open_ones.total()} of {len(outcomes)} trials have not finished ({counts})"
        nothing = open_ones.total() == len(outcomes) and "diverged" not in open_ones
        return ClaimVerdict("no data" if nothing else "undecided", text)
    lacking = sum(outcome.value is None for outcome in outcomes)
    text = f"{lacking} of {len(outcomes)} trials have no {metric} that can be compared"
    return ClaimVerdict("no data", text) if lacking or not outcomes else None


def _delta(
    claim: Claim,
    evidence: Evidence,
    pairs: Sequence[Pair],
    by_seed: Mapping[int, Mapping[tuple[str, str], None]],
    of: Callable[[float], float],
) -> Delta:
    """One pair of arms by the noise of its phase, several by the averages of each seed."""
    distinct = {tuple(tuple(arm.trial_ids.values()) for arm in pair) for pair in pairs}
    if len(distinct) == 1:
        left, right = (arm.name for arm in pairs[0])
        cells = evidence.cells(evidence.in_phase(pairs[0][0].phase), claim.metric, of)
        method = "auto"
    else:
        left, right, method = "left", "right", "paired"
        cells = {
            name: {
                seed: _mean([evidence.cell(ids[side], claim.metric, of) for ids in trials])
                for seed, trials in by_seed.items()
            }
            for side, name in enumerate((left, right))
        }
    judged = {arm.arm: arm.delta for arm in evidence.judge(cells, claim, right, method=method).arms}
    delta = judged[left]
    assert delta is not None, "both sides have a value for each seed"
    return delta


def _averaged(arms: Sequence[ClaimArm], evidence: Evidence, metric: str) -> dict[int, TrialOutcome]:
    """The outcome of each seed, averaged over the arms that ran it."""
    seeds = sorted({seed for arm in arms for seed in arm.trial_ids})
    ids = {seed: dict.fromkeys(arm.trial_ids[seed] for arm in arms if seed in arm.trial_ids) for seed in seeds}
    return {seed: _mean([evidence.cell(i, metric) for i in trials]) for seed, trials in ids.items()}


def _mean(outcomes: Sequence[TrialOutcome]) -> TrialOutcome:
    """The mean of finished trials; otherwise what became of the first that is not."""
    excluded = next((outcome for outcome in outcomes if outcome.value is None), None)
    return excluded or TrialOutcome(
        "finished", fmean(outcome.value for outcome in outcomes if outcome.value is not None)
    )


def _where(pairs: Sequence[Pair], seeds: int, remark: str) -> str:
    phases = list(dict.fromkeys(arm.phase for pair in pairs for arm in pair))
    text = f"on {seeds} seed{'' if seeds == 1 else 's'} of phase{'' if len(phases) == 1 else 's'} {fmt.listing(phases)}"
    return text + remark


def _unpaired(claim: Claim, arms: Sequence[ClaimArm]) -> str:
    """Why there is nothing to compare."""
    for selector in (claim.left, claim.right):
        if not any(matches(selector or {}, arm) for arm in arms):
            return f"no arm so far is {describe(selector)}"
    return f"no phase so far has both {describe(claim.left)} and {describe(claim.right)}"
