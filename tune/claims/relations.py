"""The claims ledger: sentences of earlier reports, each reproduced, refuted, undecided or without data.

A claim compares the arms that its `left` and `right` select by their complete settings, in every phase that has both.
Arms are paired that agree on all else that varies in their phase; where no two do, all are, and the sentence says in
what else they differ. One pair of arms is judged like an arm and the baseline of its phase (tune/analysis/verdicts.py: seed by
seed, the noise pooled over the phase). Of several pairs each seed's differences are averaged first: the t interval over
seeds (Student 1908) stays right if trials are shared between phases or a seed acts alike in all of them.

`confidence` is that of the campaign; `min_effect` applies to the campaign's metric and is 0 for others. A wrong `less`
or `greater` is reproduced in at most (1 - confidence) / 2 of cases, 2.5 % by default, and one that is right by
`min_effect` is refuted in as many. Claims are not corrected against
each other: of forty sentences that are all wrong one may well come out reproduced. Nothing is judged by the seeds that
survived: one seed, or a trial that has not finished, leaves a claim undecided. Where a loss is compared and all seeds
of one side diverged and none of the other, that side lost, if there are so many that luck would do this in less than
(1 - confidence) / 2 of cases: 4 ** -seeds, since p (1 - p) <= 1 / 4; three seeds at 95 %.

A relation is a function (claim, evidence) -> finding and one entry in `RELATIONS`, with the fields that it needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log
from typing import Any, Literal

from tune.analysis.verdicts import Delta, Judgement, holm
from tune.claims.arithmetic import evaluate
from tune.claims.evidence import ONE_SEED, ClaimVerdict, Difference, Evidence, chain, gap, incomplete
from tune.claims.selectors import ClaimArm, describe, matches, short
from tune.spec.schema import LOSS_METRICS, Claim

Goal = Literal["minimize", "maximize"]

# What may be claimed about, and which way is better.
METRIC_GOALS: dict[str, Goal] = {
    **dict.fromkeys(LOSS_METRICS, "minimize"),
    "tokens_per_second": "maximize",
    "peak_memory_bytes": "minimize",
    "n_params": "minimize",
    "steps": "minimize",
    "tokens": "minimize",
    "weight_norm_error": "minimize",
    "activation_norm_error": "minimize",
    "r_replaced": "minimize",
}
DIRECTIONS = {"decreasing": 1.0, "increasing": -1.0}  # of the metric along a setting
ROUNDING = 1 - 1e-9  # an effect of just min_effect counts
ORDER = ("refuted", "undecided", "no data", "reproduced")  # which of several phases decides


def judge_claims(claims: Sequence[Claim], evidence: Evidence) -> list[dict[str, Any]]:
    """An entry of the ledger for each claim; strict JSON, where a number that there is not is null."""
    entries = []
    for claim in claims:
        relation = RELATIONS[claim.relation]
        here = [arm for arm in evidence.arms if claim.phase in (None, arm.phase)]
        found = relation.decide(claim, replace(evidence, arms=here))
        said = {name: getattr(claim, name) for name in ("id", "source", "says", "relation")}
        numbers = {name: getattr(found, name) for name in ("observed", "ci_low", "ci_high")}
        entries.append(
            said
            | {"metric": claim.metric if relation.trains else None, "verdict": found.verdict}
            | {name: value if value is not None and isfinite(value) else None for name, value in numbers.items()}
            | {"n": found.n, "trials": list(found.trials), "why": found.why}
        )
    return entries


# ---- relations -----------------------------------------------------------------------------------------------------


def less(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The interval of left minus right lies below 0, by `min_effect` at least (reproduced), or above -`min_effect`.

    The latter is refuted: left is worse, or the two are the same for all that matters.
    """
    return _ordered(claim, evidence, 1.0)


