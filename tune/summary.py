"""From the journal to the files that other tools read: records, ranked arms, curves, the answer.

Everything here is a pure function of the journal and of the trials' `metrics.jsonl`; deleting the files and running
`report` gives the same rows.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from ngpt.config import ConfigError
from ngpt.durable import write_atomic, write_json
from ngpt.tracker import read_metrics
from tune import format as fmt
from tune.budget import left_out_sentence
from tune.claims import judge_claims
from tune.costs import account
from tune.evidence import ClaimArm, Evidence
from tune.journal import read_journal
from tune.schema import Claim
from tune.state import ArmState, PhaseState, State, replay
from tune.verdicts import ArmVerdict, Outcome, judge

Record = dict[str, Any]
Summary = dict[str, Any]

# One column of an arm's averages: how it is computed from the metrics of its finished trials.
AVERAGES = ("val_bpb", "train_loss", "tokens_per_second", "peak_memory_bytes")
CURVE_COLUMNS = {
    "phase": "string",
    "arm": "string",
    "trial_id": "string",
    "seed": "int64",
    "step": "int64",
    "tokens": "int64",
    "train_loss": "float64",
    "val_loss": "float64",
    "val_bpb": "float64",
    "tokens_per_second": "float64",
    "grad_norm": "float64",
    "lr": "float64",
    "lr_embedding": "float64",
    "lr_head": "float64",
    "lr_scales": "float64",
    "r_mean": "float64",
    "r_replaced": "float64",
    "weight_norm_error": "float64",
    "activation_norm_error": "float64",
}


def phase_records(state: State, phase: PhaseState) -> list[Record]:
    """One record per trial of the phase that has a result, seed by seed and arm by arm."""
    records = []
    for seed in phase.seeds:
        for arm in phase.arms:
            result = state.results.get(arm.trial_ids[seed])
            if result is not None:
                records.append(_record(state, phase, arm, seed, result))
    return records


def summarize_phase(state: State, phase: PhaseState) -> Summary:
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
        "winner": judgement.winner,
        "why": judgement.why if len(arms) > 1 else "there is nothing to compare: its only arm is the baseline itself",
        "noise": {
            "sd": judgement.noise_sd,
            "method": judgement.method,
            "correlation": judgement.correlation,
            "df": judgement.df,
            "smallest_detectable": judgement.smallest_detectable,
        },
        "warnings": judgement.warnings + _warnings(phase, arms, judgement.winner, records),
        "trials": _counts(statuses, reused=len(records) - len(own)),
        "tokens": sum(record["metrics"].get("tokens") or 0 for record in own),
        "seconds": sum(record["seconds"] for record in own),
    }


def summarize_campaign(state: State, phases: Sequence[Summary]) -> Summary:
    """The whole campaign: the answer first, then its phases. `phases` are the phase summaries, in order."""
    rules = state.campaign
    # Sorted: a set's order differs from process to process, and so would the last digit of a sum.
    planned = sorted({trial_id for phase in state.phases.values() for trial_id in phase.trial_ids})
    results = {trial_id: state.results[trial_id] for trial_id in planned if trial_id in state.results}
    statuses = [state.outcome(trial_id).status for trial_id in planned]
    return {
        "campaign": rules["campaign"],
        "description": rules["description"],
        "status": state.status,
        "metric": rules["metric"],
        "answer": _answer(state, phases),
        "trials": _counts(statuses, reused=sum(phase["trials"]["reused"] for phase in phases)),
        "tokens": sum(result["metrics"].get("tokens") or 0 for result in results.values()),
        "seconds": state.seconds + state.session_seconds(),
        "trial_seconds": sum(result["seconds"] for result in results.values()),
        "cost": account(state),
        "started_at": rules["time"],
        "environment": rules["environment"],
        "data": rules["data"],
        "command": rules["command"],
        "phases": list(phases),
        "claims": summarize_claims(state, [Claim(**claim) for claim in rules.get("claims", [])]),
        "problems": _problems(state),
        "left_out": dict(state.left_out),  # trials by phase, where a budget stopped the campaign
        "warnings": [f"{phase['phase']}: {warning}" for phase in phases for warning in phase["warnings"]]
        + ([left_out_sentence(state.left_out)] if state.left_out else []),
    }


def summarize_claims(state: State, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """The ledger of `claims`, those of the campaign or others, as far as the trials go."""
    rules, base = state.campaign, state.campaign.get("base", {})
    arms = []
    for phase in state.phases.values():
        for arm in phase.arms:
            configs = (state.results[i]["config"] for i in arm.trial_ids.values() if i in state.results)
            known = base | dict(phase.base) | dict(arm.overrides) | next(configs, {})
            is_baseline = arm.name == phase.baseline
            arms.append(ClaimArm(phase.name, arm.name, is_baseline, arm.overrides, known, arm.trial_ids))
    evidence = Evidence(
        arms=arms,
        outcome=state.outcome,
        metric=rules["metric"]["name"],
        goal=rules["metric"]["goal"],
        confidence=rules["confidence"],
        min_effect=rules["min_effect"],
    )
    return judge_claims(claims, evidence)


def curve_rows(root: Path, records: Iterable[Record]) -> list[dict[str, Any]]:
    """Every logged step of every trial, at least one row for each."""
    rows = []
    for record in records:
        trial = {name: record[name] for name in ("phase", "arm", "trial_id", "seed")}
        logged = read_metrics(root / "trials" / record["trial_id"] / "metrics.jsonl")
        rows += [trial | _columns(row) for row in logged] or [trial | _columns({})]
    return rows


def write_phase(root: Path, state: State, phase: PhaseState) -> Summary:
    """Writes a phase's four files and returns its summary."""
    folder = root / phase.name
    folder.mkdir(parents=True, exist_ok=True)
    records, summary = phase_records(state, phase), summarize_phase(state, phase)
    lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomic(folder / "trials.jsonl", "".join(lines))
    _write_parquet(folder / "summary.parquet", [_flat(arm) for arm in summary["arms"]])
    _write_parquet(folder / "curves.parquet", curve_rows(root, records), CURVE_COLUMNS)
    write_json(folder / "summary.json", summary)
    return summary


