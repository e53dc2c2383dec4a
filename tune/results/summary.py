"""Writes the derived files: trial records, ranked arms, curves, the campaign summary and the report.

They depend only on the journal and the trials' `metrics.jsonl`, so `report` can rebuild them.
"""

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.system.atomic_files import make_folder, write_atomic, write_json
from ngpt.training.tracker import read_metrics, read_rows
from tune import format as fmt
from tune.analysis.readings import NoisePrior
from tune.planning.budget import left_out_sentence
from tune.results.answer import find_answer
from tune.results.costs import campaign_cost
from tune.results.phase_summary import (
    DIAGNOSTICS,
    MAX_METRICS,
    count_trials,
    phase_metrics,
    phase_records,
    summarize_phase,
)
from tune.storage import summaries
from tune.storage.links import NOT_FOLLOWED, refuse_links
from tune.storage.state import CampaignState, PhaseState, read_state
from tune.storage.summaries import (
    RUNNING,
    CampaignSummary,
    PhaseSummary,
    TrialProblem,
    TrialRecord,
    arrow_table,
    fitting_number,
    to_json,
)

if TYPE_CHECKING:
    from tune.spec.schema import Claim

SMOKE_CLAIM = "SMOKE: a tiny model and a few steps decide no claim"

# Names of the derived files, of the logs of a trial, and of the file that holds their digests.
DERIVED = ("trials.jsonl", "summary.json", "summary.parquet", "curves.parquet", "report.html", "report.md")
TRIAL_LOGS = ("metrics.jsonl", "histograms.jsonl", "sample.txt")
DIGESTS = "derived.json"
# Columns have one type in every phase and campaign, also where no arm has a value, so that tables can be concatenated.
PLACE = {"campaign": "string", "phase": "string"}
TRIAL_COLUMNS = PLACE | {"arm": "string", "trial_id": "string", "seed": "int64"}
CURVE_COLUMNS = TRIAL_COLUMNS | {
    "step": "int64",
    "tokens": "int64",
    **dict.fromkeys(("flops", "seconds", "train_seconds"), "float64"),
    **dict.fromkeys(("train_loss", "val_loss", "val_bpb", "tokens_per_second", "grad_norm"), "float64"),
    **dict.fromkeys(("lr", "lr_embedding", "lr_head", "lr_scales"), "float64"),
    **dict.fromkeys(DIAGNOSTICS, "float64"),
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
    "sources": "list<string>",
    "trial_ids": "list<string>",
}


def metric_columns(name: str) -> dict[str, str]:
    """The columns of a metric without a field of its own, with their types: `accuracy.mean` and so on."""
    return {f"{name}.{part}": kind for part, kind in (SPREAD_COLUMNS | {"n": "int64"}).items()}


# All campaigns have the columns of what every run measures; those of further metrics follow, sorted.
ARM_COLUMNS |= {column: kind for name in DIAGNOSTICS for column, kind in metric_columns(name).items()}


