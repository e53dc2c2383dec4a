"""What is known of trials and arms, as types: read and written here only."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class TrialOutcome:
    """What became of one trial; `value` is the metric, None where there is none."""

    status: Literal["finished", "diverged", "failed", "stopped", "missing"]
    value: float | None = None


@dataclass(frozen=True)
class BetterArm:
    """An arm that was better than its phase's baseline: by `gain` (positive), in units of the metric."""

    arm: str
    overrides: Mapping[str, Any]  # relative to its phase's base
    gain: float

    def without(self, settings: Collection[str]) -> "BetterArm":
        """The same arm, but for the settings that a phase decides for itself."""
        return replace(self, overrides={name: v for name, v in self.overrides.items() if name not in settings})


@dataclass(frozen=True)
class TrialWork:
    """What a trial takes, evaluations included, and the shape that says how fast that goes (tune/machine/throughput.py)."""

    shape: str
    tokens: float  # of training; those of evaluations as so many of these as take as long
    flops: float
