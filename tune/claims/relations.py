"""Decides the claims of a campaign: each is reproduced, refuted, undecided or without data.

A claim compares the arms that its `left` and `right` select by their complete settings, in every phase that has both.
Arms are paired if they are equal in everything else that varies in their phase. If no two are, all are paired, and the
sentence names what else differs. One pair of arms is judged like an arm and the baseline of its phase
(tune/analysis/verdicts.py: seed by seed, with the noise pooled over the phase). With several pairs, each seed's
differences are averaged first: the t interval over seeds (Student 1908) stays right if phases share trials or a seed
acts alike in all of them.

`confidence` is the campaign's; `min_effect` applies to the campaign's metric and is 0 for others. A wrong `less` or
`greater` is reproduced in at most (1 - confidence) / 2 of cases, 2.5 % by default, and a right one with an effect of
`min_effect` is refuted as rarely. Claims are not corrected against each other: of forty wrong claims, one may well be
reproduced. Surviving seeds alone decide nothing: with one seed, or an unfinished trial, a claim is undecided. For a
loss, a side loses if all of its seeds diverged and none of the other's, and if chance would do this in less than
(1 - confidence) / 2 of cases: 4 ** -seeds, since p (1 - p) <= 1 / 4; that is three seeds at 95 %.

A relation is a function (claim, evidence) -> verdict and one entry in `RELATIONS`, with the fields that it needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isfinite, log
from typing import Literal

from tune.analysis.verdicts import holm
from tune.claims.arithmetic import evaluate
from tune.claims.evidence import ONE_SEED, ClaimVerdict, Difference, Evidence, difference, incomplete, series_along
from tune.claims.selectors import ClaimArm, describe, matches, short
from tune.spec.schema import LOSS_METRICS, Claim
from tune.storage.summaries import ClaimResult, Delta

# The metrics that claims may be about, and which way is better.
METRIC_GOALS: dict[str, Literal["minimize", "maximize"]] = {
    **dict.fromkeys((*LOSS_METRICS, "peak_memory_bytes", "n_params", "steps", "tokens"), "minimize"),
    **dict.fromkeys(("weight_norm_error", "activation_norm_error", "r_replaced"), "minimize"),
    "tokens_per_second": "maximize",
}
DIRECTIONS = {"decreasing": 1.0, "increasing": -1.0}  # of the metric along a setting
SLACK = 1 - 1e-9  # so that rounding does not make an effect of exactly min_effect too small
PRECEDENCE = ("refuted", "undecided", "no data", "reproduced")  # the first of the verdicts of several phases decides


def judge_claims(claims: Sequence[Claim], evidence: Evidence) -> list[ClaimResult]:
    """Judges each claim by the arms of its phase, or of all phases; an infinite number becomes None."""
    results = []
    for claim in claims:
        relation = RELATIONS[claim.relation]
        here = [arm for arm in evidence.arms if claim.phase in (None, arm.phase)]
        found = relation.decide(claim, replace(evidence, arms=here))
        metric = claim.metric if relation.trains else None
        numbers = [_finite(value) for value in (found.observed, found.ci_low, found.ci_high)]
        about = (claim.id, claim.source, claim.says, claim.relation, metric, found.verdict)
        results.append(ClaimResult(*about, *numbers, n=found.n, trials=tuple(found.trials), why=found.why))
    return results


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def ordered(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """`less` is reproduced if the interval of left minus right lies below 0, and the mean `min_effect` or more below.

    Refuted if it lies above -`min_effect`: left is worse, or the two are equivalent. `greater` is its mirror image.
    """
    found = difference(claim, evidence)
    if isinstance(found, ClaimVerdict):
        return found
    sentence, min_effect = _sentence(claim, found, "minus"), evidence.min_effect_of(claim)
    sign = 1.0 if claim.relation == "less" else -1.0
    low, high = sorted((sign * found.low, sign * found.high))
    if (high < 0 or low > 0) and _reaches(found.mean, min_effect):
        return found.verdict("reproduced" if high < 0 else "refuted", sentence)
    if low > -min_effect * SLACK:
        text = f"{sentence}: if there is such an effect, it is less than min_effect {min_effect:g}"
        return found.verdict("refuted", text)
    reason = f"less than min_effect {min_effect:g}" if high < 0 else "which contains 0"
    return found.verdict("undecided", f"{sentence}, {reason}")


def equal(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The interval of left minus right lies within +-tolerance (reproduced) or wholly outside (refuted).

    Two one-sided tests at (1 - confidence) / 2 each (Schuirmann 1987).
    """
    found = difference(claim, evidence)
    return found if isinstance(found, ClaimVerdict) else _within(claim, found, _sentence(claim, found, "minus"), 0.0)


