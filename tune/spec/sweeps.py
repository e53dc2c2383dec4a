"""Sweeps build the arms of a phase from its axes: one variable at a time, every combination, or zipped.

To add a sweep, write a function (axes) -> arms and add it to `SWEEPS`.
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
    """A setting and its values. `label` is the setting's name as shown in the names of arms."""

    label: str
    setting: str
    values: tuple[Any, ...]
    location: Location

    @cached_property
    def names(self) -> list[str]:
        """`label=value` for each value; values that look the same when rounded are written with all digits."""
        short = [fmt.value(value) for value in self.values]
        counts = Counter(short)
        texts = (repr(value) if counts[text] > 1 else text for value, text in zip(self.values, short, strict=True))
        return [f"{self.label}={text}" for text in texts]


@dataclass(frozen=True)
class ArmSpec:
    """An arm as defined in the file. `overrides` are relative to the phase's base."""

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    inherit: str | None = None  # the phase whose winner is the arm's base
    origins: Mapping[str, Location] = field(default_factory=dict, compare=False)  # where each override is written


BASELINE = ArmSpec("baseline")


def vary(axes: Sequence[Axis]) -> list[ArmSpec]:
    """One variable at a time: an arm per value of each axis."""
    return [_arm([point]) for points in _points(axes) for point in points]


def grid(axes: Sequence[Axis]) -> list[ArmSpec]:
    """Every combination of the values of all axes."""
    return [_arm(points) for points in itertools.product(*_points(axes))]


def side_by_side(axes: Sequence[Axis]) -> list[ArmSpec]:
    """Zips the axes: the first arm has the first value of every axis, the second arm the second values, and so on."""
    return [_arm(points) for points in zip(*_points(axes), strict=True)]


SWEEPS: dict[str, Callable[[Sequence[Axis]], list[ArmSpec]]] = {"vary": vary, "grid": grid, "zip": side_by_side}


def count(kind: str, axes: Sequence[Axis]) -> int:
    """The number of arms of a sweep. A grid is counted without building its arms, because it may be huge."""
    return math.prod(len(axis.values) for axis in axes) if kind == "grid" else len(SWEEPS[kind](axes))


def _points(axes: Sequence[Axis]) -> list[list[tuple[Axis, int]]]:
    return [[(axis, i) for i in range(len(axis.values))] for axis in axes]


def _arm(points: Sequence[tuple[Axis, int]]) -> ArmSpec:
    overrides = {axis.setting: axis.values[i] for axis, i in points}
    origins = {axis.setting: (*axis.location, i) for axis, i in points}
    return ArmSpec(", ".join(axis.names[i] for axis, i in points), overrides, origins=origins)
