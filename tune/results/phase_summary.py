"""What one phase says: its records, and its arms ranked and judged. A pure function of the state of a campaign."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from tune.analysis.verdicts import ArmVerdict, judge
from tune.storage.records import TrialOutcome
from tune.storage.state import ArmState, CampaignState, PhaseState

Record = dict[str, Any]
Summary = dict[str, Any]

ONLY_BASELINE = "there is nothing to compare: its only arm is the baseline itself"
# One column of an arm's averages: how it is computed from the metrics of its finished trials.
AVERAGES = ("val_bpb", "train_loss", "tokens_per_second", "peak_memory_bytes")


def phase_records(state: CampaignState, phase: PhaseState) -> list[Record]:
    """One record per trial of the phase that has a result, seed by seed and arm by arm."""
    records = []
    for seed in phase.seeds:
        for arm in phase.arms:
            result = state.results.get(arm.trial_ids[seed])
            if result is not None:
                records.append(_record(state, phase, arm, seed, result))
    return records


def summarize_phase(state: CampaignState, phase: PhaseState) -> Summary:
    """The arms of a phase, ranked and judged, with everything that is needed to say so."""
    rules = state.campaign
    metric = rules["metric"]
    cells = _cells(state, phase, metric["name"])
    judgement = judge(
        cells,
        baseline=phase.baseline,
        goal=metric["goal"],
        confidence=rules["confidence"],
        min_effect=rules["min_effect"],
        metric=metric["name"],
    )
    losses = judgement  # the spread of an arm does not depend on goal and min_effect
    if metric["name"] != "val_loss":
        losses = judge(_cells(state, phase, "val_loss"), baseline=phase.baseline, confidence=rules["confidence"])
    spreads = {arm.arm: _spread(arm) for arm in losses.arms}
    by_name = {arm.name: arm for arm in phase.arms}
    arms = [
        _arm_summary(state, by_name[verdict.arm], verdict, rank) | {"val_loss": spreads[verdict.arm]}
        for rank, verdict in enumerate(judgement.arms, 1)
    ]
    statuses = [cell.status for row in cells.values() for cell in row.values()]
    records = phase_records(state, phase)
    missing = statuses.count("missing")  # then the phase is not over, and nobody has won it
    so_far = f"so far, after {len(statuses) - missing} of {len(statuses)} trials: " if missing else ""
    own = [record for record in records if record["reused_from"] is None]
    return {
        "campaign": rules["campaign"],
        "phase": phase.name,
        "metric": metric,
        "confidence": rules["confidence"],
        "min_effect": rules["min_effect"],
        "seeds": list(phase.seeds),
        "inherit": phase.inherit,
        "base": dict(phase.base),
        "swept": dict(phase.swept),
        "arms": arms,
        "baseline": phase.baseline,
        "winner": None if missing else judgement.winner,
        "why": so_far + judgement.why if len(arms) > 1 else ONLY_BASELINE,
        "noise": {
            "sd": judgement.noise_sd,
            "method": judgement.method,
            "correlation": judgement.correlation,
            "df": judgement.df,
            "smallest_detectable": judgement.smallest_detectable,
        },
        "warnings": judgement.warnings + _stopped_warning(statuses) + _warnings(phase, arms, judgement.winner, records),
        "trials": count_statuses(statuses, reused=len(records) - len(own)),
        "tokens": sum(record["metrics"].get("tokens") or 0 for record in own),
        "seconds": sum(record["seconds"] for record in own),
    }


def count_statuses(statuses: Sequence[str], *, reused: int) -> dict[str, int]:
    """How many trials there are, how they ended, and how many of them an earlier phase had trained."""
    counts = {name: statuses.count(name) for name in ("finished", "diverged", "failed", "stopped")}
    return {"total": len(statuses)} | counts | {"reused": reused}


def _mean(values: Iterable[float | None]) -> float | None:
    return fmean(known) if (known := [value for value in values if value is not None]) else None


def _record(state: CampaignState, phase: PhaseState, arm: ArmState, seed: int, result: Mapping[str, Any]) -> Record:
    trained_in = result["phase"]
    return {
        "campaign": state.campaign["campaign"],
        "phase": phase.name,
        "arm": arm.name,
        "trial_id": result["trial_id"],
        "seed": seed,
        "overrides": dict(phase.base) | dict(arm.overrides),
        "config": result["config"],
        "status": result["status"],
        "metrics": result["metrics"],
        "error": result["error"],
        "attempt": result["attempt"],
        "started_at": result["started_at"],
        "seconds": result["seconds"],
        "provenance": result["provenance"],
        "reused_from": None if trained_in == phase.name else trained_in,
    }


def _cells(state: CampaignState, phase: PhaseState, metric: str) -> dict[str, dict[int, TrialOutcome]]:
    """Every arm's outcomes by seed, in terms of `metric`."""
    return {
        arm.name: {seed: state.outcome(trial_id, metric) for seed, trial_id in arm.trial_ids.items()}
        for arm in phase.arms
    }


