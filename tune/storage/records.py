"""Value types for trials and arms that several packages share."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial ended. `value` is its metric, or None if the metric was not measured."""

    status: Literal["finished", "diverged", "failed", "stopped", "missing"]
    value: float | None = None


Decision = Literal[
    "better", "worse", "equivalent", "dropped", "futile", "undecided", "diverged", "failed", "incomplete"
]


@dataclass(frozen=True)
class ArmLook:
    """An arm at a look (tune/analysis/sequential.py). Without a comparison only `n`, `decision` and `why` are set."""

    arm: str
    n: int  # seeds
    delta: float | None = None  # arm minus baseline
    ci_low: float | None = None  # repeated confidence interval
    ci_high: float | None = None
    p: float | None = None  # two-sided, of this look alone
    p_corrected: float | None = None  # over looks and arms; to be compared with 1 - confidence
    decision: Decision | None = None  # None: the arm is open
    why: str = ""


@dataclass(frozen=True)
class Look:
    """What a round of seeds showed about each arm that was open or ran along, and what was decided."""

    number: int  # from 1
    seeds: int
    level: float  # two-sided nominal level of one comparison; 1 minus the confidence of the intervals
    leader: str  # the arm with the best mean so far, which may be the baseline
    arms: tuple[ArmLook, ...]  # without the baseline
    runs_on: tuple[str, ...] = ()  # arms that get more seeds: the open ones, the baseline, and a leader that is better

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Look":
        """The look that a `phase_planned` event describes."""
        arms = tuple(ArmLook(**arm) for arm in data["arms"])
        return cls(**{**data, "arms": arms, "runs_on": tuple(data["runs_on"])})


@dataclass(frozen=True)
class BetterArm:
    """An arm with the verdict `better`; `gain` is its improvement over the baseline, in units of the metric."""

    arm: str
    overrides: Mapping[str, Any]  # relative to its phase's base
    gain: float

    def without(self, settings: Collection[str]) -> "BetterArm":
        """A copy of the arm without overrides of `settings`."""
        return replace(self, overrides={name: v for name, v in self.overrides.items() if name not in settings})


@dataclass(frozen=True)
class SearchRecord:
    """What the journal says of a search: its question, and the arms that were proposed, in order.

    Journals of older versions say neither `question` nor `optuna`; `proposed` then lacks arms that equal an earlier one
    or the baseline.
    """

    proposed: Sequence[Mapping[str, Any]]  # overrides of each arm
    question: Mapping[str, Any] | None = None  # see `Search.question`; None: not recorded
    optuna: str | None = None  # its version


@dataclass(frozen=True)
class FreshDraw:
    """The seeds drawn for a phase with `seeds: fresh`, and which confirmation of its question it is."""

    content: str  # digest of what the phase trains
    seeds: tuple[int, ...]
    question: str | None = None  # None: the phase confirms no winner
    look: int = 0  # 1 for the first confirmation of the question; 0: none
    confidence: float | None = None  # at which this look is judged; None: the campaign's
    confirms: tuple[Mapping[str, Any], ...] = ()  # overrides of the winners that are confirmed
    recorded: bool = True  # whether the seeds are in the ledger
    prior: tuple[float, float] | None = None  # noise borrowed from earlier phases: df, variance of a difference


@dataclass(frozen=True)
class TrialWork:
    """Compute cost of one trial, including its evaluations."""

    shape: str  # trials with the same `step_time_key` (tune/planning/equal_time.py) train equally fast
    tokens: float  # training tokens, plus a third of the evaluation tokens
    flops: float
