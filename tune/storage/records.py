"""What is known of trials and arms, as types: read and written here only."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial ended; `value` is the metric, None if it has none."""

    status: Literal["finished", "diverged", "failed", "stopped", "missing"]
    value: float | None = None


@dataclass(frozen=True)
class BetterArm:
    """An arm with the verdict `better`; `gain` is its positive difference to the baseline, in units of the metric."""

    arm: str
    overrides: Mapping[str, Any]  # relative to its phase's base
    gain: float

    def without(self, settings: Collection[str]) -> "BetterArm":
        """The same arm without overrides of `settings`."""
        return replace(self, overrides={name: v for name, v in self.overrides.items() if name not in settings})


@dataclass(frozen=True)
class TrialWork:
    """The cost of a trial, evaluations included."""

    shape: str  # trials with the same `step_time_key` (tune/planning/equal_time.py) train equally fast
    tokens: float  # training tokens; evaluation tokens count as the training tokens that take as long
    flops: float
