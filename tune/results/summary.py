"""From the journal to the files that other tools read: records, ranked arms, curves, the answer.

Everything here is a pure function of the journal and of the trials' `metrics.jsonl`; deleting the files and running
`report` gives the same rows.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from ngpt.system.atomic_files import make_folder, write_atomic, write_json
from ngpt.training.tracker import read_metrics
from tune import format as fmt
from tune.claims.evidence import Evidence
from tune.claims.relations import judge_claims
from tune.claims.selectors import ClaimArm, short
from tune.planning.budget import left_out_sentence
from tune.results.costs import account
from tune.results.phase_summary import Record, Summary, count_statuses, phase_records, summarize_phase
from tune.spec.schema import Claim
from tune.storage.state import CampaignState, PhaseState, read_state

# What is derived from the journal, of a phase and of the campaign; and where their digests are.
DERIVED = ("trials.jsonl", "summary.json", "summary.parquet", "curves.parquet", "report.html", "report.md")
ROWS = ("metrics.jsonl", "histograms.jsonl")
DIGESTS = "derived.json"
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


def summarize_campaign(
    state: CampaignState, phases: Sequence[Summary], claims: Sequence[Claim] | None = None
) -> Summary:
    """The whole campaign: the answer first, then its phases. `phases` are the phase summaries, in order.

    `claims` are judged instead of those that the campaign's own file has.
    """
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
        "trials": count_statuses(statuses, reused=sum(phase["trials"]["reused"] for phase in phases)),
        "tokens": sum(result["metrics"].get("tokens") or 0 for result in results.values()),
        "seconds": state.seconds + state.session_seconds(),
        "trial_seconds": sum(result["seconds"] for result in results.values()),
        "cost": account(state),
        "packing": state.gpu_sharing or None,  # how many trials shared a GPU, where that was measured
        "started_at": state.started,
        "environment": state.environment,
        "data": rules["data"],
        "base": rules.get("base", {}),
        "command": rules["command"],
        "phases": list(phases),
        "claims": summarize_claims(state, own_claims(state) if claims is None else claims),
        "problems": _problems(state),
        "left_out": dict(state.left_out),  # trials by phase, where a budget stopped the campaign
        "warnings": [f"{phase['phase']}: {warning}" for phase in phases for warning in phase["warnings"]]
        + ([left_out_sentence(state.left_out)] if state.left_out else []),
    }


def own_claims(state: CampaignState) -> list[Claim]:
    """The claims of the file that the campaign was run from."""
    return [Claim(**claim) for claim in state.campaign.get("claims", [])]


def summarize_claims(state: CampaignState, claims: Sequence[Claim]) -> list[dict[str, Any]]:
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


def write_phase(root: Path, state: CampaignState, phase: PhaseState) -> Summary:
    """Writes a phase's four files and returns its summary."""
    folder = root / phase.name
    make_folder(folder)
    records, summary = phase_records(state, phase), summarize_phase(state, phase)
    lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomic(folder / "trials.jsonl", "".join(lines))
    _write_parquet(folder / "summary.parquet", [_flat(arm) for arm in summary["arms"]])
    _write_parquet(folder / "curves.parquet", curve_rows(root, records), CURVE_COLUMNS)
    write_json(folder / "summary.json", summary)
    return summary


def write_campaign(root: Path, state: CampaignState, claims: Sequence[Claim] | None = None) -> Summary:
    """Writes all derived files of a results directory from its state, and returns the campaign's summary.

    `claims` are judged instead of those that the campaign's own file has.
    """
    from tune.report.html import write_report

    phases = [write_phase(root, state, phase) for phase in state.phases.values()]
    summary = summarize_campaign(state, phases, claims)
    write_json(root / "summary.json", summary)
    curves = [row for phase in state.phases.values() for row in curve_rows(root, phase_records(state, phase))]
    write_report(root, summary, curves)
    _write_digests(root, state)
    return summary


def _write_digests(root: Path, state: CampaignState) -> None:
    """The SHA-256 of each derived file and of the rows it comes from, so that `verify` knows what was changed since."""
    trials = [root / "trials" / trial_id for phase in state.phases.values() for trial_id in phase.trial_ids]
    folders = [root, *(root / phase for phase in state.phases), *trials]
    paths = [path for folder in folders for name in (*DERIVED, *ROWS) if (path := folder / name).is_file()]
    digests = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    write_json(root / DIGESTS, sealed(digests))