def ratio(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The interval of left over right lies within value +-tolerance (reproduced) or wholly outside (refuted).

    The ratio is the geometric mean over seeds, its interval that of the difference of logarithms.
    """
    found = difference(claim, evidence, log)
    if isinstance(found, ClaimVerdict):
        return replace(found, observed=None if found.observed is None else exp(found.observed))
    found = replace(found, mean=exp(found.mean), low=exp(found.low), high=exp(found.high))
    return _within(claim, found, _sentence(claim, found, "over"), claim.value or 0.0)


def best(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Left beats every other arm of its phase by the Holm-corrected p and `min_effect`; refuted if one beats it.

    Every phase in which `left` selects one of several arms is judged: reproduced if all agree, refuted if one refutes.
    """
    found: list[ClaimVerdict] = []
    for phase in dict.fromkeys(arm.phase for arm in evidence.arms):
        arms = evidence.in_phase(phase)
        chosen = [arm for arm in arms if matches(claim.left or {}, arm)]
        if len(chosen) == 1 < len(arms):
            found.append(_best_of(claim, evidence, chosen[0], arms))
        elif 1 < len(chosen) < len(arms):
            text = f"{len(chosen)} arms of phase {phase} are {describe(claim.left)}; a claim of the best selects one"
            found.append(ClaimVerdict("undecided", text))
    if not found:
        return ClaimVerdict("no data", f"no phase so far compares {describe(claim.left)} with another arm")
    return min(found, key=lambda verdict: PRECEDENCE.index(verdict.verdict))


def monotone(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The metric falls (`decreasing`) or rises along the values of a setting, among arms equal in everything else.

    Reproduced if the interval of each step to the next value excludes 0 in that direction, and the whole change is at
    least `min_effect`: every step must pass, which needs no correction (intersection-union test, Berger 1982). Refuted
    if two values differ by `min_effect` in the other direction, after Holm over all pairs of values.
    """
    series = series_along(claim, evidence)
    if series is None:
        return ClaimVerdict("no data", f"no phase so far has arms that differ in {short(claim.setting or '')} alone")
    outcomes = [outcome for name in series.names for outcome in series.outcomes[name].values()]
    if problem := incomplete(outcomes, claim.metric) or (ONE_SEED if series.n < 2 else None):
        return replace(problem, n=series.n, trials=series.trials)
    sign, min_effect = DIRECTIONS[claim.direction or "decreasing"], evidence.min_effect_of(claim)
    pairs: dict[tuple[int, int], Delta] = {}
    for i, name in enumerate(series.names):
        deltas = evidence.deltas(series.outcomes, claim, name, series.method)
        pairs |= {(i, j): deltas[series.names[j]] for j in range(i + 1, len(series.names))}
    corrected = holm([1.0 if delta.p is None else delta.p for delta in pairs.values()])
    wrong = [
        f"from {series.values[i]:g} to {series.values[j]:g}"
        for ((i, j), delta), p in zip(pairs.items(), corrected, strict=True)
        if p < 1 - evidence.confidence and sign * delta.mean > 0 and _reaches(delta.mean, min_effect)
    ]
    steps = [pairs[i, i + 1] for i in range(len(series.names) - 1)]
    passed = sum(_upper(step, sign) < 0 for step in steps)
    whole = pairs[0, len(series.names) - 1]
    sentence = f"{claim.metric} changes by {_interval(whole.mean, whole.ci_low, whole.ci_high)} {series.place}"
    sentence = f"from {short(claim.setting or '')}={series.values[0]:g} to {series.values[-1]:g} {sentence}"
    if wrong:
        verdict, reason = "refuted", f"; it goes the other way {wrong[0]}"
    elif passed < len(steps):
        verdict, reason = "undecided", f"; {passed} of {len(steps)} steps go this way beyond the noise"
    elif not _reaches(whole.mean, min_effect):
        verdict, reason = "undecided", f", less than min_effect {min_effect:g}"
    else:
        verdict, reason = "reproduced", f"; each of the {len(steps)} steps goes this way beyond the noise"
    return ClaimVerdict(verdict, sentence + reason, whole.mean, whole.ci_low, whole.ci_high, series.n, series.trials)


def arithmetic(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """The expression has the value, within the tolerance; no trial is needed."""
    result, value, tolerance = evaluate(claim.expression or ""), claim.value or 0.0, claim.tolerance or 0.0
    sentence = f"{claim.expression} = {result:.6g}, the claim says {value:.6g} +- {tolerance:.6g}"
    return ClaimVerdict("reproduced" if abs(result - value) <= tolerance else "refuted", sentence, observed=result)


@dataclass(frozen=True)
class Relation:
    """How a claim is decided, and the fields that it needs and allows."""

    decide: Callable[[Claim, Evidence], ClaimVerdict]
    needs: tuple[str, ...]
    allows: tuple[str, ...] = ()
    trains: bool = True  # whether it is about trials, so that it may have `metric` and `phase`


RELATIONS = {
    "less": Relation(ordered, ("left", "right")),
    "greater": Relation(ordered, ("left", "right")),
    "equal": Relation(equal, ("left", "right", "tolerance")),
    "best": Relation(best, ("left",)),
    "monotone": Relation(monotone, ("setting", "direction"), ("left",)),
    "ratio": Relation(ratio, ("left", "right", "value", "tolerance")),
    "arithmetic": Relation(arithmetic, ("value", "expression", "tolerance"), trains=False),
}


def _within(claim: Claim, found: Difference, sentence: str, value: float) -> ClaimVerdict:
    """Equivalence: where the interval lies relative to `value` +- tolerance."""
    low, high = value - (claim.tolerance or 0.0), value + (claim.tolerance or 0.0)
    if low <= found.low and found.high <= high:
        verdict, position = "reproduced", "all of it within"
    elif found.high < low or found.low > high:
        verdict, position = "refuted", "all of it outside"
    else:
        verdict, position = "undecided", "partly within"
    return found.verdict(verdict, f"{sentence}, {position} [{low:.6g}, {high:.6g}]")


def _best_of(claim: Claim, evidence: Evidence, chosen: ClaimArm, arms: Sequence[ClaimArm]) -> ClaimVerdict:
    outcomes, n = evidence.outcomes(arms, claim.metric), len(chosen.trial_ids)
    own = list(outcomes[chosen.name].values())
    others = {name: list(row.values()) for name, row in outcomes.items() if name != chosen.name}
    trials = [trial_id for arm in arms for trial_id in arm.trial_ids.values()]
    sentence = f"{describe(claim.left)} in phase {chosen.phase}"
    if winner := next((name for name, row in others.items() if evidence.lost(own, row, n, claim.metric)), None):
        text = f"{sentence} diverged with every seed, {winner} with none"
        return ClaimVerdict("refuted", text, n=n, trials=trials)
    if problem := incomplete(own, claim.metric) or (ONE_SEED if n < 2 else None):
        return replace(problem, n=n, trials=trials)
    goal = evidence.goal if claim.metric == evidence.metric else METRIC_GOALS[claim.metric]
    judgement = evidence.judge(outcomes, claim, chosen.name, goal=goal)
    ranked = [arm for arm in judgement.arms if arm.arm != chosen.name]
    out = {name for name, row in others.items() if evidence.lost(row, own, n, claim.metric)}
    not_beaten = {arm.arm: arm.verdict for arm in ranked if arm.verdict != "worse" and arm.arm not in out}
    numbers = (None, None, None)
    for arm in ranked:
        if arm.delta and arm.delta.ci_low is not None and arm.delta.ci_high is not None:
            numbers = (-arm.delta.mean, -arm.delta.ci_high, -arm.delta.ci_low)
            rival = f"the best other arm, {arm.arm}: {claim.metric} {_interval(*numbers)}"
            sentence = f"{sentence} minus {rival}, {n} seeds"
            break
    if better := [name for name, verdict in not_beaten.items() if verdict == "better"]:
        return ClaimVerdict("refuted", f"{sentence}; {better[0]} is better", *numbers, n, trials)
    if not_beaten:
        listed = ", ".join(f"{name} ({verdict})" for name, verdict in list(not_beaten.items())[:3])
        return ClaimVerdict("undecided", f"{sentence}; not beaten: {listed}", *numbers, n, trials)
    return ClaimVerdict("reproduced", f"{sentence}; it beats all {len(others)} others", *numbers, n, trials)


def _sentence(claim: Claim, found: Difference, operator: str) -> str:
    """`alpha=0.28 minus alpha=0.05: val_loss -0.03 [-0.04, -0.02] on 3 seeds of phase alpha`."""
    if found.mean in (inf, -inf) or (operator == "over" and found.mean == 0):
        loser, winner = (claim.left, claim.right) if found.mean > 0 else (claim.right, claim.left)
        return f"{describe(loser)} diverged with every seed, {describe(winner)} with none, {found.place}"
    values = _interval(found.mean, found.low, found.high)
    return f"{describe(claim.left)} {operator} {describe(claim.right)}: {claim.metric} {values} {found.place}"


def _reaches(effect: float, min_effect: float) -> bool:
    return abs(effect) >= min_effect * SLACK


def _upper(delta: Delta, sign: float) -> float:
    """The end of an interval that is nearer to the wrong direction."""
    return max(sign * end if end is not None else inf for end in (delta.ci_low, delta.ci_high))


def _interval(mean: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
    return f"{mean:.4g}{ends}" if mean is not None else ""
