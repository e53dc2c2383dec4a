"""How far the arms of a phase are from a baseline while they train, with the intervals of `tune/analysis`.

Each evaluation is judged as the phase is judged at its end: the differences are paired over seeds, and the most
cautious reading of the noise counts (`tune/analysis/noise.py`). The intervals are pointwise: one evaluation is judged
at a time, without a correction for their number.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tune.analysis.noise import Comparison, compare_arms
from tune.analysis.readings import NoisePrior
from tune.analysis.verdicts import Goal, judge
from tune.report.trial_logs import TrialLog, rounded, thinned
from tune.storage.records import TrialOutcome
from tune.storage.summaries import PhaseSummary, TrialRecord

JUDGED = ("baseline", "better", "worse", "equivalent", "undecided")  # verdicts of arms that finished all their seeds
# A comparison takes milliseconds, more with more arms: up to so many arms, so many evaluations and baselines at most.
LIMITS = {12: (24, 8), 40: (16, 3), 10**9: (12, 2)}
OTHER_LIMITS = (12, 2)  # of a metric that no verdict depends on: its evaluations and baselines
OTHER_ARMS = 40  # that are compared by such a metric, best first, besides baseline and winner
MAX_ARMS = 16  # arms whose differences are on the page, best first, for each baseline

Logs = Mapping[tuple[str, str], Sequence[TrialLog]]
Series = dict[int, dict[str, dict[int, float]]]  # tokens -> arm -> seed -> value


def differences(
    phase: PhaseSummary,
    logs: Logs,
    records: Sequence[TrialRecord] = (),
    prior: NoisePrior | None = None,
    metric: str = "val_loss",
) -> dict[str, Any] | None:
    """Returns the differences of arms from each baseline that a reader may choose; None if nothing can be compared.

    Args:
        phase: gives the arms, best first, their verdicts, and the confidence of the intervals.
        logs: the logs of all trials by phase and arm.
        records: of the trials of this phase. They give the differences at the end; without them there are none.
        prior: the noise that the phase borrows from earlier ones, as for its verdicts.
        metric: what is compared. Only the metric of the phase has a table at the end and borrows noise; others have
            fewer evaluations and baselines.

    The result is ready for JSON: `tokens` (of the evaluations), and by the index of a baseline its arms as
    [index of arm, means, half-widths], with None where an arm was not evaluated, and the rows of its final table as
    [index of arm, mean, low, high, Holm p, verdict].
    """
    names = [arm.arm for arm in phase.arms]
    judged = [arm.arm for arm in phase.arms if arm.verdict in JUDGED]
    points, most = next(limits for arms, limits in LIMITS.items() if len(judged) <= arms)
    special = dict.fromkeys(arm for arm in (phase.baseline, phase.winner) if arm in judged)
    if metric != phase.metric.name:
        points, most, prior, records = min(points, OTHER_LIMITS[0]), OTHER_LIMITS[1], None, ()
        judged = [arm for n, arm in enumerate(judged) if n < OTHER_ARMS or arm in special]
    series = _series({arm: logs.get((phase.phase, arm), ()) for arm in judged}, metric)
    tokens = thinned(sorted(series), points)
    chosen = [*special, *(arm for arm in judged if arm not in special)][:most]
    result: dict[int, Any] = {}
    for baseline in chosen:
        shown = [arm for arm in dict.fromkeys((*special, *judged)) if arm != baseline][:MAX_ARMS]
        compared = [_compare(series[count], baseline, phase.confidence, prior) for count in tokens]
        curves = [_curve(arm, names, compared) for arm in shown]
        curves = [curve for curve in curves if any(mean is not None for mean in curve[1])]
        if curves:
            final = _final_rows(phase, records, baseline, shown, prior) if metric == phase.metric.name else []
            result[names.index(baseline)] = {"arms": curves, "final": final}
    is_thinned = len(tokens) < len(series)
    return {"tokens": tokens, "thinned": is_thinned, "baselines": result} if result else None


def _series(arms: Mapping[str, Sequence[TrialLog]], metric: str) -> Series:
    """Returns values by tokens, or by step if tokens were not logged, where every trial of an arm has one."""
    series: Series = {}
    for arm, logs in arms.items():
        by_trial = []
        for log in logs:
            tokens = log.series("tokens")
            by_trial.append((log.seed, {int(tokens.get(step, step)): y for step, y in log.series(metric).items()}))
        common = set.intersection(*(set(values) for _, values in by_trial)) if len(by_trial) > 1 else set()
        for count in common:
            series.setdefault(count, {})[arm] = {seed: values[count] for seed, values in by_trial}
    return {count: arms_at for count, arms_at in series.items() if len(arms_at) > 1}


def _compare(
    values: dict[str, dict[int, float]], baseline: str, confidence: float, prior: NoisePrior | None
) -> Comparison | None:
    usable = {arm: sample for arm, sample in values.items() if len(sample) > 1}
    if baseline not in usable or len(usable) < 2:
        return None
    return compare_arms(usable, baseline, confidence, prior=prior)


def _curve(arm: str, names: Sequence[str], compared: Sequence[Comparison | None]) -> list[Any]:
    contrasts = [comparison.contrasts.get(arm) if comparison else None for comparison in compared]
    means = [None if contrast is None else rounded(contrast.difference) for contrast in contrasts]
    halves = [None if contrast is None else rounded(contrast.half_width) for contrast in contrasts]
    return [names.index(arm), means, halves]


def _final_rows(
    phase: PhaseSummary,
    records: Sequence[TrialRecord],
    baseline: str,
    shown: Sequence[str],
    prior: NoisePrior | None,
) -> list[list[Any]]:
    """Returns the rows of the table against `baseline`: those of the phase itself, or judged anew against another arm.

    A phase with looks is judged by its looks only, since its number of seeds depends on what they showed.
    """
    names = [arm.arm for arm in phase.arms]
    if baseline == phase.baseline:
        arms = phase.arms
    elif phase.looks or not records:
        return []
    else:
        outcomes: dict[str, dict[int, TrialOutcome]] = {}
        for record in records:
            value = record.metrics.get(phase.metric.name)
            outcome = TrialOutcome(record.status, value)  # type: ignore[arg-type]  (a str, checked in the journal)
            outcomes.setdefault(record.arm, {})[record.seed] = outcome
        if baseline not in outcomes:
            return []
        goal: Goal = "maximize" if phase.metric.goal == "maximize" else "minimize"
        rules = {"confidence": phase.confidence, "min_effect": phase.min_effect, "metric": phase.metric.name}
        arms = judge(outcomes, baseline=baseline, goal=goal, prior=prior, **rules).arms
    rows = {arm.arm: (arm.delta, arm.verdict) for arm in arms if arm.delta}
    return [
        [names.index(arm), delta.mean, delta.ci_low, delta.ci_high, delta.p_holm, verdict]
        for arm in shown
        if (found := rows.get(arm)) and (delta := found[0]) and (verdict := found[1])
    ]
