"""Result types, with the fields of `trials.jsonl` and `summary.json` in file order (see docs/results.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from tune.storage.event_fields import MAX_NUMBER
from tune.storage.records import Look

RUNNING = "running"  # status of a campaign that is shown while a process runs it
DECIDED = ("reproduced", "refuted")  # verdicts on claims that hold for the scale of their trials
# What every run measures of its model; those of r exist only with a norm mode. Further metrics come from plug-ins.
DIAGNOSTICS = ("weight_norm_error", "activation_norm_error", "r_mean", "r_min", "r_max", "r_replaced")
Settings = Mapping[str, Any]  # dotted name to value


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial of a phase: a line of `trials.jsonl`."""

    campaign: str
    phase: str
    arm: str
    trial_id: str
    seed: int
    overrides: Settings  # relative to the campaign's base
    config: Settings
    status: str
    metrics: Mapping[str, Any]
    error: str | None = None
    attempt: int = 1
    started_at: str | None = None
    seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reused_from: str | None = None  # the phase that trained it, if not this one
    unmeasured: tuple[str, ...] = ()  # metrics of the phase that it has no finite value of, although it has finished


@dataclass(frozen=True)
class Objective:
    """The metric that ranks the arms, and whether to minimize or maximize it."""

    name: str = "val_loss"
    goal: str = "minimize"


@dataclass(frozen=True)
class Spread:
    """Mean of an arm over its seeds, sample standard deviation and confidence interval of the mean."""

    mean: float | None = None
    sd: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class MetricSpread(Spread):
    """Spread of a metric that no verdict depends on, over the `n` trials of an arm that have a value."""

    n: int = 0


@dataclass(frozen=True)
class Delta:
    """Difference arm minus baseline: unadjusted interval, raw and Holm-corrected two-sided p-value.

    Without a spread to judge by (`no claim`), only the mean is set.
    """

    mean: float
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    df: float | None = None  # degrees of freedom of the interval
    reading: str | None = None  # of the noise, that gave interval and p: pooled | moderated | arm | own


@dataclass(frozen=True)
class ArmSummary:
    """An arm of a phase: averages over its finished trials, and its verdict against the baseline."""

    arm: str
    rank: int = 0
    overrides: Settings = field(default_factory=dict)  # relative to the phase's base
    sources: tuple[str, ...] = ()  # the phases that handed settings on to this arm alone
    n: int = 0  # finished seeds
    score: Spread = Spread()  # of the metric that ranks the arms
    noise_sd: float | None = None  # of one trial of this arm, around the means of its arm and its seed
    delta: Delta | None = None
    shrunken: float | None = None  # the winner's difference after allowing for its selection; None if confirmed
    verdict: str = "incomplete"
    decision: str | None = None  # with `until: decided`: when and why it got no more seeds
    seeds_to_decide: int | None = None  # of an undecided arm, with 80 % power; None if 1,000 would not do
    tied_with_winner: bool = False  # the unadjusted interval of arm minus winner contains 0
    val_bpb: float | None = None
    train_loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    trial_ids: tuple[str, ...] = ()
    val_loss: Spread = Spread()
    text_se: float | None = None  # standard error of delta.mean from the evaluation text; None in older results
    metrics: Mapping[str, MetricSpread] = field(default_factory=dict)  # those without a field of their own, by name


@dataclass(frozen=True)
class PhaseNoise:
    """Noise between the seeds of a phase, and the smallest effect that it detects with 80 % power."""

    sd: float | None = None
    method: Literal["paired", "unpaired"] | None = None
    correlation: float | None = None  # between arms, over seeds
    df: float | None = None
    smallest_detectable: float | None = None


@dataclass(frozen=True)
class TrialCounts:
    """Number of trials by final status."""

    total: int = 0
    finished: int = 0
    diverged: int = 0
    failed: int = 0
    stopped: int = 0
    reused: int = 0  # trained by an earlier phase


@dataclass(frozen=True)
class PhaseSummary:
    """A phase with its arms, ranked and judged."""

    campaign: str = ""
    phase: str = ""
    metric: Objective = Objective()
    confidence: float = 0.95
    min_effect: float = 0.0
    seeds: tuple[int, ...] = ()
    inherit: str | None = None
    base: Settings = field(default_factory=dict)  # relative to the campaign's base
    swept: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    arms: tuple[ArmSummary, ...] = ()
    baseline: str | None = None
    winner: str | None = None
    handed_on: str | None = None  # the arm that later phases start from, if it is not the winner
    why: str = ""
    confirmation: int = 0  # 1 if it is the first confirmation of its question, and so on; 0 if it is none
    noise: PhaseNoise = PhaseNoise()
    warnings: tuple[str, ...] = ()
    trials: TrialCounts = TrialCounts()
    tokens: int = 0
    seconds: float = 0.0
    most_seeds: int | None = None  # with `until: decided`: the largest number of seeds of an arm
    looks: tuple[Look, ...] = ()  # with `until: decided`: one after each round of seeds

    @property
    def fixed_trials(self) -> int | None:
        """The number of trials that `most_seeds` seeds for every arm would take; None without `until: decided`."""
        return None if self.most_seeds is None else self.most_seeds * len(self.arms)

    @property
    def winning_arm(self) -> ArmSummary | None:
        """The arm that won the phase; None while it has no winner."""
        return next((arm for arm in self.arms if arm.arm == self.winner), None)

    @property
    def ties(self) -> list[str]:
        """Names of the other arms that cannot be distinguished from the winner."""
        return [arm.arm for arm in self.arms if arm.tied_with_winner and arm.arm != self.winner]


