"""Types of the fields of events, and their limits, which are far beyond what a campaign writes."""

from datetime import datetime
from math import isfinite
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ngpt.config.base import Config, printable
from tune.storage.names import MAX_SEED, folder_problem

MAX_TEXT = 1_000_000  # characters
MAX_NUMBER = 1e60  # of a metric; its fourth power is finite
MAX_SECONDS = 1e10
MAX_COUNT = 10**18  # of tokens, for example
MAX_ROWS = 100_000  # of trials, seeds, workers and the like
MAX_DEPTH = 16  # of nested settings


def invalid(text: str) -> PydanticCustomError:
    """The error of a validator, with `text` as its message."""
    return PydanticCustomError("journal", "{text}", {"text": text})


def _folder(*, is_phase: bool) -> AfterValidator:
    def check(name: str) -> str:
        if problem := folder_problem(name, is_phase=is_phase):
            raise invalid(f"{printable(repr(name))} cannot be a folder of the results: {problem}")
        return name

    return AfterValidator(check)


def _check_time(text: str) -> str:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = datetime.min
    if time.tzinfo is None or not 1900 < time.year < 9000:
        raise invalid(f"{printable(repr(text))} is not an ISO time with a time zone")
    return text


def _check_speed(speed: float) -> float:
    if 0 < speed < 1e-6:
        raise invalid("a speed is 0 or at least 1e-6")  # numbers divided by it stay finite
    return speed


def _check_json(value: Any, depth: int = 0) -> Any:
    """Checks plain data without a schema, such as the value of a setting."""
    kind = type(value)
    if kind is float:
        if not isfinite(value):
            raise invalid("a number is not finite")
    elif kind is int:
        if not -(2**63) <= value < 2**63:
            raise invalid("a whole number has more than 64 bits")
    elif kind is str:
        if len(value) > MAX_TEXT:
            raise invalid(f"a text has more than {MAX_TEXT} characters")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise invalid("a text has half of a surrogate pair")
    elif depth >= MAX_DEPTH:
        raise invalid(f"nested too deeply, at most {MAX_DEPTH} levels are read")
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
Speed = Annotated[float, Field(ge=0, le=MAX_COUNT), AfterValidator(_check_speed)]
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


class Metric(Part):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    goal: Literal["minimize", "maximize"] = "minimize"


class Environment(Open):
    device: str | None = None
    gpus: Rows | None = None


class Data(Open):
    """The corpus of a campaign, by its hashes and counts."""

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
    """A claim of the campaign file (`tune/spec/schema.py`)."""

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


class Work(Part):
    """What one trial costs: FLOPs and tokens, and the shape of its model, which decides its speed."""

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
                raise invalid("a range has two numbers, the smaller first")
            if self.kind == "log" and numbers[0] <= 0:
                raise invalid("a logarithmic range has positive numbers")
        return self


class Question(Fields):
    space: dict[str, Axis] = Field(default_factory=dict)


class SearchFields(Fields):
    """The trials that a search has proposed, and what it searches."""

    question: Question | None = None
    proposed: list[Settings] | None = None
    optuna: str | None = None


class Draw(Part):
    """The fresh seeds of a phase: how they were chosen, and the question that they answer."""

    content: str
    seeds: list[Seed] | None = None
    question: str | None = None
    look: Rows = 0
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = None
    confirms: list[Settings]
    recorded: bool = True
    prior: Annotated[tuple[Positive, Amount], LIST] | None = None


class LookRow(Part):
    """What one look at a phase with `until: decided` says about an arm."""

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
            raise invalid(f"an arm that is {self.decision} has a difference")
        return self


class LookFields(Part):
    """One look at a phase with `until: decided`, after so many seeds."""

    number: Rows
    seeds: Rows
    level: Annotated[float, Field(gt=0, lt=1)]
    leader: ArmName
    arms: list[LookRow]
    runs_on: list[ArmName] = Field(default_factory=list)


class Better(Part):
    """An arm that is better than the baseline, and by how much."""

    arm: ArmName
    overrides: Settings
    gain: Number


class Expected(Fields):
    """The trials that a later phase will have, and the work of each."""

    phase: PhaseName
    trials: Rows
    work: Work


class SharingPoint(Fields):
    """The measured speed of so many trials on one device."""

    trials: Rows
    tokens_per_second: Amount


class TrialConfig(Open):
    steps: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    vocab_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(None, alias="model.vocab_size")


class Metrics(Open):
    __pydantic_extra__: dict[str, Number | None]
    steps: Annotated[float, Field(ge=0, le=MAX_COUNT, multiple_of=1)] | None = None
    tokens: Annotated[float, Field(ge=0, le=MAX_COUNT, multiple_of=1)] | None = None
    tokens_per_second: Speed | None = None
    peak_memory_bytes: Annotated[float, Field(ge=0, le=MAX_COUNT)] | None = None
    n_params: Annotated[float, Field(ge=0, le=MAX_COUNT)] | None = None


class Evaluated(Open):
    """How a trial came to its scores of downstream tasks."""

    asked: Settings | None = None
    error: str | None = None
    lm_eval: str | None = None
    content: dict[str, str] = Field(default_factory=dict)


class Provenance(Open):
    device: str | None = None
    code_sha256: str | None = None
    data_sha256: str | None = None
    eval_sha256: str | None = None
    copied_from: str | None = None
    packed: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1
    vectorised: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1
    ranks: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1
    evaluation: Evaluated | None = None


class EvalBlocks(Fields):
    """The tokens of each block of the evaluation text, and the loss of its tokens in nats."""

    tokens: Annotated[list[Annotated[int, Field(ge=1, le=MAX_COUNT)]], Field(max_length=MAX_ROWS)]
    nats: list[Number]

    @pydantic.model_validator(mode="after")
    def _check(self) -> "EvalBlocks":
        if len(self.tokens) != len(self.nats):
            raise invalid("the blocks have other numbers of tokens than of losses")
        return self
