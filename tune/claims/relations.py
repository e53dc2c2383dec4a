"""Judges the claims of a campaign; the verdict is `reproduced`, `refuted`, `undecided` or `no data`.

A claim compares the arms that its `left` and `right` select by their complete settings, in every phase that has both;
`paired_arms` pairs them. A single pair is judged like an arm and the baseline of its phase (tune/analysis/verdicts.py:
seed by seed, with the noise that the phase shows). With several pairs, the differences are first averaged per seed, so
the t interval over seeds (Student 1908) remains valid if phases share trials or a seed has the same effect in all.
`below`, `above` and `synergy` use the t interval over the seeds of the arms they name, and no other arm.

`confidence` is the campaign's; `min_effect` applies to the campaign's metric and is 0 for others. A false `less` or
`greater` is reproduced with a probability of at most (1 - confidence) / 2, 2.5 % by default, and a true one with an
effect of `min_effect` is refuted just as rarely. There is no correction for multiple claims: of forty false claims, one
may well be reproduced. A claim is undecided if it has only one seed, or if a trial is unfinished: the surviving seeds
would be a biased sample. For a loss, a side loses if all of its seeds diverged, all seeds of the other side finished,
and chance does this with a probability of at most (1 - confidence) / 2. With divergence probability p, it is
(p (1 - p)) ** seeds <= 4 ** -seeds; three seeds are enough at 95 %.

To add a relation, write a function (claim, evidence) -> verdict and add it to `RELATIONS` with the fields it needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import exp, inf, isfinite, log, sqrt

from ngpt.config.base import ConfigError
from tune import format as fmt
from tune.analysis.power import MAX_SEEDS, Design, seeds_to_decide
from tune.analysis.verdicts import holm
from tune.claims.arithmetic import evaluate
from tune.claims.evidence import (
    ONE_SEED,
    ClaimVerdict,
    Difference,
    Evidence,
    difference,
    incomplete,
    series_along,
    weighted_sum,
)
from tune.claims.selectors import ClaimArm, describe, matches
from tune.spec.metrics import metric_goal
from tune.spec.reading import short
from tune.spec.schema import Claim
from tune.storage.summaries import ClaimResult

DIRECTIONS = {"decreasing": 1.0, "increasing": -1.0}  # factors that make a change in the claimed direction negative
SLACK = 1 - 1e-9  # relative tolerance, so that an effect of exactly min_effect passes despite rounding
PRECEDENCE = ("refuted", "undecided", "no data", "reproduced")  # the earliest one decides if phases differ


def judge_claims(claims: Sequence[Claim], evidence: Evidence) -> list[ClaimResult]:
    """Judges each claim by the arms of its phase, or of all phases; infinite numbers become None."""
    results = []
    for claim in claims:
        relation = RELATIONS.get(claim.relation)
        arms = [arm for arm in evidence.arms if claim.phase in (None, arm.phase)]
        problem = _unjudgeable(claim, evidence)
        verdict = _verdict(relation, claim, replace(evidence, arms=arms)) if relation and not problem else None
        verdict = verdict or ClaimVerdict("no data", problem)
        metric = claim.metric if relation and relation.uses_trials else None
        numbers = (verdict.observed, verdict.ci_low, verdict.ci_high)
        numbers = [number if number is not None and isfinite(number) else None for number in numbers]
        fields = (claim.id, claim.source, claim.says, claim.relation, metric, verdict.verdict, *numbers)
        results.append(ClaimResult(*fields, n=verdict.n, trials=tuple(verdict.trials), why=verdict.why))
    return results


def _verdict(relation: "Relation", claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Judges a claim. What goes wrong in a relation of a plug-in becomes its reason, and does not stop the campaign."""
    if relation.judge.__module__ == __name__:
        return relation.judge(claim, evidence)
    try:
        verdict = relation.judge(claim, evidence)
        if isinstance(verdict, ClaimVerdict) and verdict.verdict in PRECEDENCE:
            return verdict
        problem = f"returns {verdict!r} instead of a ClaimVerdict with one of {', '.join(PRECEDENCE)}"
    except Exception as error:  # whatever the code of a plug-in raises
        problem = f"fails: {type(error).__name__}: {error}"
    return ClaimVerdict("no data", f"the relation {claim.relation} {fmt.plain(problem)}")


