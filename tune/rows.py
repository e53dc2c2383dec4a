"""The rows of campaigns as types, and the columns of their tables (docs/python.md lists them)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tune.results.summary import ARM_COLUMNS, CURVE_COLUMNS, DELTA_COLUMNS, TRIAL_COLUMNS, metric_columns
from tune.storage.summaries import ArmSummary, ClaimResult, PhaseSummary, TrialRecord
from tune.terminal.table import JSON, Table, attribute, kind_of

if TYPE_CHECKING:  # they need torch, and results are read without
    from tune.machine.estimate import PhaseEstimate
    from tune.results.compare import ArmComparison

CONFIG = "config."  # start of the columns with settings that the arms change
METRICS = {  # that every trial has
    **dict.fromkeys(("val_loss", "val_bpb", "train_loss"), "float64"),
    **dict.fromkeys(("steps", "tokens", "n_params"), "int64"),
    **dict.fromkeys(("tokens_per_second", "peak_memory_bytes"), "float64"),
}
RECORD_COLUMNS = {
    **TRIAL_COLUMNS,
    "status": "string",
    **METRICS,
    "seconds": "float64",
    "attempt": "int64",
    "error": "string",
    "started_at": "string",
    "reused_from": "string",
    "overrides": JSON,
}
CLAIM_COLUMNS = {
    **dict.fromkeys(("id", "source", "says", "relation", "metric", "verdict"), "string"),
    **dict.fromkeys(("observed", "ci_low", "ci_high"), "float64"),
    "n": "int64",
    "why": "string",
    "scale": "string",
    "trials": "list<string>",
}
COMPARED_COLUMNS = {
    "a": "list<string>",
    "b": "list<string>",
    "verdict": "string",
    **dict.fromkeys(("n.a", "n.b"), "int64"),
    **dict.fromkeys(("score.a", "score.b"), "float64"),
    **{f"delta.{name}": kind for name, kind in DELTA_COLUMNS.items()},
    "paired": "bool",
    "identical": "bool",
    **{f"tokens_per_second.{name}": "float64" for name in ("a", "b", "ratio")},
    "lost": "list<string>",
}
PLANNED_COLUMNS = {
    **dict.fromkeys(("phase", "inherit"), "string"),
    **dict.fromkeys(("arms", "seeds", "trials", "most_trials", "to_run", "tokens", "disk_bytes"), "int64"),
    **dict.fromkeys(("seconds", "smallest_detectable"), "float64"),
    "guessed": "bool",
    "which_seeds": "string",
}
DELTA_SHOWN = ("delta.mean", "delta.ci_low", "delta.ci_high")
RECORD_FIELDS = {each.name for each in fields(TrialRecord)}


@dataclass(frozen=True)
class Arm(ArmSummary):
    """An arm of a phase, with the names of its campaign and phase."""

    campaign: str = ""
    phase: str = ""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What a trial logged at a step; None where a value was not computed. docs/results.md explains the fields."""

    campaign: str
    phase: str
    arm: str
    trial_id: str
    seed: int
    step: int | None = None
    tokens: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    tokens_per_second: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    lr_embedding: float | None = None
    lr_head: float | None = None
    lr_scales: float | None = None
    r_mean: float | None = None
    r_replaced: float | None = None
    weight_norm_error: float | None = None
    activation_norm_error: float | None = None
    flops: float | None = None
    seconds: float | None = None
    train_seconds: float | None = None
    r_min: float | None = None
    r_max: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # those without a field of their own, by name


def curve_point(row: Mapping[str, Any]) -> CurvePoint:
    """The row of a step, as `curves.parquet` has it, as a point."""
    further = {name: value for name, value in row.items() if name not in CURVE_COLUMNS}
    return CurvePoint(**{name: value for name, value in row.items() if name in CURVE_COLUMNS}, metrics=further)


def trial_table(records: Sequence[TrialRecord]) -> Table[TrialRecord]:
    """A row for each trial. After the fixed columns come further metrics, and the settings that the arms change."""
    metrics = dict.fromkeys(name for record in records for name in record.metrics if name not in METRICS)
    settings = dict.fromkeys(name for record in records for name in record.overrides)
    columns = dict(RECORD_COLUMNS)
    for name in metrics:
        column = f"metrics.{name}" if name in RECORD_FIELDS else name
        columns[column] = kind_of(record.metrics.get(name) for record in records)
    for name in settings:
        columns[f"{CONFIG}{name}"] = kind_of(record.config.get(name) for record in records)
    shown = ("phase", "arm", "seed", "status", "val_loss", "val_bpb", "tokens_per_second", "seconds")
    return Table(records, columns, value=_record_value, shown=shown)


def _record_value(record: TrialRecord, column: str) -> Any:
    if column in RECORD_FIELDS:
        return getattr(record, column)
    if column.startswith(CONFIG):
        return record.config.get(column.removeprefix(CONFIG))
    return record.metrics.get(column.removeprefix("metrics."))


def arm_table(phases: Iterable[PhaseSummary]) -> Table[Arm]:
    """A row for each arm of each phase, with the columns of `summary.parquet`."""
    arms = [Arm(**vars(arm), campaign=phase.campaign, phase=phase.phase) for phase in phases for arm in phase.arms]
    columns = {name: JSON if name == "overrides" else kind for name, kind in ARM_COLUMNS.items()}
    for name in sorted({name for arm in arms for name in arm.metrics}):
        columns |= metric_columns(name)
    return Table(arms, columns, value=_arm_value, shown=("phase", "arm", "n", "score.mean", *DELTA_SHOWN, "verdict"))


def _arm_value(arm: Arm, column: str) -> Any:
    name, _, part = column.rpartition(".")
    return getattr(arm.metrics[name], part, None) if name in arm.metrics else attribute(arm, column)


def curve_table(points: Iterable[CurvePoint]) -> Table[CurvePoint]:
    """A row for each logged step, with the columns of `curves.parquet`."""
    shown = ("phase", "arm", "seed", "step", "train_loss", "val_loss", "tokens_per_second")
    points = list(points)
    further = sorted({name for point in points for name in point.metrics})
    return Table(points, CURVE_COLUMNS | dict.fromkeys(further, "float64"), value=_point_value, shown=shown)


def _point_value(point: CurvePoint, column: str) -> Any:
    return point.metrics[column] if column in point.metrics else getattr(point, column, None)


def claim_table(claims: Iterable[ClaimResult]) -> Table[ClaimResult]:
    """A row for each claim."""
    return Table(claims, CLAIM_COLUMNS, shown=("id", "verdict", "observed", "ci_low", "ci_high", "n", "says"))


def planned_table(phases: "Iterable[PhaseEstimate]") -> "Table[PhaseEstimate]":
    """A row for each phase of a plan."""
    return Table(phases, PLANNED_COLUMNS, shown=("phase", "arms", "seeds", "trials", "to_run", "tokens", "seconds"))


def compared_table(arms: "Iterable[ArmComparison]") -> "Table[ArmComparison]":
    """A row for each arm that both sides of a comparison have."""
    return Table(arms, COMPARED_COLUMNS, shown=("a", "b", "n.a", "n.b", "score.a", "score.b", *DELTA_SHOWN, "verdict"))
