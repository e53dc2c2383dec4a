"""Value types for trials and arms that several packages share."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial ended. `value` is its metric, or None if the metric was not measured."""

    status: Literal["finished", "diverged", "failed", "stopped", "missing"]
    value: float | None = None


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
