"""Writes the derived files: trial records, ranked arms, curves, the campaign summary and the report.

They depend only on the journal and the trials' `metrics.jsonl`, so `report` can rebuild them.
"""

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ngpt.system.atomic_files import make_folder, write_atomic, write_json
from ngpt.training.tracker import read_metrics, read_rows
from tune import format as fmt
from tune.claims.evidence import Evidence
from tune.claims.relations import judge_claims
from tune.claims.selectors import ClaimArm
from tune.planning.budget import left_out_sentence
from tune.results.answer import find_answer
from tune.results.costs import campaign_cost
from tune.results.phase_summary import count_trials, phase_records, summarize_phase
from tune.spec.schema import Claim
from tune.storage import summaries
from tune.storage.events import MAX_NUMBER
from tune.storage.state import CampaignState, PhaseState, read_state
from tune.storage.summaries import CampaignSummary, PhaseSummary, TrialProblem, TrialRecord, to_json

SMOKE_CLAIM = "SMOKE: a tiny model and a few steps decide no claim"

# Names of the derived files, of the logs of a trial, and of the file that holds their digests.
DERIVED = ("trials.jsonl", "summary.json", "summary.parquet", "curves.parquet", "report.html", "report.md")
TRIAL_LOGS = ("metrics.jsonl", "histograms.jsonl")
DIGESTS = "derived.json"
# Columns have one type in every phase and campaign, also where no arm has a value, so that tables can be concatenated.
PLACE = {"campaign": "string", "phase": "string"}
TRIAL_COLUMNS = PLACE | {"arm": "string", "trial_id": "string", "seed": "int64"}
CURVE_COLUMNS = TRIAL_COLUMNS | {
    "step": "int64",
    "tokens": "int64",
    **dict.fromkeys(("train_loss", "val_loss", "val_bpb", "tokens_per_second", "grad_norm"), "float64"),
    **dict.fromkeys(("lr", "lr_embedding", "lr_head", "lr_scales", "r_mean", "r_replaced"), "float64"),
    **dict.fromkeys(("weight_norm_error", "activation_norm_error"), "float64"),
}
SPREAD_COLUMNS = dict.fromkeys(("mean", "sd", "ci_low", "ci_high"), "float64")
DELTA_COLUMNS = dict.fromkeys(("mean", "ci_low", "ci_high", "p", "p_holm", "df"), "float64") | {"reading": "string"}
ARM_COLUMNS = PLACE | {
    "arm": "string",
    "rank": "int64",
    "n": "int64",
    **{f"score.{name}": kind for name, kind in SPREAD_COLUMNS.items()},
    "noise_sd": "float64",
    **{f"delta.{name}": kind for name, kind in DELTA_COLUMNS.items()},
    "shrunken": "float64",
    "verdict": "string",
    "decision": "string",
    "seeds_to_decide": "int64",
    "tied_with_winner": "bool",
    **dict.fromkeys(("val_bpb", "train_loss", "tokens_per_second", "peak_memory_bytes"), "float64"),
    "tokens": "int64",
    "seconds": "float64",
    **{f"val_loss.{name}": kind for name, kind in SPREAD_COLUMNS.items()},
    "text_se": "float64",
    "overrides": "string",  # JSON
    "trial_ids": "list<string>",
}


def summarize_campaign(
    state: CampaignState,
    phases: Sequence[PhaseSummary],
    claims: Sequence[Claim] | None = None,
    *,
    file_warnings: Sequence[str] = (),
) -> CampaignSummary:
    """Summarizes a campaign from its phases, in order; `claims` replace those of the campaign file."""
    rules = state.campaign
    # Sorted, because set order, and with it the rounding of sums, differs between processes.
    planned = sorted({trial_id for phase in state.phases.values() for trial_id in phase.trial_ids})
    results = [state.results[trial_id] for trial_id in planned if trial_id in state.results]
    statuses = [state.outcome(trial_id).status for trial_id in planned]
    warnings = [*file_warnings, *(f"{phase.phase}: {warning}" for phase in phases for warning in phase.warnings)]
    warnings += [left_out_sentence(state.left_out)] if state.left_out else []
    warnings += [orphans_sentence(orphans)] if (orphans := state.orphans()) else []
    return CampaignSummary(
        campaign=rules["campaign"],
        description=rules["description"],
        status=state.status,
        metric=summaries.Objective(**rules["metric"]),
        answer=find_answer(state, phases),
        trials=count_trials(statuses, reused=sum(phase.trials.reused for phase in phases)),
        tokens=sum(result["metrics"].get("tokens") or 0 for result in results),
        seconds=state.seconds + state.session_seconds(),
        trial_seconds=sum(result["seconds"] for result in results),
        cost=campaign_cost(state),
        packing=state.gpu_sharing or None,
        started_at=state.started,
        environment=state.environment,
        data=rules["data"],
        base=rules.get("base", {}),
        command=rules["command"],
        phases=tuple(phases),
        claims=tuple(summarize_claims(state, own_claims(state) if claims is None else claims)),
        problems=tuple(_problems(state)),
        left_out=dict(state.left_out),
        warnings=tuple(warnings),
        smoke=state.is_smoke,
    )