@dataclass(frozen=True)
class Answer:
    """The settings to use, their effect, and whether fresh seeds confirm it."""

    sentence: str = "There is no answer yet."
    phase: str | None = None
    winner: str | None = None
    overrides: Settings = field(default_factory=dict)  # relative to the campaign's base
    delta: Delta | None = None
    confirmed: bool = False
    shrunken: float | None = None  # the difference after allowing for selection; None if confirmed


@dataclass(frozen=True)
class RetriedTrial:
    """A trial that was started more than once."""

    phase: str
    arm: str
    seed: int
    trial_id: str
    attempts: int
    status: str


@dataclass(frozen=True)
class Cost:
    """Machine time that a campaign used."""

    slots: int = 0  # largest number of concurrent trials
    device_hours: float | None = None
    step_seconds: float | None = None  # inside training steps
    efficiency: float | None = None  # step_seconds / (wall time * slots)
    retried: tuple[RetriedTrial, ...] = ()


@dataclass(frozen=True)
class TrialProblem:
    """A trial that failed or diverged."""

    phase: str
    arm: str
    seed: int
    trial_id: str
    status: str
    error: str | None = None
    traceback: str | None = None  # of an exception; older journals have it in `error`


@dataclass(frozen=True)
class ClaimResult:
    """A claim of an earlier report, judged from the trials of a campaign."""

    id: str
    source: str | None = None
    says: str | None = None
    relation: str | None = None
    metric: str | None = None
    verdict: str = "no data"
    observed: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int = 0  # seeds
    trials: tuple[str, ...] = ()
    why: str = ""
    scale: str | None = None  # parameters and steps of its trials: `1.31M parameters, 200 steps`

    @property
    def verdict_at_scale(self) -> str:
        """The verdict; with its scale if the claim is decided: `refuted at 1.31M parameters, 200 steps`."""
        return f"{self.verdict} at {self.scale}" if self.scale and self.verdict in DECIDED else self.verdict


@dataclass(frozen=True)
class CampaignSummary:
    """A whole campaign: its answer, phases, cost and provenance."""

    campaign: str = ""
    description: str | None = None
    status: str = "incomplete"
    metric: Objective = Objective()
    answer: Answer = Answer()
    trials: TrialCounts = TrialCounts()
    tokens: int = 0
    seconds: float = 0.0  # wall time of all sessions
    trial_seconds: float = 0.0
    cost: Cost = Cost()
    packing: Mapping[str, Any] | None = None  # how many trials shared a GPU, if that was measured
    started_at: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    base: Settings = field(default_factory=dict)
    command: str = ""
    phases: tuple[PhaseSummary, ...] = ()
    claims: tuple[ClaimResult, ...] = ()
    problems: tuple[TrialProblem, ...] = ()
    left_out: Mapping[str, int] = field(
        default_factory=dict
    )  # trials not run per phase, if a budget ended the campaign
    warnings: tuple[str, ...] = ()
    smoke: bool = False  # ran with `--smoke`, so it answers nothing

    @property
    def title(self) -> str:
        """The name of the campaign, marked if it ran with `--smoke`."""
        return f"SMOKE {self.campaign}" if self.smoke else self.campaign

    @property
    def answer_phase(self) -> PhaseSummary | None:
        """The phase that gave the answer; None without an answer."""
        return next((phase for phase in self.phases if phase.phase == self.answer.phase), None)

    @property
    def own_warnings(self) -> list[str]:
        """Warnings of the campaign itself, without those of its phases."""
        shown = {f"{phase.phase}: {warning}" for phase in self.phases for warning in phase.warnings}
        return [warning for warning in self.warnings if warning not in shown]


def to_json(item: Any) -> Any:
    """Converts dataclasses to dicts, with fields in order, and tuples to lists."""
    if is_dataclass(item):
        return {name: to_json(value) for name, value in vars(item).items()}
    if isinstance(item, list | tuple):
        return [to_json(part) for part in item]
    if isinstance(item, dict):
        return {name: to_json(value) for name, value in item.items()}
    return item


def fitting_number(value: Any, kind: str) -> Any:
    """Returns a number as a column of this kind holds it, int64 or float64; None if it does not fit."""
    if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:
        return None
    if kind == "int64":
        return int(value) if value == int(value) and abs(value) < 2**63 else None
    return value


def arrow_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Any:  # a pyarrow.Table
    """Returns rows as an Arrow table; `columns` maps each name to the name of its type."""
    import pyarrow

    strings = pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema([(name, strings if kind == "list<string>" else kind) for name, kind in columns.items()])
    return pyarrow.Table.from_pylist(list(rows), schema=schema)