def sealed(digests: Mapping[str, str]) -> dict[str, str]:
    """The digests with one of their own."""
    text = json.dumps(dict(digests), sort_keys=True)
    return dict(digests) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def settings_text(overrides: Mapping[str, Any]) -> str:
    """Overrides for people: `alpha=0.2, project_every=10`, or `the base as it is`."""
    return fmt.settings({short(name): value for name, value in overrides.items()}, "the base as it is")


def _answer(state: CampaignState, phases: Sequence[Summary]) -> dict[str, Any]:
    """One sentence: what to use, how much better it is, and whether unseen seeds agree."""
    judged = [phase for phase in phases if len(phase["arms"]) > 1 and state.phases[phase["phase"]].winner]
    won = [phase for phase in judged if phase["winner"] != phase["baseline"]]
    none = {"phase": None, "winner": None, "overrides": {}, "delta": None, "confirmed": False}
    so_far = "" if state.status == "finished" else "So far, "
    if not judged:
        return none | {"sentence": "No phase has been completed yet, so there is no answer."}
    if not any(arm["n"] for phase in judged for arm in phase["arms"]):
        return none | {"sentence": _begin(so_far, "No trial has finished well, so there is no answer.")}
    if not won and all(any(arm["verdict"] == "no claim" for arm in phase["arms"]) for phase in judged):
        text = "One seed carries no claim: no arm can be called better than its baseline."
        return none | {"sentence": _begin(so_far, text)}
    if not won:
        which = "any phase that is over" if so_far else "any phase"
        text = f"No arm of {which} is better than its baseline beyond the noise: keep the base."
        return none | {"sentence": _begin(so_far, text)}
    last = won[-1]
    arm = next(arm for arm in last["arms"] if arm["arm"] == last["winner"])
    overrides = dict(state.phases[last["phase"]].winner_overrides)
    before = phases[: phases.index(last)]
    unseen = not {seed for phase in before for seed in phase["seeds"]} & set(last["seeds"])
    confirmed = unseen and any(_inherits(overrides, state.phases[p["phase"]].winner_overrides) for p in before)
    delta, name = arm["delta"], last["metric"]["name"]
    how = "unseen " if confirmed else "paired " if last["noise"]["method"] == "paired" else ""
    seeds = f"{arm['n']} {how}seeds"
    if last["inherit"] and last["base"]:  # the effect is that of the arm, not of all settings that are named
        seeds += f", on top of {last['inherit']}"
    direction = "lowers" if delta["mean"] < 0 else "raises"
    digits = max(3, 1 - floor(log10(abs(delta["mean"]))))  # two of a small effect
    interval = f"{abs(delta['mean']):.{digits}f}, {100 * last['confidence']:g}% interval {_span(delta, digits)}"
    sentence = f"Use {settings_text(overrides)}: it {direction} {name} by {interval}, on {seeds}."
    later = [phase for phase in judged if phases.index(phase) > phases.index(last)]
    if refuting := [phase["phase"] for phase in later if _tries_again(phase, overrides)]:
        sentence = f"Undecided: {settings_text(overrides)} {direction} {name} by {interval}, on {seeds}, "
        sentence += f"but phase {', '.join(refuting)} does not confirm it."
    elif later:
        sentence += f" Phase {', '.join(phase['phase'] for phase in later)} found nothing better."
    return {
        "sentence": _begin(so_far, sentence),
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


def _span(delta: Mapping[str, float], digits: int) -> str:
    low, high = sorted((abs(delta["ci_low"]), abs(delta["ci_high"])))
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _begin(words: str, sentence: str) -> str:
    """The sentence after these words, if there are any: of a campaign that is not over, nothing is said for good."""
    return f"{words}{sentence[0].lower()}{sentence[1:]}" if words else sentence


def _problems(state: CampaignState) -> list[dict[str, Any]]:
    """Trials that did not finish well, each with what it said last."""
    kept, problems = ("phase", "arm", "seed", "trial_id", "status", "error"), {}
    for phase in state.phases.values():
        for record in phase_records(state, phase):
            if record["status"] not in ("finished", "stopped"):
                problems.setdefault(record["trial_id"], {name: record[name] for name in kept})
    return list(problems.values())


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


def rebuild(root: Path, claims: Sequence[Claim] | None = None) -> Summary:
    """Writes all derived files of a results directory anew and returns the campaign's summary.

    `claims` are judged instead of those that the campaign's own file has, until the files are written again.
    """
    return write_campaign(root, read_state(root), claims)