def orphans_sentence(orphans: Sequence[Mapping[str, Any]]) -> str:
    """Says which results of the journal no arm of the campaign has, and that `verify` lists them."""
    names = list(dict.fromkeys(f"{fmt.plain(result['phase'])}/{fmt.plain(result['arm'])}" for result in orphans))
    which = f"{fmt.counted(len(orphans), 'trial')} of {fmt.listing(names, most=4)}"
    return f"the journal has results that no arm of this campaign uses: {which}; `verify` lists them"


def own_claims(state: CampaignState) -> list[Claim]:
    """Returns the claims in the file that the campaign was run from."""
    return [Claim(**claim) for claim in state.campaign.get("claims", [])]


def summarize_claims(state: CampaignState, claims: Sequence[Claim]) -> list[summaries.ClaimResult]:
    """Judges `claims` from the trials so far; a smoke run decides none of them."""
    if state.is_smoke:
        return [
            summaries.ClaimResult(claim.id, claim.source, claim.says, claim.relation, claim.metric, why=SMOKE_CLAIM)
            for claim in claims
        ]
    rules, base = state.campaign, state.campaign.get("base", {})
    arms = []
    for phase in state.phases.values():
        for arm in phase.arms:
            configs = (state.results[i]["config"] for i in arm.trial_ids.values() if i in state.results)
            known = {**base, **phase.base, **arm.overrides, **next(configs, {})}
            is_baseline = arm.name == phase.baseline
            arms.append(ClaimArm(phase.name, arm.name, is_baseline, arm.overrides, known, arm.trial_ids))
    limits = {name: rules[name] for name in ("confidence", "min_effect")}
    metric, goal = rules["metric"]["name"], rules["metric"]["goal"]
    results = judge_claims(claims, Evidence(arms=arms, outcome=state.outcome, metric=metric, goal=goal, **limits))
    return [replace(result, scale=_scale(state, result.trials)) for result in results]


def _scale(state: CampaignState, trials: Iterable[str]) -> str | None:
    """The parameters and steps of trials: `1.31M parameters, 120 to 200 steps`; None without trials."""
    metrics = [state.results[trial_id]["metrics"] for trial_id in trials if trial_id in state.results]
    parts = []
    for name, noun in {"n_params": "parameters", "steps": "steps"}.items():
        ends = sorted(number for one in metrics if (number := one.get(name)))
        texts = dict.fromkeys(fmt.count(number) for number in (*ends[:1], *ends[-1:]))
        parts += [f"{' to '.join(texts)} {noun}"] if ends else []
    return ", ".join(parts) or None


def _problems(state: CampaignState) -> list[TrialProblem]:
    """Lists each trial that failed or diverged once, with its last error."""
    records = (record for phase in state.phases.values() for record in phase_records(state, phase))
    problems: dict[str, TrialProblem] = {}
    for record in records:
        if record.status not in ("finished", "stopped"):
            names = TrialProblem.__dataclass_fields__.keys() - {"traceback"}
            facts = {name: getattr(record, name) for name in names}
            traceback = state.results.get(record.trial_id, {}).get("traceback")
            problems.setdefault(record.trial_id, TrialProblem(**facts, traceback=traceback))
    return list(problems.values())


def curve_rows(root: Path, records: Iterable[TrialRecord]) -> list[dict[str, Any]]:
    """Returns a row for each logged step of each trial; a trial without logged steps gets one empty row.

    Values that do not fit their column are left out, since the files of trials may come from somebody else.
    """
    rows = []
    columns = {name: kind for name, kind in CURVE_COLUMNS.items() if name not in TRIAL_COLUMNS}
    for record in records:
        trial = {name: getattr(record, name) for name in TRIAL_COLUMNS}
        logged = read_metrics(root / "trials" / record.trial_id / "metrics.jsonl")
        rows += [
            trial | {name: _number(row.get(name), kind) for name, kind in columns.items()} for row in logged or [{}]
        ]
    return rows