def summarize_campaign(
    state: CampaignState,
    phases: Sequence[PhaseSummary],
    claims: "Sequence[Claim] | None" = None,
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


def own_claims(state: CampaignState) -> "list[Claim]":
    """Returns the claims in the file that the campaign was run from."""
    if not (claims := state.campaign.get("claims", [])):
        return []
    from tune.spec.schema import Claim  # lazy, because it needs torch

    return [Claim(**claim) for claim in claims]


def summarize_claims(state: CampaignState, claims: "Sequence[Claim]") -> list[summaries.ClaimResult]:
    """Judges `claims` from the trials so far; a smoke run decides none of them."""
    if state.is_smoke:
        return [
            summaries.ClaimResult(claim.id, claim.source, claim.says, claim.relation, claim.metric, why=SMOKE_CLAIM)
            for claim in claims
        ]
    if not claims:
        return []
    from tune.claims.evidence import Evidence  # lazy, because these need torch
    from tune.claims.relations import judge_claims
    from tune.claims.selectors import ClaimArm

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

    Every row has the metrics that any of the trials has logged. Values that do not fit their column are null, since the
    files of trials may come from somebody else.
    """
    logged = [(record, _logged(root, record)) for record in records]
    names = {name for _, steps in logged for row in steps for name in row} - CURVE_COLUMNS.keys()
    columns = CURVE_COLUMNS | dict.fromkeys(sorted(names)[:MAX_METRICS], "float64")
    return [row for record, steps in logged for row in _curve(record, steps, columns)]


def iterate_curve_rows(
    root: Path, records: Iterable[TrialRecord], metrics: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields the rows of `curve_rows` with these further metrics; those of many trials are never all in memory."""
    columns = CURVE_COLUMNS | {name: "float64" for name in metrics if name not in CURVE_COLUMNS}
    for record in records:
        yield from _curve(record, _logged(root, record), columns)


def _logged(root: Path, record: TrialRecord) -> list[dict[str, Any]]:
    return read_metrics(root / "trials" / record.trial_id / "metrics.jsonl")


def _curve(
    record: TrialRecord, steps: Iterable[Mapping[str, Any]], columns: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    trial = {name: getattr(record, name) for name in TRIAL_COLUMNS}
    numbers = {name: kind for name, kind in columns.items() if name not in TRIAL_COLUMNS}
    for row in steps or [{}]:
        yield trial | {name: fitting_number(row.get(name), kind) for name, kind in numbers.items()}


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
    columns = dict(ARM_COLUMNS)
    for name in phase_metrics(state, phase):
        columns |= metric_columns(name)
    rows = [_arm_row(summary, arm, columns) for arm in summary.arms]
    _write_parquet(folder / "summary.parquet", rows, columns)
    curves = curve_rows(root, records)
    added = [name for name in next(iter(curves), {}) if name not in CURVE_COLUMNS]
    _write_parquet(folder / "curves.parquet", curves, CURVE_COLUMNS | dict.fromkeys(added, "float64"))
    write_json(folder / "summary.json", to_json(summary))
    return summary


def write_campaign(root: Path, state: CampaignState, claims: "Sequence[Claim] | None" = None) -> CampaignSummary:
    """Writes all derived files of a results directory; `claims` replace those of the campaign file."""
    phases = [write_phase(root, state, phase) for phase in state.phases.values()]
    summary = summarize_campaign(state, phases, claims, file_warnings=file_warnings(root, state))
    write_json(root / "summary.json", to_json(summary))
    write_reports(root, state, summary)
    _write_digests(root, state)
    return summary


def write_report_so_far(root: Path) -> None:
    """Writes `report.html` and `report.md` of a campaign that is running; all its other files stay as they are."""
    state = read_state(root)
    phases = [summarize_phase(state, phase) for phase in state.phases.values()]
    summary = summarize_campaign(state, phases, file_warnings=file_warnings(root, state))
    write_reports(root, state, replace(summary, status=RUNNING))


def write_reports(root: Path, state: CampaignState, summary: CampaignSummary) -> None:
    """Writes `report.html` and `report.md` of a campaign whose trials are in `root`."""
    from tune.report.html import write_report

    write_report(root, summary, *report_inputs(root, state))


def report_inputs(root: Path, state: CampaignState) -> tuple[Iterator[dict[str, Any]], Any]:
    """Returns what a report shows beside the summary: the logged rows, and the `Details`, of all trials."""
    from tune.report.explorer import Details

    records = [record for phase in state.phases.values() for record in phase_records(state, phase)]
    priors = {
        name: NoisePrior(*phase.fresh.prior)
        for name, phase in state.phases.items()
        if phase.fresh and phase.fresh.prior
    }
    names = dict.fromkeys(name for phase in state.phases.values() for name in phase_metrics(state, phase))
    own = state.campaign.get("metric", {}).get("name")
    metrics = [name for name in names if name == own] + [n for n in names if n != own and n not in DIAGNOSTICS]
    return iterate_curve_rows(root, records, metrics), Details(records, root, priors, metrics)


def rebuild(root: Path, claims: "Sequence[Claim] | None" = None) -> CampaignSummary:
    """Rebuilds all derived files of a results directory from its journal, as `write_campaign` does.

    Raises:
        OSError: a trial, or a file of one, is a link, which may have been made by somebody else.
    """
    refuse_links(root, NOT_FOLLOWED)
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


def _arm_row(phase: PhaseSummary, arm: summaries.ArmSummary, columns: Mapping[str, str]) -> dict[str, Any]:
    """Flattens an arm to one row of `columns`: nested numbers have dotted names, settings are JSON."""
    values = to_json(arm)
    for name, spread in values["metrics"].items():
        values |= {f"{name}.{part}": value for part, value in spread.items()}
    for name in ("score", "val_loss", "delta"):
        values |= {f"{name}.{part}": value for part, value in (values[name] or {}).items()}
    values |= {"campaign": phase.campaign, "phase": phase.phase, "overrides": json.dumps(arm.overrides)}
    return {name: values.get(name) for name in columns}


def _write_parquet(path: Path, rows: list[dict[str, Any]], columns: Mapping[str, str]) -> None:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(arrow_table(rows, columns), sink, write_page_checksum=True)
    write_atomic(path, sink.getvalue().to_pybytes())
