"""The events of a journal, with the types and limits of their fields (event_fields.py).

A journal may come from somebody else: its names become folders, and its numbers go into statistics. So every event is
checked when it is read, before anything uses it. Events and fields that this version does not know are ignored; the CRC
finds damage, not forgery.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, TypeAdapter

from ngpt.config.base import dotted_name, printable
from tune.storage.event_fields import (
    MAX_COUNT,
    MAX_ROWS,
    Amount,
    Arm,
    ArmName,
    Better,
    ClaimFields,
    Count,
    Data,
    Draw,
    Environment,
    EvalBlocks,
    Expected,
    Fields,
    Json,
    LookFields,
    Metric,
    Metrics,
    Number,
    PhaseName,
    Positive,
    Provenance,
    Rows,
    SearchFields,
    Seconds,
    Seed,
    Settings,
    SharingPoint,
    Time,
    TrialConfig,
    TrialId,
    invalid,
)


class Header(Fields):
    """What every event has."""

    seq: Annotated[int, Field(ge=1)]
    time: Time
    event: Annotated[str, Field(min_length=1, max_length=100)]
    elapsed: Seconds | None = None


# ---- starts ----------------------------------------------------------------------------------------------------------


class CampaignStarted(Fields):
    campaign: TrialId
    description: str | None
    metric: Metric
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    min_effect: Amount
    hold: str | dict[str, str] | None = None
    command: str
    workers: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    environment: Environment
    data: Data
    expected_trials: dict[PhaseName, Rows]
    most_trials: dict[PhaseName, Rows] = Field(default_factory=dict)
    base: Settings = Field(default_factory=dict)
    dashboard_url: str | None = None
    file_sha256: str | None = None
    code_sha256: str | None = None
    stops_early: bool = True
    smoke: bool = False
    notes: list[Annotated[str, Field(max_length=1000)]] = Field(default_factory=list)
    claims: list[ClaimFields] = Field(default_factory=list)


class CampaignEnded(Fields):
    status: Annotated[str, Field(max_length=100)]
    seconds: Seconds
    left_out: dict[PhaseName, Rows] = Field(default_factory=dict)


# ---- phases ----------------------------------------------------------------------------------------------------------


class PhasePlanned(Fields):
    phase: PhaseName
    inherit: str | None
    base: Settings
    baseline: ArmName
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_ROWS)]
    swept: dict[str, list[Json]]
    arms: Annotated[list[Arm], Field(min_length=1, max_length=MAX_ROWS)]
    search: SearchFields | None = None
    confirms: PhaseName | None = None
    hands_on_best: bool = False
    fresh: Draw | None = None
    seen: list[Seed] = Field(default_factory=list)
    most_seeds: Rows | None = None
    looks: list[LookFields] = Field(default_factory=list)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "PhasePlanned":
        names, seeds = [arm.arm for arm in self.arms], set(self.seeds)
        if len(set(names)) < len(names):
            raise invalid("two arms have the same name")
        if self.baseline not in names:
            raise invalid("the baseline is none of the arms")
        for arm in self.arms:
            used = [seed for seed, _ in arm.trials]
            if len(set(used)) < len(used) or not seeds.issuperset(used):
                raise invalid("the seeds of an arm are not those of the phase")
        for look in self.looks:
            if not {look.leader, *look.runs_on, *(row.arm for row in look.arms)} <= set(names):
                raise invalid("a look names an arm that the phase does not have")
        return self


class PhaseFinished(Fields):
    phase: PhaseName
    winner: ArmName
    winner_overrides: Settings
    better: list[Better] = Field(default_factory=list)
    best: Better | None = None


class TrialsExpected(Fields):
    stages: list[list[Expected]]


class SpeedsMeasured(Fields):
    speeds: dict[str, Positive]


class PackingChosen(Fields):
    trials_per_device: Rows
    why: str
    device: str | None = None
    curve: list[SharingPoint]
    measured_at: str | None = None
    together: Rows = 1


# ---- code ------------------------------------------------------------------------------------------------------------


class CodeVersion(Fields):
    code_sha256: str
    files: dict[str, dict[str, str]]


class CodeKept(Fields):
    code_sha256: str
    versions: list[str]
    trials: dict[TrialId, list[str]]
    continued: dict[TrialId, list[str]]


class TrialsDiscarded(Fields):
    trial_ids: list[TrialId]


# ---- trials ----------------------------------------------------------------------------------------------------------


class TrialStarted(Fields):
    trial_id: TrialId
    phase: PhaseName
    arm: ArmName
    seed: Seed
    steps: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    attempt: Rows
    code_sha256: str | None = None
    copied_from: Annotated[str, Field(max_length=200)] | None = None


class TrialFinished(Fields):
    trial_id: TrialId
    phase: PhaseName
    arm: ArmName
    seed: Seed
    attempt: Rows
    config: TrialConfig
    status: Literal["finished", "diverged", "failed", "stopped"]
    metrics: Metrics
    error: str | None
    started_at: str | None
    seconds: Seconds
    provenance: Provenance
    eval_blocks: EvalBlocks | None = None


class WorkerDied(Fields):
    trial_id: TrialId


class TrialWaiting(Fields):
    trial_id: TrialId


class TrialPlaced(Fields):
    trial_id: TrialId


class WorkersChanged(Fields):
    workers: Rows
    reason: str | None = None


class RungReached(Fields):
    trial_id: TrialId
    phase: PhaseName
    arm: ArmName
    seed: Seed
    rung: Count
    value: Number
    stops: bool
    why: str | None


HEADER = TypeAdapter(Header)
EVENTS: Mapping[str, TypeAdapter[Any]] = {
    "campaign_started": TypeAdapter(CampaignStarted),
    "campaign_ended": TypeAdapter(CampaignEnded),
    "phase_planned": TypeAdapter(PhasePlanned),
    "phase_finished": TypeAdapter(PhaseFinished),
    "trials_expected": TypeAdapter(TrialsExpected),
    "speeds_measured": TypeAdapter(SpeedsMeasured),
    "packing_chosen": TypeAdapter(PackingChosen),
    "code_version": TypeAdapter(CodeVersion),
    "code_kept": TypeAdapter(CodeKept),
    "trials_discarded": TypeAdapter(TrialsDiscarded),
    "trial_started": TypeAdapter(TrialStarted),
    "trial_finished": TypeAdapter(TrialFinished),
    "worker_died": TypeAdapter(WorkerDied),
    "trial_waiting": TypeAdapter(TrialWaiting),
    "trial_placed": TypeAdapter(TrialPlaced),
    "workers_changed": TypeAdapter(WorkersChanged),
    "rung_reached": TypeAdapter(RungReached),
}


def event_problem(event: Mapping[str, Any]) -> str | None:
    """What is wrong with an event, in one line that names the field; None if nothing is."""
    name = event.get("event")
    try:
        HEADER.validate_python(event)
        if isinstance(name, str) and name in EVENTS:
            EVENTS[name].validate_python(event)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = dotted_name(tuple(first["loc"]))
        what = first["msg"][:1].lower() + first["msg"][1:]
        if first["type"] not in ("missing", "journal", "extra_forbidden"):
            what += f", got {printable(repr(first['input'])[:1000], 60)}"
        return printable(f"{name}: {where}: {what}" if where else f"{name}: {what}", 500)
    return None
