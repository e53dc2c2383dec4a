"""Results as types, with the fields of `trials.jsonl` and `summary.json` in the same order (see docs/results.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

Settings = Mapping[str, Any]  # values by dotted name


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
    reused_from: str | None = None  # the phase that trained it, if that is another one


@dataclass(frozen=True)
class Objective:
    """The metric that ranks the arms, and its goal: minimize or maximize."""

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
class Delta:
    """Arm minus baseline: unadjusted interval, raw and Holm-corrected two-sided p; only the mean under `no claim`."""

    mean: float
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class ArmSummary:
    """One arm of a phase: its averages over the finished trials, and its verdict against the baseline."""

    arm: str
    rank: int = 0
    overrides: Settings = field(default_factory=dict)  # relative to the phase's base
    n: int = 0  # finished seeds
    score: Spread = Spread()  # of the campaign's metric
    delta: Delta | None = None
    verdict: str = "incomplete"
    tied_with_winner: bool = False  # the unadjusted interval of arm minus winner contains 0
    val_bpb: float | None = None
    train_loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    trial_ids: tuple[str, ...] = ()
    val_loss: Spread = Spread()


@dataclass(frozen=True)
class PhaseNoise:
    """What the seeds of a phase say about chance, and the effect that 4 of 5 such phases would detect."""

    sd: float | None = None
    method: str | None = None  # paired | pooled
    correlation: float | None = None  # between arms, over seeds
    df: float | None = None
    smallest_detectable: float | None = None


@dataclass(frozen=True)
class TrialCounts:
    """Number of trials by how they ended."""

    total: int = 0
    finished: int = 0
    diverged: int = 0
    failed: int = 0
    stopped: int = 0
    reused: int = 0  # trained by an earlier phase


@dataclass(frozen=True)
class PhaseSummary:
    """One phase: its arms, ranked and judged."""

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
    why: str = ""
    noise: PhaseNoise = PhaseNoise()
    warnings: tuple[str, ...] = ()
    trials: TrialCounts = TrialCounts()
    tokens: int = 0
    seconds: float = 0.0

    @property
    def winning_arm(self) -> ArmSummary | None:
        """The arm that won the phase; None while it has no winner."""
        return next((arm for arm in self.arms if arm.arm == self.winner), None)

    @property
    def ties(self) -> list[str]:
        """The arms that cannot be distinguished from the winner."""
        return [arm.arm for arm in self.arms if arm.tied_with_winner and arm.arm != self.winner]


@dataclass(frozen=True)
class Answer:
    """What to use, how much better it is, and whether fresh seeds confirm it."""

    sentence: str = "There is no answer yet."
    phase: str | None = None
    winner: str | None = None
    overrides: Settings = field(default_factory=dict)  # relative to the campaign's base
    delta: Delta | None = None
    confirmed: bool = False


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
    """What a campaign used of the machine."""

    slots: int = 0
    device_hours: float | None = None
    step_seconds: float | None = None  # inside training steps
    efficiency: float | None = None  # step_seconds over wall time times slots
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


@dataclass(frozen=True)
class ClaimResult:
    """A claim of an earlier report, judged by the trials of a campaign."""

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


@dataclass(frozen=True)
class CampaignSummary:
    """A whole campaign: the answer, its phases, and where the numbers come from."""

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
    packing: Mapping[str, Any] | None = None  # how many trials shared a GPU, where that was measured
    started_at: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    base: Settings = field(default_factory=dict)
    command: str = ""
    phases: tuple[PhaseSummary, ...] = ()
    claims: tuple[ClaimResult, ...] = ()
    problems: tuple[TrialProblem, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)  # trials by phase, where a budget stopped the campaign
    warnings: tuple[str, ...] = ()

    @property
    def answer_phase(self) -> PhaseSummary | None:
        """The phase that the answer was read from."""
        return next((phase for phase in self.phases if phase.phase == self.answer.phase), None)

    @property
    def own_warnings(self) -> list[str]:
        """The warnings that no phase shows already."""
        shown = {f"{phase.phase}: {warning}" for phase in self.phases for warning in phase.warnings}
        return [warning for warning in self.warnings if warning not in shown]


def to_json(item: Any) -> Any:
    """Returns dicts and lists in place of dataclasses and tuples, fields in order."""
    if is_dataclass(item):
        return {name: to_json(value) for name, value in vars(item).items()}
    if isinstance(item, list | tuple):
        return [to_json(part) for part in item]
    return item