def _unjudgeable(claim: Claim, evidence: Evidence) -> str:
    """Why a claim from a journal, perhaps of another version, cannot be judged; empty if it can."""
    if claim.relation not in RELATIONS:
        return f"this version does not know the relation {fmt.plain(claim.relation)!r}"
    if missing := [name for name in RELATIONS[claim.relation].needs if getattr(claim, name) is None]:
        return f"the claim lacks {fmt.listing(missing)}"
    has_goal = not RELATIONS[claim.relation].needs_goal or _goal(claim, evidence) is not None
    if not has_goal or claim.direction not in (None, *DIRECTIONS):  # perhaps a metric of a plug-in
        return "this version does not know its metric or direction"
    try:
        evaluate(claim.expression or 0)
    except ConfigError as error:
        return str(error)
    return ""


def judge_order(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Judges `less`, and `greater` with the signs reversed, by the interval of left minus right.

    `less` is reproduced if the interval lies below 0 and the mean is at most -`min_effect`. It is refuted if the
    interval lies above -`min_effect`: left is greater, or the difference is negligible.
    """
    result = difference(claim, evidence)
    if isinstance(result, ClaimVerdict):
        return result
    sign = 1.0 if claim.relation == "less" else -1.0
    return _judge_sign(result, sign, _sentence(claim, result), evidence.min_effect_of(claim), evidence)


def judge_level(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Judges `below` and `above`: the mean of the left arm over seeds against `value`, by its t interval."""
    result = weighted_sum(claim, evidence, [(claim.left or {}, 1.0)])
    if isinstance(result, ClaimVerdict):
        return result
    value, values = claim.value or 0.0, _interval(result.mean, result.low, result.high)
    sentence = f"{describe(claim.left)}: {claim.metric} {values} {result.place}"
    excess = replace(result, mean=result.mean - value, low=result.low - value, high=result.high - value)
    sign = 1.0 if claim.relation == "below" else -1.0
    verdict = _judge_sign(excess, sign, sentence, 0.0, evidence, border=value)
    return replace(verdict, observed=result.mean, ci_low=result.low, ci_high=result.high)


def judge_synergy(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Judges whether `left`, which joins the changes of `parts`, gains more over `right` than they do together.

    The number is gain of left minus sum of the gains of the parts: the interaction of a factorial experiment. It is
    positive if left does better than the sum.
    """
    parts, worse = claim.parts or (), 1.0 if _goal(claim, evidence) == "minimize" else -1.0
    terms = [
        (claim.left or {}, -worse),
        *((part, worse) for part in parts),
        (claim.right or {}, worse * (1 - len(parts))),
    ]
    result = weighted_sum(claim, evidence, terms)
    if isinstance(result, ClaimVerdict):
        return result
    names = fmt.listing([describe(part) for part in parts])
    values = _interval(result.mean, result.low, result.high)
    sentence = (
        f"gain of {describe(claim.left)} minus the sum of the gains of {names}: {claim.metric} {values} {result.place}"
    )
    return _judge_sign(result, -1.0, sentence, evidence.min_effect_of(claim), evidence)


def _judge_sign(
    result: Difference, sign: float, sentence: str, min_effect: float, evidence: Evidence, *, border: float = 0.0
) -> ClaimVerdict:
    """Judges whether `sign` times a number minus `border` is below 0, by its interval and by at least `min_effect`."""
    low, high = sorted((sign * result.low, sign * result.high))
    if (high < 0 or low > 0) and _reaches(result.mean, min_effect):
        return result.verdict("reproduced" if high < 0 else "refuted", sentence)
    if low > -min_effect * SLACK:
        text = f"{sentence}: if there is such an effect, it is less than min_effect {min_effect:g}"
        return result.verdict("refuted", text)
    reason = f"less than min_effect {min_effect:g}" if high < 0 else f"which contains {border:g}"
    if sign * result.mean <= -min_effect:
        needed = _seeds_to_decide(result, result.mean, min_effect, evidence)
    else:
        needed = _seeds_to_decide(result, sign * result.mean + min_effect, 0.0, evidence)
    return result.verdict("undecided", f"{sentence}, {reason}; {needed}")


def judge_equivalence(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Judges `equal` (left minus right lies within +-tolerance) and `ratio` (left over right, value +-tolerance).

    Reproduced if the interval lies within these bounds, refuted if it lies entirely outside: two one-sided tests at
    (1 - confidence) / 2 each (Schuirmann 1987). The ratio is the geometric mean over seeds. Its interval comes from
    the difference of the logarithms.
    """
    is_ratio = claim.relation == "ratio"
    result = difference(claim, evidence, log if is_ratio else float)
    if isinstance(result, ClaimVerdict):
        return replace(result, observed=_exp(result.observed)) if is_ratio and result.observed is not None else result
    estimate = result  # for a ratio, of its logarithm
    if is_ratio:
        result = replace(result, mean=_exp(result.mean), low=_exp(result.low), high=_exp(result.high))
    value, tolerance = claim.value or 0.0, claim.tolerance or 0.0
    low, high = value - tolerance, value + tolerance
    if low <= result.low and result.high <= high:
        verdict, position = "reproduced", "all of it within"
    elif result.high < low or result.low > high:
        verdict, position = "refuted", "all of it outside"
    else:
        verdict, position = "undecided", "partly within"
    text = f"{_sentence(claim, result)}, {position} [{fmt.digits(low, 6)}, {fmt.digits(high, 6)}]"
    if verdict == "undecided":
        bounds = (log(low) if low > 0 else -inf, log(high) if high > 0 else -inf) if is_ratio else (low, high)
        text = f"{text}; {_seeds_to_locate(estimate, *bounds, evidence)}"
    return result.verdict(verdict, text)


def judge_best(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Reproduced if the left arm is better than every other arm of its phase, refuted if any other arm is better.

    Better means a significant Holm-corrected p and a difference of at least `min_effect`. Each phase in which `left`
    selects one of several arms is judged; the claim is refuted if one phase refutes it, reproduced if all reproduce it.
    """
    verdicts: list[ClaimVerdict] = []
    for phase in dict.fromkeys(arm.phase for arm in evidence.arms):
        arms = evidence.in_phase(phase)
        chosen = [arm for arm in arms if matches(claim.left or {}, arm)]
        if len(chosen) == 1 < len(arms):
            verdicts.append(_judge_best_in_phase(claim, evidence, chosen[0], arms))
        elif 1 < len(chosen) < len(arms):
            text = f"{len(chosen)} arms of phase {phase} are {describe(claim.left)}; `best` needs `left` to select one"
            verdicts.append(ClaimVerdict("undecided", text))
    if not verdicts:
        return ClaimVerdict("no data", f"no phase so far compares {describe(claim.left)} with another arm")
    return min(verdicts, key=lambda verdict: PRECEDENCE.index(verdict.verdict))


def judge_monotone(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Judges whether the metric falls (`decreasing`) or rises with a setting, among arms equal in everything else.

    Reproduced if, from each value to the next, the interval of the change excludes 0 in the claimed direction, and the
    total change is at least `min_effect`. Every step must pass, so no correction is needed (intersection-union test,
    Berger 1982). Refuted if any two values differ significantly (Holm over all pairs) and by at least `min_effect` in
    the opposite direction.
    """
    series = series_along(claim, evidence)
    if series is None:
        return ClaimVerdict("no data", f"no phase so far has arms that differ in {short(claim.setting or '')} alone")
    outcomes = [outcome for name in series.names for outcome in series.outcomes[name].values()]
    if problem := incomplete(outcomes, claim.metric) or (ONE_SEED if series.n < 2 else None):
        return replace(problem, n=series.n, trials=series.trials)
    sign, min_effect = DIRECTIONS[claim.direction or "decreasing"], evidence.min_effect_of(claim)
    deltas = evidence.deltas(series.outcomes, claim, series.names, series.method)
    pairs = {(i, j): deltas[series.names[j], series.names[i]] for i, j in combinations(range(len(series.names)), 2)}
    corrected = holm([1.0 if delta.p is None else delta.p for delta in pairs.values()])
    wrong = [
        f"from {fmt.digits(series.values[i], 6)} to {fmt.digits(series.values[j], 6)}"
        for ((i, j), delta), p in zip(pairs.items(), corrected, strict=True)
        if p < 1 - evidence.confidence and sign * delta.mean > 0 and _reaches(delta.mean, min_effect)
    ]
    steps = [pairs[i, i + 1] for i in range(len(series.names) - 1)]
    passed = sum(all(end is not None and sign * end < 0 for end in (step.ci_low, step.ci_high)) for step in steps)
    whole = pairs[0, len(series.names) - 1]
    sentence = f"{claim.metric} changes by {_interval(whole.mean, whole.ci_low, whole.ci_high)} {series.place}"
    first, last = (fmt.digits(series.values[end], 6) for end in (0, -1))
    sentence = f"from {short(claim.setting or '')}={first} to {last} {sentence}"
    if wrong:
        verdict, reason = "refuted", f"; it goes the other way {wrong[0]}"
    elif passed < len(steps):
        verdict, reason = "undecided", f"; {passed} of {len(steps)} steps go this way beyond the noise"
    elif not _reaches(whole.mean, min_effect):
        verdict, reason = "undecided", f", less than min_effect {min_effect:g}"
    else:
        verdict, reason = "reproduced", f"; each of the {len(steps)} steps goes this way beyond the noise"
    return ClaimVerdict(verdict, sentence + reason, whole.mean, whole.ci_low, whole.ci_high, series.n, series.trials)


def judge_arithmetic(claim: Claim, evidence: Evidence) -> ClaimVerdict:
    """Checks that the expression equals the value within the tolerance; no trials are needed."""
    computed, value, tolerance = evaluate(claim.expression or ""), claim.value or 0.0, claim.tolerance or 0.0
    sentence = (
        f"{claim.expression} = {fmt.digits(computed, 6)}, the claim says {fmt.digits(value, 6)} ± {tolerance:.6g}"
    )
    return ClaimVerdict("reproduced" if abs(computed - value) <= tolerance else "refuted", sentence, observed=computed)


@dataclass(frozen=True)
class Relation:
    """The function that judges a claim, and the fields that the claim needs and allows."""

    judge: Callable[[Claim, Evidence], ClaimVerdict]
    needs: tuple[str, ...]
    allows: tuple[str, ...] = ()
    uses_trials: bool = True  # if so, a claim may also have `metric` and `phase`
    needs_goal: bool = False  # whether it depends on lower or higher values being better


RELATIONS = {
    "less": Relation(judge_order, ("left", "right")),
    "greater": Relation(judge_order, ("left", "right")),
    "equal": Relation(judge_equivalence, ("left", "right", "tolerance")),
    "below": Relation(judge_level, ("left", "value")),
    "above": Relation(judge_level, ("left", "value")),
    "synergy": Relation(judge_synergy, ("left", "right", "parts"), needs_goal=True),
    "best": Relation(judge_best, ("left",), needs_goal=True),
    "monotone": Relation(judge_monotone, ("setting", "direction"), ("left",)),
    "ratio": Relation(judge_equivalence, ("left", "right", "value", "tolerance")),
    "arithmetic": Relation(judge_arithmetic, ("value", "expression", "tolerance"), uses_trials=False),
}


def _judge_best_in_phase(claim: Claim, evidence: Evidence, chosen: ClaimArm, arms: Sequence[ClaimArm]) -> ClaimVerdict:
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
    judgement = evidence.judge(outcomes, claim, chosen.name, goal=_goal(claim, evidence))
    ranked = [arm for arm in judgement.arms if arm.arm != chosen.name]
    diverged = {name for name, row in others.items() if evidence.lost(row, own, n, claim.metric)}
    not_beaten = {arm.arm: arm.verdict for arm in ranked if arm.verdict != "worse" and arm.arm not in diverged}
    numbers = (None, None, None)  # chosen minus the best other arm, with its interval
    for arm in ranked:
        if arm.delta and arm.delta.ci_low is not None and arm.delta.ci_high is not None:
            numbers = (-arm.delta.mean, -arm.delta.ci_high, -arm.delta.ci_low)
            rival = f"the best other arm, {arm.arm}: {claim.metric} {_interval(*numbers)}"
            sentence = f"{sentence} minus {rival}, {n} seeds"
            break
    if better := [name for name, verdict in not_beaten.items() if verdict == "better"]:
        return ClaimVerdict("refuted", f"{sentence}; {better[0]} is better", *numbers, n, trials)
    if not_beaten:
        needed = {arm.arm: f", about {arm.seeds_to_decide} seeds" for arm in ranked if arm.seeds_to_decide}
        listed = ", ".join(f"{name} ({verdict}{needed.get(name, '')})" for name, verdict in [*not_beaten.items()][:3])
        return ClaimVerdict("undecided", f"{sentence}; not beaten: {listed}", *numbers, n, trials)
    return ClaimVerdict("reproduced", f"{sentence}; it beats all {len(others)} others", *numbers, n, trials)


def _goal(claim: Claim, evidence: Evidence) -> str | None:
    """Whether lower or higher values are better; None if neither the campaign nor this version knows it."""
    return evidence.goal if claim.metric == evidence.metric else claim.goal or metric_goal(claim.metric)


def _seeds_to_locate(result: Difference, low: float, high: float, evidence: Evidence) -> str:
    """Says how many seeds would show whether the true value lies in [low, high]; `low` may be -inf."""
    center, room = (low + high) / 2, (high - low) / 2
    if isfinite(low) and abs(result.mean - center) < room:
        return _seeds_to_decide(result, result.mean - center, room, evidence)
    distance = result.mean - high if result.mean > center else low - result.mean
    return _seeds_to_decide(result, distance, 0.0, evidence)


def _seeds_to_decide(result: Difference, effect: float, min_effect: float, evidence: Evidence) -> str:
    """Says how many seeds would tell `effect` from 0, or if it is smaller than `min_effect`, from +-`min_effect`."""
    from scipy.special import stdtrit

    needed = None
    if result.df:
        standard_error = (result.high - result.low) / 2 / float(stdtrit(result.df, 0.5 + evidence.confidence / 2))
        sd = standard_error * sqrt(result.n / 2)
        needed = seeds_to_decide(effect, Design(2, sd, confidence=evidence.confidence, min_effect=min_effect))
    count = f"{MAX_SEEDS:,}" if needed is None else f"about {max(needed, result.n + 1)}"
    return f"{count} seeds would {'not ' if needed is None else ''}decide it"


def _sentence(claim: Claim, result: Difference) -> str:
    """For example `alpha=0.28 minus alpha=0.05: val_loss -0.03 [-0.04, -0.02] on 3 seeds of phase alpha`."""
    operator = "over" if claim.relation == "ratio" else "minus"
    if result.mean in (inf, -inf) or (operator == "over" and result.mean == 0):
        loser, winner = (claim.left, claim.right) if result.mean > 0 else (claim.right, claim.left)
        return f"{describe(loser)} diverged with every seed, {describe(winner)} with none, {result.place}"
    values = _interval(result.mean, result.low, result.high)
    return f"{describe(claim.left)} {operator} {describe(claim.right)}: {claim.metric} {values} {result.place}"


def _exp(x: float) -> float:
    """The exponential without overflow; infinite only for a side that diverged with every seed."""
    return x if x == inf else exp(min(x, 700.0))


def _reaches(effect: float, min_effect: float) -> bool:
    return abs(effect) >= min_effect * SLACK


def _interval(mean: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{fmt.digits(low)}, {fmt.digits(high)}]"
    return f"{fmt.digits(mean)}{ends}" if mean is not None else ""