def _spread(verdict: ArmVerdict) -> dict[str, float | None]:
    return {"mean": verdict.mean, "sd": verdict.sd, "ci_low": verdict.ci_low, "ci_high": verdict.ci_high}


def _arm_summary(state: CampaignState, arm: ArmState, verdict: ArmVerdict, rank: int) -> dict[str, Any]:
    results = [state.results[i] for i in arm.trial_ids.values() if i in state.results]
    finished = [result for result in results if result["status"] == "finished"]
    return {
        "arm": arm.name,
        "rank": rank,
        "overrides": dict(arm.overrides),
        "n": verdict.n,
        "score": _spread(verdict),  # of the campaign's metric
        "delta": asdict(verdict.delta) if verdict.delta else None,
        "verdict": verdict.verdict,
        "tied_with_winner": verdict.tied_with_winner,
        **{name: _mean(result["metrics"].get(name) for result in finished) for name in AVERAGES},
        "tokens": max((result["metrics"]["tokens"] for result in finished), default=None),
        "seconds": _mean(result["seconds"] for result in finished),
        "trial_ids": list(arm.trial_ids.values()),
    }


def _stopped_warning(statuses: Sequence[str]) -> list[str]:
    """What a reader must know of a phase with early stopping (tune/analysis/asha.py)."""
    if not (n := statuses.count("stopped")):
        return []
    text = f"stopped early by ASHA: {n} of {len(statuses)} trials; which ones depends on the order in which they ran. "
    return [text + "Their arms are listed last and not judged; the p-values of the others are corrected for them, too"]


def _warnings(phase: PhaseState, arms: list[dict[str, Any]], winner: str, records: list[Record]) -> list[str]:
    """What a careful reader would ask about, apart from the noise."""
    found = []
    chosen = next(arm for arm in arms if arm["arm"] == winner)
    for setting, values in phase.swept.items():
        numbers = sorted(value for value in values if isinstance(value, int | float) and not isinstance(value, bool))
        value = chosen["overrides"].get(setting)
        if winner != phase.baseline and len(numbers) > 2 and value in (numbers[0], numbers[-1]):
            end = "lower" if value == numbers[0] else "upper"
            found.append(f"the winner is at the {end} end of the range of {setting}; the best value may lie beyond it")
    tokens = {arm["arm"]: arm["tokens"] for arm in arms if arm["tokens"] is not None}
    if len(set(tokens.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in tokens.items())
        found.append(f"the arms saw different numbers of training tokens: {listed}")
    for name, what in {"device": "devices", "code_sha256": "versions of the code", "data_sha256": "data"}.items():
        if len(different := {str(record["provenance"].get(name)) for record in records if record["error"] is None}) > 1:
            found.append(f"its trials come from different {what}: {', '.join(sorted(different))}")
    for name, where in {"packed": "on a device", "vectorised": "in a process"}.items():
        if len(ran := {record["provenance"].get(name, 1) for record in records if record["error"] is None}) > 1:
            counts = " and ".join(map(str, sorted(ran)))
            found.append(f"its trials ran {counts} at a time {where}: their tokens per second do not compare")
    replaced: Counter[str] = Counter()
    by_arm: dict[str, list[Record]] = {}
    for record in records:
        replaced[record["arm"]] += record["metrics"].get("r_replaced") or 0
        by_arm.setdefault(record["arm"], []).append(record)
    for arm in arms:
        if count := replaced[arm["arm"]]:
            found.append(f"{arm['arm']}: {count:.0f} divisors r of its norm mode were not finite and became 1")
        found += _setbacks(arm["arm"], by_arm.get(arm["arm"], []))
    return found


def _setbacks(arm: str, records: list[Record]) -> list[str]:
    """What the trials of an arm met on the way that makes them other than their settings say (ngpt/training/recovery.py)."""
    found = []
    halved = [r for r in records if (r["metrics"].get("batch_size") or math.inf) < r["config"]["batch_size"]]
    if halved:
        sizes = ", ".join(sorted({f"{r['metrics']['batch_size']} for {r['config']['batch_size']}" for r in halved}))
        found.append(f"{arm}: {len(halved)} of its trials had no memory for their batch and halved it ({sizes})")
    for name, what in {"skipped_steps": "steps were skipped", "rollbacks": "times a trial went back"}.items():
        if count := sum(record["metrics"].get(name) or 0 for record in records):
            found.append(f"{arm}: {count:.0f} {what}, for a loss or gradient that was not finite")
    return found
