"""The fields of each event of a journal, with their types and limits.

A journal may come from somebody else: its names become folders, and its numbers go into statistics. So every event is
checked when it is read, before anything uses it. The limits are far beyond what a campaign writes. Events and fields
that this version does not know are ignored; the CRC finds damage, not forgery.
"""

from collections.abc import Mapping
from datetime import datetime
from math import isfinite
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field, TypeAdapter
from pydantic_core import PydanticCustomError

from ngpt.config.base import Config, dotted_name, printable
from tune.storage.names import MAX_SEED, folder_problem

MAX_TEXT = 1_000_000  # characters
MAX_NUMBER = 1e60  # of a metric; its fourth power is finite
MAX_SECONDS = 1e10
MAX_COUNT = 10**18  # of tokens, for example
MAX_ROWS = 100_000  # of trials, seeds, workers and the like
MAX_DEPTH = 16  # of nested settings


def _invalid(text: str) -> PydanticCustomError:
    return PydanticCustomError("journal", "{text}", {"text": text})


def _folder(*, is_phase: bool) -> AfterValidator:
    def check(name: str) -> str:
        if problem := folder_problem(name, is_phase=is_phase):
            raise _invalid(f"{printable(repr(name))} cannot be a folder of the results: {problem}")
        return name

    return AfterValidator(check)


def _check_time(text: str) -> str:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = datetime.min
    if time.tzinfo is None or not 1900 < time.year < 9000:
        raise _invalid(f"{printable(repr(text))} is not an ISO time with a time zone")
    return text


def _check_speed(speed: float) -> float:
    if 0 < speed < 1e-6:
        raise _invalid("a speed is 0 or at least 1e-6")  # numbers divided by it stay finite
    return speed


def _check_json(value: Any, depth: int = 0) -> Any:
    """Checks plain data without a schema, such as the value of a setting."""
    kind = type(value)
    if kind is float:
        if not isfinite(value):
            raise _invalid("a number is not finite")
    elif kind is int:
        if not -(2**63) <= value < 2**63:
            raise _invalid("a whole number has more than 64 bits")
    elif kind is str:
        if len(value) > MAX_TEXT:
            raise _invalid(f"a text has more than {MAX_TEXT} characters")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise _invalid("a text has half of a surrogate pair")
    elif depth >= MAX_DEPTH:
        raise _invalid(f"nested too deeply, at most {MAX_DEPTH} levels are read")
    elif kind is dict:
        for name, item in value.items():
            _check_json(name, depth + 1)
            _check_json(item, depth + 1)
    elif kind is list:
        for item in value:
            _check_json(item, depth + 1)
    return value