def _number(value: Any, kind: str) -> Any:
    if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:
        return None
    if kind == "int64":
        return int(value) if value == int(value) and abs(value) < 2**63 else None
    return value


def file_warnings(root: Path, state: CampaignState) -> list[str]:
    """Returns warnings about trials in the summary whose folder is gone or whose curve has damaged lines."""
    planned = dict.fromkeys(trial_id for phase in state.phases.values() for trial_id in phase.trial_ids)
    lost, damaged = [], []
    for trial_id in (trial_id for trial_id in planned if trial_id in state.results):
        folder = root / "trials" / trial_id
        if not folder.is_dir():
            lost.append(f"trials/{trial_id}")
        elif read_rows(folder / "metrics.jsonl")[1]:
            damaged.append(f"trials/{trial_id}/metrics.jsonl")
    texts = {"their folders are gone, and their curves and models with them": lost}
    texts["they have damaged lines, which the curves leave out"] = damaged
    advice = "the command of the campaign with --retrain trains them anew"
    return [f"{fmt.listing(names, most=4)}: {text}; {advice}" for text, names in texts.items() if names]


def write_phase(root: Path, state: CampaignState, phase: PhaseState) -> PhaseSummary:
    """Writes the four derived files of a phase and returns its summary.

    Raises:
        OSError: the folder cannot be written, or a link is in its place.
    """
    folder = root / phase.name
    if folder.is_symlink():  # the results may come from somebody else
        raise OSError(
            errno.ELOOP, "it is a link, and a phase is only written inside the results directory", str(folder)
        )
    make_folder(folder)
    records, summary = phase_records(state, phase), summarize_phase(state, phase)
    lines = (json.dumps(to_json(record), allow_nan=False) + "\n" for record in records)
    write_atomic(folder / "trials.jsonl", "".join(lines))
    _write_parquet(folder / "summary.parquet", [_arm_row(summary, arm) for arm in summary.arms], ARM_COLUMNS)
    _write_parquet(folder / "curves.parquet", curve_rows(root, records), CURVE_COLUMNS)
    write_json(folder / "summary.json", to_json(summary))
    return summary


def write_campaign(root: Path, state: CampaignState, claims: Sequence[Claim] | None = None) -> CampaignSummary:
    """Writes all derived files of a results directory; `claims` replace those of the campaign file."""
    from tune.report.html import write_report

    phases = [write_phase(root, state, phase) for phase in state.phases.values()]
    summary = summarize_campaign(state, phases, claims, file_warnings=file_warnings(root, state))
    write_json(root / "summary.json", to_json(summary))
    curves = [row for phase in state.phases.values() for row in curve_rows(root, phase_records(state, phase))]
    write_report(root, summary, curves)
    _write_digests(root, state)
    return summary


def rebuild(root: Path, claims: Sequence[Claim] | None = None) -> CampaignSummary:
    """Rebuilds all derived files of a results directory from its journal, as `write_campaign` does."""
    return write_campaign(root, read_state(root), claims)


def _write_digests(root: Path, state: CampaignState) -> None:
    """Writes the SHA-256 of each derived file and trial log, for `verify`."""
    trials = [root / "trials" / trial_id for phase in state.phases.values() for trial_id in phase.trial_ids]
    folders = [root, *(root / phase for phase in state.phases), *trials]
    paths = [path for folder in folders for name in (*DERIVED, *TRIAL_LOGS) if (path := folder / name).is_file()]
    digests = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    write_json(root / DIGESTS, sealed(digests))


def sealed(digests: Mapping[str, str]) -> dict[str, str]:
    """Returns `digests` with the SHA-256 of all of them under the key `sha256`."""
    text = json.dumps(dict(digests), sort_keys=True)
    return {**digests, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _arm_row(phase: PhaseSummary, arm: summaries.ArmSummary) -> dict[str, Any]:
    """Flattens an arm to one row of `ARM_COLUMNS`: nested numbers have dotted names, settings are JSON."""
    values = to_json(arm)
    for name in ("score", "val_loss", "delta"):
        values |= {f"{name}.{part}": value for part, value in (values[name] or {}).items()}
    values |= {"campaign": phase.campaign, "phase": phase.phase, "overrides": json.dumps(arm.overrides)}
    return {name: values.get(name) for name in ARM_COLUMNS}


def _write_parquet(path: Path, rows: list[dict[str, Any]], columns: Mapping[str, str]) -> None:
    import pyarrow
    import pyarrow.parquet

    strings = pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema([(name, strings if kind == "list<string>" else kind) for name, kind in columns.items()])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), sink, write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())
