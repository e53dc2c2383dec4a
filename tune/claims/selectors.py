"""Selects the arms of a claim by phase, name and settings."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tune import format as fmt
from tune.spec.reading import comparable, short
from tune.spec.sweeps import BASELINE

NAME_KEYS = ("arm", "phase")  # the keys of a selector that are not settings

Selector = Mapping[str, Any]


@dataclass(frozen=True)
class ClaimArm:
    """An arm of a phase with all its settings and its trial ids by seed."""

    phase: str
    name: str
    is_baseline: bool
    overrides: Mapping[str, Any]  # relative to the phase's base
    settings: Mapping[str, Any]  # complete, by dotted name
    trial_ids: Mapping[int, str]


def matches(selector: Selector, arm: ClaimArm) -> bool:
    """Whether the arm has the phase, name and settings of the selector; `baseline` matches any baseline."""
    names = (arm.name, BASELINE.name) if arm.is_baseline else (arm.name,)
    if selector.get("phase", arm.phase) != arm.phase or selector.get("arm", arm.name) not in names:
        return False
    wanted = {name: value for name, value in selector.items() if name not in NAME_KEYS}
    return all(name in arm.settings and same(arm.settings[name], value) for name, value in wanted.items())


def same(a: Any, b: Any) -> bool:
    """Whether two values of a setting are equal, as in `comparable`."""
    return comparable(a) == comparable(b)


def varied(arms: Iterable[ClaimArm]) -> set[str]:
    """The settings in which the arms of a phase may differ."""
    return {name for arm in arms for name in arm.overrides}


def describe(selector: Selector | None) -> str:
    """A selector as text, such as `alpha=0.28` or `the arm winner of phase confirm`."""
    given = dict(selector or {})
    arm, phase = given.pop("arm", None), given.pop("phase", None)
    parts = [f"the arm {arm}"] if arm else []
    parts += [fmt.settings({short(name): value for name, value in given.items()})] if given else []
    return (" with ".join(parts) or "any arm") + (f" of phase {phase}" if phase else "")
