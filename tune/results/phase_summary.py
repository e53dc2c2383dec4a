"""Computes the trial records and the summary of a phase from the state of the campaign."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from tune.analysis.readings import NoisePrior
from tune.analysis.selection import shrunken_delta
from tune.analysis.sequential import is_over, judge_by_looks
from tune.analysis.spreads import metric_spread
from tune.analysis.text_error import text_standard_error
from tune.analysis.verdicts import Judgement, Outcomes, judge
from tune.planning.confirmation import best_arm
from tune.results.phase_warnings import phase_warnings
from tune.results.snapshot import ArmSoFar
from tune.storage.records import TrialOutcome
from tune.storage.state import ArmState, CampaignState, PhaseState
from tune.storage.summaries import (
    DIAGNOSTICS,
    ArmSummary,
    Delta,
    MetricSpread,
    Objective,
    PhaseSummary,
    Spread,
    TrialCounts,
    TrialRecord,
)

# Metrics of a record that have fields of their own in a summary, or say how a trial was run.
OWN_FIELDS = {
    *("val_loss", "val_bpb", "train_loss", "steps", "tokens", "flops", "tokens_per_second", "peak_memory_bytes"),
    *("n_params", "batch_size", "micro_batch_size", "initial_val_loss", "skipped_steps", "rollbacks"),
}
MAX_METRICS = 200  # of a phase; the results may come from somebody else
ALONE = {  # why a phase has only a baseline, by whether it confirms a search
    True: "no arm of the search has a better mean than the baseline, so there is nothing to confirm",
    False: "there is nothing to compare: its only arm is the baseline itself",
}
RESULT_FIELDS = ("trial_id", "config", "status", "metrics", "error", "attempt", "started_at", "seconds", "provenance")
AVERAGED = (
    "val_bpb",
    "train_loss",
    "tokens_per_second",
    "peak_memory_bytes",
)  # metrics that an arm averages over its finished trials


def phase_records(state: CampaignState, phase: PhaseState) -> list[TrialRecord]:
    """Returns a record for each trial of the phase that has a result, seed by seed and arm by arm."""
    added = [name for name in phase_metrics(state, phase) if name not in DIAGNOSTICS]
    return [
        _record(state, phase, arm, seed, result, added)
        for seed in phase.seeds
        for arm in phase.arms
        if seed in arm.trial_ids and (result := state.results.get(arm.trial_ids[seed])) is not None
    ]


def phase_metrics(state: CampaignState, phase: PhaseState) -> list[str]:
    """The metrics that any trial of the phase has, and that have no field of their own in a summary, sorted."""
    results = (state.results[trial_id] for trial_id in phase.trial_ids if trial_id in state.results)
    return sorted({name for result in results for name in result["metrics"]} - OWN_FIELDS)[:MAX_METRICS]


def _record(
    state: CampaignState,
    phase: PhaseState,
    arm: ArmState,
    seed: int,
    result: Mapping[str, Any],
    added: Sequence[str],
) -> TrialRecord:
    """The record of a trial; those of the metrics `added` that it lacks are null in it."""
    metrics = dict.fromkeys(added) | dict(result["metrics"])
    is_over = result["status"] == "finished"
    return TrialRecord(
        campaign=state.campaign["campaign"],
        phase=phase.name,
        arm=arm.name,
        seed=seed,
        overrides={**phase.base, **arm.overrides},
        reused_from=None if result["phase"] == phase.name else result["phase"],
        unmeasured=tuple(name for name in added if metrics[name] is None) if is_over else (),
        **{name: result[name] for name in RESULT_FIELDS if name != "metrics"},
        metrics=metrics,
    )


def judge_phase(state: CampaignState, phase: PhaseState, outcomes: Outcomes) -> Judgement:
    """Compares the arms of a phase by the rules of the campaign."""
    metric = state.campaign["metric"]
    prior = NoisePrior(*phase.fresh.prior) if phase.fresh and phase.fresh.prior else None
    rule = {"baseline": phase.baseline, "metric": metric["name"], "prior": prior, **_limits(state, phase)}
    return judge_by_looks(outcomes, phase.looks, goal=metric["goal"], **rule)


def _limits(state: CampaignState, phase: PhaseState) -> dict[str, Any]:
    confidence = (phase.fresh and phase.fresh.confidence) or state.campaign["confidence"]
    return {"confidence": confidence, "min_effect": state.campaign["min_effect"]}


def arms_so_far(state: CampaignState, phase: PhaseState) -> tuple[ArmSoFar, ...]:
    """Compares the arms of a phase by the trials that have ended, best first; those without a difference come last.

    Trials that have not ended are left out, as if they were not planned: which ones these are depends on the order of
    the seeds, not on their results. Verdicts are left out too, since they are for the complete phase. An arm that
    `judge` cannot compare yet has the mean difference over the seeds that it shares with the baseline, and no interval.
    """
    planned = _outcomes(state, phase, state.campaign["metric"]["name"])
    ended = {
        name: {seed: outcome for seed, outcome in row.items() if outcome.status != "missing"}
        for name, row in planned.items()
    }
    if not any(ended.values()):
        return ()
    judged = {arm.arm: arm for arm in judge_phase(state, phase, ended).arms}
    deltas = {
        name: arm.delta
        if arm.delta and arm.delta.ci_low is not None
        else _shared_delta(ended[name], ended[phase.baseline])
        for name, arm in judged.items()
    }
    arms = [
        ArmSoFar(
            arm=name,
            is_baseline=name == phase.baseline,
            n=arm.n,
            seeds=len(planned[name]),
            unsuccessful=sum(outcome.status in ("failed", "diverged") for outcome in ended[name].values()),
            mean=arm.score.mean,
            delta=None if delta is None or name == phase.baseline else delta.mean,
            ci_low=delta and delta.ci_low,
            ci_high=delta and delta.ci_high,
        )
        for name, arm in judged.items()
        for delta in [deltas[name]]
    ]
    sign = 1 if state.campaign["metric"]["goal"] == "minimize" else -1

    def rank(arm: ArmSoFar) -> tuple[bool, float]:
        is_known = arm.delta is not None or (arm.is_baseline and arm.n > 0)
        return not is_known, sign * (arm.delta or 0.0)

    return tuple(sorted(arms, key=rank))


def _shared_delta(arm: Mapping[int, TrialOutcome], baseline: Mapping[int, TrialOutcome]) -> Delta | None:
    values = ((arm[seed].value, baseline[seed].value) for seed in arm.keys() & baseline.keys())
    shared = [value - other for value, other in values if value is not None and other is not None]
    return Delta(fmean(shared)) if shared else None


def summarize_phase(state: CampaignState, phase: PhaseState) -> PhaseSummary:
    """Ranks and judges the arms of a phase from the results so far."""
    rules = state.campaign
    metric = Objective(**rules["metric"])
    limits, goal = _limits(state, phase), rules["metric"]["goal"]
    outcomes = _outcomes(state, phase, metric.name)
    judgement = judge_phase(state, phase, outcomes)
    val_losses = judgement  # goal and min_effect do not affect the spreads
    if metric.name != "val_loss":
        val_losses = judge(
            _outcomes(state, phase, "val_loss"), baseline=phase.baseline, confidence=limits["confidence"]
        )
    spreads = {arm.arm: arm.score for arm in val_losses.arms}
    planned = {arm.name: arm for arm in phase.arms}
    measured = _measured(state, phase, limits["confidence"])
    text_errors = _text_errors(state, phase, metric.name)
    ranked = enumerate(judgement.arms, 1)
    arms = tuple(
        _arm_summary(state, planned[arm.arm], arm, rank, spreads[arm.arm], text_errors.get(arm.arm))
        for rank, arm in ranked
    )
    arms = tuple(replace(arm, metrics=measured[arm.arm]) for arm in arms)
    if not _is_confirmation(phase):
        shrunken = shrunken_delta(
            arms, judgement.winner, goal=goal, most_seeds=phase.most_seeds, **_level(phase, limits)
        )
        arms = tuple(replace(arm, shrunken=shrunken) if arm.arm == judgement.winner else arm for arm in arms)
    statuses = [outcome.status for by_seed in outcomes.values() for outcome in by_seed.values()]
    missing = statuses.count("missing")  # a phase has no winner until all its trials have ended
    winner = None if missing or (phase.most_seeds and not is_over(phase.looks)) else judgement.winner
    start = _handed_on(phase, arms, winner)
    records = phase_records(state, phase)
    trained_here = [record for record in records if record.reused_from is None]
    return PhaseSummary(
        campaign=rules["campaign"],
        phase=phase.name,
        metric=metric,
        **limits,
        seeds=tuple(phase.seeds),
        inherit=phase.inherit,
        base=phase.base,
        swept=phase.swept,
        arms=arms,
        baseline=phase.baseline,
        winner=winner,
        handed_on=start,
        why=_why(state, statuses, judgement.why, start) if len(arms) > 1 else ALONE[phase.confirms is not None],
        noise=judgement.noise,
        confirmation=phase.fresh.look if phase.fresh else 0,
        warnings=(*judgement.warnings, *phase_warnings(state, phase, arms, judgement.winner, records, statuses)),
        trials=count_trials(statuses, reused=len(records) - len(trained_here)),
        tokens=sum(record.metrics.get("tokens") or 0 for record in trained_here),
        seconds=sum(record.seconds for record in trained_here),
        most_seeds=phase.most_seeds,
        looks=tuple(phase.looks),
    )


def _is_confirmation(phase: PhaseState) -> bool:
    """Whether a phase compares an earlier winner with a baseline on seeds that nobody has looked at."""
    return phase.fresh is not None and phase.fresh.question is not None


def _handed_on(phase: PhaseState, arms: Sequence[ArmSummary], winner: str | None) -> str | None:
    """The arm that later phases start from although it is not better than the baseline; None if that is the winner."""
    if winner is None or not phase.hands_on_best:
        return None
    best = best_arm(arms, {arm.arm: arm.overrides for arm in arms}, winner=winner, baseline=phase.baseline)
    return best.arm if best and best.arm != winner else None


def _why(state: CampaignState, statuses: Sequence[str], why: str, handed_on: str | None) -> str:
    """Why the winner won, with what to know about it: a smoke run, trials that have not ended, an arm handed on."""
    smoke, missing = "SMOKE: " if state.is_smoke else "", statuses.count("missing")
    so_far = f"so far, after {len(statuses) - missing} of {len(statuses)} trials: " if missing else ""
    note = f"; later phases start from {handed_on}, which has the best mean" if handed_on else ""
    return f"{smoke}{so_far}{why}{note}"


def count_trials(statuses: Sequence[str], *, reused: int) -> TrialCounts:
    """Counts trials by how they ended; `reused` of them were trained by an earlier phase."""
    counts = {name: statuses.count(name) for name in ("finished", "diverged", "failed", "stopped")}
    return TrialCounts(total=len(statuses), **counts, reused=reused)


def _level(phase: PhaseState, limits: dict[str, Any]) -> dict[str, Any]:
    """The limits by which a winner was chosen: with `until: decided`, at the level of the last look."""
    return limits | {"confidence": 1 - phase.looks[-1].level} if phase.looks else limits


def _outcomes(state: CampaignState, phase: PhaseState, metric: str) -> dict[str, dict[int, TrialOutcome]]:
    return {
        arm.name: {seed: state.outcome(trial_id, metric) for seed, trial_id in arm.trial_ids.items()}
        for arm in phase.arms
    }


def _measured(state: CampaignState, phase: PhaseState, confidence: float) -> dict[str, dict[str, MetricSpread]]:
    """Returns the spread of each further metric over the finished trials of each arm, by arm and metric."""
    names = phase_metrics(state, phase)
    spreads: dict[str, dict[str, MetricSpread]] = {}
    for arm in phase.arms:
        results = (state.results[i] for i in arm.trial_ids.values() if i in state.results)
        finished = [result["metrics"] for result in results if result["status"] == "finished"]
        spreads[arm.name] = {
            name: metric_spread((metrics.get(name) for metrics in finished), confidence) for name in names
        }
    return spreads


def _text_errors(state: CampaignState, phase: PhaseState, metric: str) -> dict[str, float | None]:
    """Returns the standard error of each arm's difference from the baseline due to the evaluation text, by name.

    A loss in bits per byte of one text is the loss in nats per token times a constant. There is none for other metrics.
    """
    if metric not in ("val_loss", "val_bpb"):
        return {}
    finished = {
        arm.name: [r for i in arm.trial_ids.values() if (r := state.results.get(i)) and r["status"] == "finished"]
        for arm in phase.arms
    }
    blocks = {name: [r["eval_blocks"] for r in row if r.get("eval_blocks")] for name, row in finished.items()}
    texts = {r["provenance"].get("eval_sha256") for row in finished.values() for r in row}
    factors = [
        r["metrics"][metric] / r["metrics"]["val_loss"] for r in finished[phase.baseline] if r["metrics"].get(metric)
    ]
    if len(texts) > 1 or not factors:
        return {}
    errors = {name: text_standard_error(row, blocks[phase.baseline]) for name, row in blocks.items()}
    return {name: None if error is None else error * factors[0] for name, error in errors.items()}


def _arm_summary(
    state: CampaignState, arm: ArmState, judged: ArmSummary, rank: int, val_loss: Spread, text_se: float | None
) -> ArmSummary:
    results = [state.results[i] for i in arm.trial_ids.values() if i in state.results]
    finished = [result for result in results if result["status"] == "finished"]
    return replace(
        judged,
        rank=rank,
        overrides=arm.overrides,
        sources=arm.sources,
        tokens=max((n for result in finished if (n := result["metrics"].get("tokens")) is not None), default=None),
        seconds=mean(result["seconds"] for result in finished),
        trial_ids=tuple(arm.trial_ids.values()),
        val_loss=val_loss,
        text_se=text_se if judged.delta else None,
        **{name: mean(result["metrics"].get(name) for result in finished) for name in AVERAGED},
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are not None; None if there are no such values."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