PhaseName = Annotated[str, _folder(is_phase=True)]
TrialId = Annotated[str, _folder(is_phase=False)]
ArmName = Annotated[str, Field(min_length=1, max_length=10_000)]
Time = Annotated[str, AfterValidator(_check_time)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Rows = Annotated[int, Field(ge=0, le=MAX_ROWS)]
Amount = Annotated[float, Field(ge=0, le=MAX_NUMBER)]  # integers are allowed, too
Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Share = Annotated[float, Field(ge=0, le=1)]
LIST = pydantic.Strict(False)  # a tuple, which is a list in JSON
Json = Annotated[Any, AfterValidator(_check_json)]
Settings = Annotated[dict[str, Any], AfterValidator(_check_json)]  # by dotted name


class Part(Config):
    """A part of an event that becomes a dataclass, so it has no other fields."""

    model_config = pydantic.ConfigDict(str_max_length=MAX_TEXT)


class Fields(Config):
    """The fields of an event that are used; others are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore", str_max_length=MAX_TEXT)


class Open(Config):
    """A mapping of which some entries are used, and others only shown."""

    model_config = pydantic.ConfigDict(extra="allow", str_max_length=MAX_TEXT)
    __pydantic_extra__: dict[str, Json] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]


class Header(Fields):
    """What every event has."""

    seq: Annotated[int, Field(ge=1)]
    time: Time
    event: Annotated[str, Field(min_length=1, max_length=100)]
    elapsed: Seconds | None = None


# ---- starts ----------------------------------------------------------------------------------------------------------


class Metric(Part):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    goal: Literal["minimize", "maximize"] = "minimize"


class Environment(Open):
    device: str | None = None
    gpus: Rows | None = None


class Data(Open):
    corpus: str
    tokenizer: str
    tokenizer_sha256: str | None
    vocab_size: Count
    train_tokens: Count
    eval_tokens: Count
    eval_sha256: str
    fingerprint: str
    sha256: str
    skipped_shards: Rows = 0
    shards: dict[str, dict[str, str]] = Field(default_factory=dict)


class ClaimFields(Part):
    id: str
    relation: str
    source: str | None = None
    says: str | None = None
    metric: str = "val_loss"
    goal: Literal["minimize", "maximize"] | None = None
    phase: str | None = None
    left: Settings | None = None
    right: Settings | None = None
    parts: list[Settings] | None = None
    setting: str | None = None
    direction: str | None = None
    value: Number | None = None
    tolerance: Amount | None = None
    expression: str | None = None


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


class Work(Part):
    shape: str
    tokens: Amount
    flops: Positive


class Arm(Fields):
    arm: ArmName
    overrides: Settings
    trials: Annotated[list[Annotated[tuple[Seed, TrialId], LIST]], Field(min_length=1, max_length=MAX_ROWS)]
    work: Work | None = None
    sources: list[str] = Field(default_factory=list)


class Axis(Fields):
    """A dimension of a search space."""

    kind: str
    values: Annotated[list[Json], Field(min_length=1)]
    whole: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Axis":
        if self.kind != "choice":
            numbers = [value for value in self.values if type(value) in (int, float)]
            if len(numbers) != 2 or len(self.values) != 2 or not numbers[0] < numbers[1]:
                raise _invalid("a range has two numbers, the smaller first")
            if self.kind == "log" and numbers[0] <= 0:
                raise _invalid("a logarithmic range has positive numbers")
        return self


class Question(Fields):
    space: dict[str, Axis] = Field(default_factory=dict)


class SearchFields(Fields):
    question: Question | None = None
    proposed: list[Settings] | None = None
    optuna: str | None = None


class Draw(Part):
    content: str
    seeds: list[Seed] | None = None
    question: str | None = None
    look: Rows = 0
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    confirms: list[Settings]
    recorded: bool = True
    prior: Annotated[tuple[Positive, Amount], LIST] | None = None


class LookRow(Part):
    arm: ArmName
    n: Rows
    delta: Number | None = None
    ci_low: Number | None = None
    ci_high: Number | None = None
    p: Share | None = None
    p_corrected: Share | None = None
    decision: (
        Literal["better", "worse", "equivalent", "dropped", "futile", "undecided", "diverged", "failed", "incomplete"]
        | None
    ) = None
    why: str = ""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "LookRow":
        if self.decision in ("better", "worse") and not self.delta:
            raise _invalid(f"an arm that is {self.decision} has a difference")
        return self


class LookFields(Part):
    number: Rows
    seeds: Rows
    level: Annotated[float, Field(gt=0, lt=1)]
    leader: ArmName
    arms: list[LookRow]
    runs_on: list[ArmName] = Field(default_factory=list)


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
    fresh: Draw | None = None
    seen: list[Seed] = Field(default_factory=list)
    most_seeds: Rows | None = None
    looks: list[LookFields] = Field(default_factory=list)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "PhasePlanned":
        names, seeds = [arm.arm for arm in self.arms], set(self.seeds)
        if len(set(names)) < len(names):
            raise _invalid("two arms have the same name")
        if self.baseline not in names:
            raise _invalid("the baseline is none of the arms")
        for arm in self.arms:
            used = [seed for seed, _ in arm.trials]
            if len(set(used)) < len(used) or not seeds.issuperset(used):
                raise _invalid("the seeds of an arm are not those of the phase")
        for look in self.looks:
            if not {look.leader, *look.runs_on, *(row.arm for row in look.arms)} <= set(names):
                raise _invalid("a look names an arm that the phase does not have")
        return self


class Better(Part):
    arm: ArmName
    overrides: Settings
    gain: Number


class PhaseFinished(Fields):
    phase: PhaseName
    winner: ArmName
    winner_overrides: Settings
    better: list[Better] = Field(default_factory=list)
    best: Better | None = None


class Expected(Fields):
    phase: PhaseName
    trials: Rows
    work: Work


class TrialsExpected(Fields):
    stages: list[list[Expected]]


class SpeedsMeasured(Fields):
    speeds: dict[str, Positive]


class SharingPoint(Fields):
    trials: Rows
    tokens_per_second: Amount


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


class TrialConfig(Open):
    steps: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    vocab_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(None, alias="model.vocab_size")


class Metrics(Open):
    __pydantic_extra__: dict[str, Number | None]
    steps: Annotated[float, Field(ge=0, le=MAX_COUNT, multiple_of=1)] | None = None
    tokens: Annotated[float, Field(ge=0, le=MAX_COUNT, multiple_of=1)] | None = None
    tokens_per_second: Annotated[float, Field(ge=0, le=MAX_COUNT), AfterValidator(_check_speed)] | None = None
    peak_memory_bytes: Annotated[float, Field(ge=0, le=MAX_COUNT)] | None = None
    n_params: Annotated[float, Field(ge=0, le=MAX_COUNT)] | None = None


class Provenance(Open):
    device: str | None = None
    code_sha256: str | None = None
    data_sha256: str | None = None
    eval_sha256: str | None = None
    copied_from: str | None = None
    packed: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1
    vectorised: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1
    ranks: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1


class EvalBlocks(Fields):
    tokens: Annotated[list[Annotated[int, Field(ge=1, le=MAX_COUNT)]], Field(max_length=MAX_ROWS)]
    nats: list[Number]

    @pydantic.model_validator(mode="after")
    def _check(self) -> "EvalBlocks":
        if len(self.tokens) != len(self.nats):
            raise _invalid("the blocks have other numbers of tokens than of losses")
        return self


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
