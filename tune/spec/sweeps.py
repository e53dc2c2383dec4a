"""From what varies to the arms of a phase: one variable at a time, every combination, or side by side.

A way of sweeping is a function (axes) -> arms and one entry in `SWEEPS`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ngpt.config.base import Location
from tune import format as fmt


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes. `label` is the name as the campaign's author wrote it."""

    label: str
    setting: str
    values: tuple[Any, ...]
    location: Location

    @cached_property
    def names(self) -> list[str]:
        """`label=value` for each value; all digits of those that a short form could not tell apart."""
        short = [fmt.value(value) for value in self.values]
        seen = Counter(short)
        texts = (repr(value) if seen[text] > 1 else text for value, text in zip(self.values, short, strict=True))
        return [f"{self.label}={text}" for text in texts]


@dataclass(frozen=True)
class ArmSpec:
    """One setting of what varies. `overrides` are relative to the phase's base."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    inherit: str | None = None  # the phase whose winner this arm starts from
    origins: Mapping[str, Location] = field(default_factory=dict, compare=False)  # of each override in the YAML


BASELINE = ArmSpec("baseline")


def vary(axes: Sequence[Axis]) -> list[ArmSpec]:
    """One variable at a time: an arm per value of each axis."""
    return [_arm([(axis, i)]) for axis in axes for i in range(len(axis.values))]


def grid(axes: Sequence[Axis]) -> list[ArmSpec]:
    """Every combination of the values of all axes."""
    return [_arm(list(zip(axes, point, strict=True))) for point in itertools.product(*_indices(axes))]


def side_by_side(axes: Sequence[Axis]) -> list[ArmSpec]:
    """The first values of all axes together, then the second ones, and so on."""
    return [_arm(list(zip(axes, point, strict=True))) for point in zip(*_indices(axes), strict=True)]


SWEEPS: dict[str, Callable[[Sequence[Axis]], list[ArmSpec]]] = {"vary": vary, "grid": grid, "zip": side_by_side}


def count(kind: str, axes: Sequence[Axis]) -> int:
    """How many arms a sweep gives; those of a grid, which may be any number, are not made for it."""
    return math.prod(len(axis.values) for axis in axes) if kind == "grid" else len(SWEEPS[kind](axes))


def _indices(axes: Sequence[Axis]) -> list[range]:
    return [range(len(axis.values)) for axis in axes]


def _arm(point: Sequence[tuple[Axis, int]]) -> ArmSpec:
    return ArmSpec(
        name=", ".join(axis.names[i] for axis, i in point),
        overrides={axis.setting: axis.values[i] for axis, i in point},
        origins={axis.setting: (*axis.location, i) for axis, i in point},
    )