def greater(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """As `less`, the other way round."""
    return _ordered(claim, evidence, -1.0)


def equal(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The interval of left minus right lies within +-tolerance (reproduced) or wholly outside (refuted).

    Two one-sided tests at (1 - confidence) / 2 each (Schuirmann 1987).
    """
    found = gap(claim, evidence)
    return found if isinstance(found, ClaimVerdict) else _within(claim, found, _told(claim, found, "minus"), 0.0)


def ratio(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The interval of left over right lies within value +-tolerance (reproduced) or wholly outside (refuted).

    The ratio is the geometric mean over seeds, its interval that of the difference of logarithms.
    """
    found = gap(claim, evidence, log)
    if isinstance(found, ClaimVerdict):
        return replace(found, observed=None if found.observed is None else exp(found.observed))
    found = replace(found, mean=exp(found.mean), low=exp(found.low), high=exp(found.high))
    return _within(claim, found, _told(claim, found, "over"), claim.value or 0.0)


def best(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Left beats every other arm of its phase by the Holm-corrected p and `min_effect`; refuted if one beats it.

    It is looked at in each phase where it selects one arm of several: reproduced if all of them agree, refuted if one
    says so.
    """
    findings: list[ClaimVerdict] = []
    for phase in dict.fromkeys(arm.phase for arm in evidence.arms):
        arms = evidence.in_phase(phase)
        chosen = [arm for arm in arms if matches(claim.left or {}, arm)]
        if len(chosen) == 1 < len(arms):
            findings.append(_best_of(claim, evidence, chosen[0], arms))
        elif 1 < len(chosen) < len(arms):
            text = f"{len(chosen)} arms of phase {phase} are {describe(claim.left)}; a claim of the best selects one"
            findings.append(ClaimVerdict("undecided", text))
    if not findings:
        return ClaimVerdict("no data", f"no phase so far compares {describe(claim.left)} with another arm")
    return min(findings, key=lambda finding: ORDER.index(finding.verdict))


def monotone(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The metric falls (`decreasing`) or rises along the values of a setting, among arms that agree on all else.

    Reproduced if each step to the next value goes that way with an interval that excludes 0, and all of it by
    `min_effect`: every step must pass, which needs no correction (intersection-union test, Berger 1982). Refuted if
    one value differs from another the wrong way, after Holm over all pairs of values, by `min_effect`.
    """
    row = chain(claim, evidence)
    if row is None:
        return ClaimVerdict("no data", f"no phase so far has arms that differ in {short(claim.setting or '')} alone")
    outcomes = [cell for name in row.names for cell in row.cells[name].values()]
    if problem := incomplete(outcomes, claim.metric) or (ONE_SEED if row.seeds < 2 else None):
        return replace(problem, n=row.seeds, trials=row.trials)
    sign, least = DIRECTIONS[claim.direction or "decreasing"], evidence.least(claim)
    pairs: dict[tuple[int, int], Delta] = {}
    for i, name in enumerate(row.names):
        deltas = _deltas(evidence.judge(row.cells, claim, name, method=row.method))
        pairs |= {(i, j): deltas[row.names[j]] for j in range(i + 1, len(row.names))}
    corrected = holm([1.0 if delta.p is None else delta.p for delta in pairs.values()])
    wrong = [
        f"from {row.values[i]:g} to {row.values[j]:g}"
        for ((i, j), delta), p in zip(pairs.items(), corrected, strict=True)
        if p < 1 - evidence.confidence and sign * delta.mean >= least * ROUNDING and delta.mean
    ]
    steps = [pairs[i, i + 1] for i in range(len(row.names) - 1)]
    passed = sum(_upper(step, sign) < 0 for step in steps)
    whole = pairs[0, len(row.names) - 1]
    told = f"{claim.metric} changes by {_interval(whole.mean, whole.ci_low, whole.ci_high)} {row.where}"
    told = f"from {short(claim.setting or '')}={row.values[0]:g} to {row.values[-1]:g} {told}"
    if wrong:
        verdict, told = "refuted", f"{told}; it goes the other way {wrong[0]}"
    elif passed < len(steps):
        verdict, told = "undecided", f"{told}; {passed} of {len(steps)} steps go this way beyond the noise"
    elif abs(whole.mean) < least * ROUNDING:
        verdict, told = "undecided", f"{told}, less than min_effect {least:g}"
    else:
        verdict, told = "reproduced", f"{told}; each of the {len(steps)} steps goes this way beyond the noise"
    return ClaimVerdict(verdict, told, whole.mean, whole.ci_low, whole.ci_high, row.seeds, row.trials)


def arithmetic(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The expression has the value, to within the tolerance; no trial is needed."""
    found, value, tolerance = evaluate(claim.expression or ""), claim.value or 0.0, claim.tolerance or 0.0
    told = f"{claim.expression} = {found:.6g}, the claim says {value:.6g} +- {tolerance:.6g}"
    return ClaimVerdict("reproduced" if abs(found - value) <= tolerance else "refuted", told, observed=found)


@dataclass(frozen=True)
class Relation:
    """How a claim is decided, and which of its fields must and may be given."""

    decide: Callable[[Claim, Evidence], ClaimVerdict]
    needs: tuple[str, ...]
    allows: tuple[str, ...] = ()
    trains: bool = True  # whether it is about trials, so that `metric` and `phase` mean something


RELATIONS = {
    "less": Relation(less, ("left", "right")),
    "greater": Relation(greater, ("left", "right")),
    "equal": Relation(equal, ("left", "right", "tolerance")),
    "best": Relation(best, ("left",)),
    "monotone": Relation(monotone, ("setting", "direction"), ("left",)),
    "ratio": Relation(ratio, ("left", "right", "value", "tolerance")),
    "arithmetic": Relation(arithmetic, ("value", "expression", "tolerance"), trains=False),
}


def _ordered(claim: Claim, evidence: Evidence, sign: float) -> ClaimVerdict:
    found = gap(claim, evidence)
    if isinstance(found, ClaimVerdict):
        return found
    told, least = _told(claim, found, "minus"), evidence.least(claim)
    low, high = sorted((sign * found.low, sign * found.high))
    if high < 0 and abs(found.mean) >= least * ROUNDING:
        verdict = "reproduced"
    elif low > 0 and abs(found.mean) >= least * ROUNDING:
        verdict = "refuted"
    elif low > -least * ROUNDING:
        verdict, told = "refuted", f"{told}: if there is such an effect, it is less than min_effect {least:g}"
    elif high < 0:
        verdict, told = "undecided", f"{told}, less than min_effect {least:g}"
    else:
        verdict, told = "undecided", f"{told}, which contains 0"
    return ClaimVerdict(verdict, told, found.mean, found.low, found.high, found.n, found.trials)


def _within(claim: Claim, found: Difference, told: str, value: float) -> ClaimVerdict:
    """Equivalence: where the interval lies in terms of `value` +- tolerance."""
    low, high = value - (claim.tolerance or 0.0), value + (claim.tolerance or 0.0)
    if low <= found.low and found.high <= high:
        verdict, place = "reproduced", "all of it within"
    elif found.high < low or found.low > high:
        verdict, place = "refuted", "all of it outside"
    else:
        verdict, place = "undecided", "partly within"
    told = f"{told}, {place} [{low:.6g}, {high:.6g}]"
    return ClaimVerdict(verdict, told, found.mean, found.low, found.high, found.n, found.trials)


def _best_of(claim: Claim, evidence: Evidence, chosen: ClaimArm, arms: Sequence[ClaimArm]) -> ClaimVerdict:
    """Whether `chosen` is the best arm of its phase."""
    cells, n = evidence.cells(arms, claim.metric), len(chosen.trial_ids)
    own = list(cells[chosen.name].values())
    others = {name: list(row.values()) for name, row in cells.items() if name != chosen.name}
    trials = [trial_id for arm in arms for trial_id in arm.trial_ids.values()]
    told, beaten = f"{describe(claim.left)} in phase {chosen.phase}", "refuted"
    if winner := next((name for name, row in others.items() if evidence.lost(own, row, n, claim.metric)), None):
        return ClaimVerdict(beaten, f"{told} diverged with every seed, {winner} with none", n=n, trials=trials)
    if problem := incomplete(own, claim.metric) or (ONE_SEED if n < 2 else None):
        return replace(problem, n=n, trials=trials)
    goal = evidence.goal if claim.metric == evidence.metric else METRIC_GOALS[claim.metric]
    judgement = evidence.judge(cells, claim, chosen.name, goal=goal)
    ranked = [arm for arm in judgement.arms if arm.arm != chosen.name]
    out = {name for name, row in others.items() if evidence.lost(row, own, n, claim.metric)}
    not_beaten = {arm.arm: arm.verdict for arm in ranked if arm.verdict != "worse" and arm.arm not in out}
    rival = next((arm for arm in ranked if arm.delta and arm.delta.ci_low is not None), None)
    numbers = (None, None, None)
    if rival and rival.delta and rival.delta.ci_low is not None and rival.delta.ci_high is not None:
        numbers = (-rival.delta.mean, -rival.delta.ci_high, -rival.delta.ci_low)
        told = f"{told} minus the best other arm, {rival.arm}: {claim.metric} {_interval(*numbers)}, {n} seeds"
    if better := [name for name, verdict in not_beaten.items() if verdict == "better"]:
        return ClaimVerdict("refuted", f"{told}; {better[0]} is better", *numbers, n, trials)
    if not_beaten:
        listed = ", ".join(f"{name} ({verdict})" for name, verdict in list(not_beaten.items())[:3])
        return ClaimVerdict("undecided", f"{told}; not beaten: {listed}", *numbers, n, trials)
    return ClaimVerdict("reproduced", f"{told}; it beats all {len(others)} others", *numbers, n, trials)


def _told(claim: Claim, found: Difference, how: str) -> str:
    """`alpha=0.28 minus alpha=0.05: val_loss -0.03 [-0.04, -0.02] on 3 seeds of phase alpha`."""
    if found.mean in (inf, -inf) or (how == "over" and found.mean == 0):
        loser, winner = (claim.left, claim.right) if found.mean > 0 else (claim.right, claim.left)
        return f"{describe(loser)} diverged with every seed, {describe(winner)} with none, {found.where}"
    values = _interval(found.mean, found.low, found.high)
    return f"{describe(claim.left)} {how} {describe(claim.right)}: {claim.metric} {values} {found.where}"


def _deltas(judgement: Judgement) -> Mapping[str, Delta]:
    return {arm.arm: arm.delta for arm in judgement.arms if arm.delta}


def _upper(delta: Delta, sign: float) -> float:
    """The end of an interval that is nearer to being the wrong way."""
    return max(sign * end if end is not None else inf for end in (delta.ci_low, delta.ci_high))


def _interval(mean: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
    return f"{mean:.4g}{ends}" if mean is not None else ""