def write_campaign(root: Path, state: State) -> Summary:
    """Writes all derived files of a results directory from its state, and returns the campaign's summary."""
    from tune.report import write_report

    summary = summarize_campaign(state, [write_phase(root, state, phase) for phase in state.phases.values()])
    write_json(root / "summary.json", summary)
    curves = [row for phase in state.phases.values() for row in curve_rows(root, phase_records(state, phase))]
    write_report(root, summary, curves)
    return summary


def settings_text(overrides: Mapping[str, Any]) -> str:
    """Overrides for people: `alpha=0.2, project_every=10`, or `the base as it is`."""
    return fmt.settings({name.rpartition(".")[2]: value for name, value in overrides.items()}, "the base as it is")


def _record(state: State, phase: PhaseState, arm: ArmState, seed: int, result: Mapping[str, Any]) -> Record:
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


def _cells(state: State, phase: PhaseState, metric: str) -> dict[str, dict[int, Outcome]]:
    """Every arm's outcomes by seed, in terms of `metric`."""
    return {
        arm.name: {seed: state.outcome(trial_id, metric) for seed, trial_id in arm.trial_ids.items()}
        for arm in phase.arms
    }


def _spread(verdict: ArmVerdict) -> dict[str, float | None]:
    return {"mean": verdict.mean, "sd": verdict.sd, "ci_low": verdict.ci_low, "ci_high": verdict.ci_high}


def _arm_summary(state: State, arm: ArmState, verdict: ArmVerdict, rank: int) -> dict[str, Any]:
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
    replaced: Counter[str] = Counter()
    for record in records:
        replaced[record["arm"]] += record["metrics"].get("r_replaced") or 0
    for arm in arms:
        if count := replaced[arm["arm"]]:
            found.append(f"{arm['arm']}: {count:.0f} divisors r of its norm mode were not finite and became 1")
    return found


def _answer(state: State, phases: Sequence[Summary]) -> dict[str, Any]:
    """One sentence: what to use, how much better it is, and whether unseen seeds agree."""
    judged = [phase for phase in phases if len(phase["arms"]) > 1 and state.phases[phase["phase"]].winner]
    won = [phase for phase in judged if phase["winner"] != phase["baseline"]]
    none = {"phase": None, "winner": None, "overrides": {}, "delta": None, "confirmed": False}
    if not judged:
        return none | {"sentence": "No phase has been completed yet, so there is no answer."}
    if not any(arm["n"] for phase in judged for arm in phase["arms"]):
        return none | {"sentence": "No trial has finished well, so there is no answer."}
    if not won:
        return none | {"sentence": "No arm of any phase is better than its baseline beyond the noise: keep the base."}
    last = won[-1]
    arm = next(arm for arm in last["arms"] if arm["arm"] == last["winner"])
    overrides = dict(state.phases[last["phase"]].winner_overrides)
    before = phases[: phases.index(last)]
    unseen = not {seed for phase in before for seed in phase["seeds"]} & set(last["seeds"])
    confirmed = unseen and any(_inherits(overrides, state.phases[p["phase"]].winner_overrides) for p in before)
    delta, name = arm["delta"], last["metric"]["name"]
    seeds = f"{arm['n']} {'unseen' if confirmed else 'paired'} seeds"
    direction = "lowers" if delta["mean"] < 0 else "raises"
    interval = f"{abs(delta['mean']):.3f}, {last['confidence']:.0%} interval {_span(delta)}"
    sentence = f"Use {settings_text(overrides)}: it {direction} {name} by {interval}, on {seeds}."
    later = [phase for phase in judged if phases.index(phase) > phases.index(last)]
    if refuting := [phase["phase"] for phase in later if _tries_again(phase, overrides)]:
        sentence = f"Undecided: {settings_text(overrides)} {direction} {name} by {interval}, on {seeds}, "
        sentence += f"but phase {', '.join(refuting)} does not confirm it."
    elif later:
        sentence += f" Phase {', '.join(phase['phase'] for phase in later)} found nothing better."
    return {
        "sentence": sentence,
        "phase": last["phase"],
        "winner": last["winner"],
        "overrides": overrides,
        "delta": delta,
        "confirmed": confirmed,
    }


def _inherits(overrides: Mapping[str, Any], winner: Mapping[str, Any]) -> bool:
    """Whether all of an earlier winner's settings are in force, and there are any."""
    return bool(winner) and dict(overrides) | dict(winner) == overrides


def _tries_again(phase: Summary, overrides: Mapping[str, Any]) -> bool:
    """Whether a phase compares `overrides`, as one of its arms, with a baseline that lacks them."""
    totals = {arm["arm"]: phase["base"] | arm["overrides"] for arm in phase["arms"]}
    has = {name for name, total in totals.items() if _inherits(total, overrides)}
    return bool(has) and phase["baseline"] not in has


def _span(delta: Mapping[str, float]) -> str:
    low, high = sorted((abs(delta["ci_low"]), abs(delta["ci_high"])))
    return f"{low:.3f} to {high:.3f}"


def _problems(state: State) -> list[dict[str, Any]]:
    """Trials that did not finish well, each with what it said last."""
    kept, problems = ("phase", "arm", "seed", "trial_id", "status", "error"), {}
    for phase in state.phases.values():
        for record in phase_records(state, phase):
            if record["status"] != "finished":
                problems.setdefault(record["trial_id"], {name: record[name] for name in kept})
    return list(problems.values())


def _counts(statuses: Sequence[str], *, reused: int) -> dict[str, int]:
    counts = {name: statuses.count(name) for name in ("finished", "diverged", "failed", "stopped")}
    return {"total": len(statuses)} | counts | {"reused": reused}


def _mean(values: Iterable[float | None]) -> float | None:
    return fmean(known) if (known := [value for value in values if value is not None]) else None


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in CURVE_COLUMNS if name not in ("phase", "arm", "trial_id", "seed")}


def _flat(arm: Mapping[str, Any]) -> dict[str, Any]:
    """An arm as one row: nested numbers get dotted column names, settings are JSON."""
    nested = ("score", "val_loss", "delta", "overrides", "trial_ids")
    row = {name: value for name, value in arm.items() if name not in nested}
    spread = {f"{kind}.{name}": value for kind in ("score", "val_loss") for name, value in arm[kind].items()}
    delta = arm["delta"] or dict.fromkeys(("mean", "ci_low", "ci_high", "p", "p_holm"))
    return (
        row
        | spread
        | {f"delta.{name}": value for name, value in delta.items()}
        | {"overrides": json.dumps(arm["overrides"]), "trial_ids": list(arm["trial_ids"])}
    )


def _write_parquet(path: Path, rows: list[dict[str, Any]], columns: Mapping[str, str] | None = None) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = None
    if columns is not None:
        fields = [pyarrow.field(name, pyarrow.type_for_alias(kind)) for name, kind in columns.items()]
        schema = pyarrow.schema(fields)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), sink, write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_state(root: Path) -> State:
    """The state of the campaign in a results directory.

    Raises:
        ConfigError: there is no campaign in `root`.
    """
    state = replay(read_journal(root / "journal.jsonl"))
    if not state.campaign:
        raise ConfigError(f"{root} is not a results directory: it has no journal.jsonl with a campaign in it")
    return state


def rebuild(root: Path) -> Summary:
    """Writes all derived files of a results directory anew and returns the campaign's summary."""
    return write_campaign(root, read_state(root))
