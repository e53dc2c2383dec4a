"""Sweeps build the arms of a phase from its axes: one variable at a time, every combination, or zipped.

To add a sweep, write a function (axes) -> arms and add it to `SWEEPS`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ngpt.config.base import ConfigError, Location, printable
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
    sources: tuple[str, ...] = ()  # the phases that it takes settings from without `inherit`


BASELINE = ArmSpec("baseline")


def vary(axes: Sequence[Axis]) -> list[ArmSpec]:
    """One variable at a time: an arm per value of each axis."""
    return [make_arm([point]) for points in _points(axes) for point in points]


def grid(axes: Sequence[Axis]) -> list[ArmSpec]:
    """Every combination of the values of all axes."""
    return [make_arm(points) for points in itertools.product(*_points(axes))]


def side_by_side(axes: Sequence[Axis]) -> list[ArmSpec]:
    """Zips the axes: the first arm has the first value of every axis, the second arm the second values, and so on."""
    return [make_arm(points) for points in zip(*_points(axes), strict=True)]


SWEEPS: dict[str, Callable[[Sequence[Axis]], list[ArmSpec]]] = {"vary": vary, "grid": grid, "zip": side_by_side}


def count(kind: str, axes: Sequence[Axis]) -> int:
    """The number of arms of a sweep. A grid is counted without building its arms, because it may be huge."""
    return math.prod(len(axis.values) for axis in axes) if kind == "grid" else len(_call(kind, axes))


def build_arms(kind: str, axes: Sequence[Axis]) -> list[ArmSpec]:
    """The arms of a sweep, which a plug-in may have added.

    Raises:
        ConfigError: the function of the sweep fails, or does not return arms with names of their own that set the axes.
    """
    arms = _call(kind, axes)
    settings, places = {axis.setting for axis in axes}, {axis.setting: axis.location for axis in axes}
    for arm in arms:
        if not isinstance(arm, ArmSpec) or not arm.name:
            raise ConfigError(f"the sweep {kind} must return a list of ArmSpec with names, got {printable(repr(arm))}")
        if other := [name for name in arm.overrides if name not in settings]:
            raise ConfigError(f"the sweep {kind} sets {printable(other[0])}, which is none of its axes")
    by_name = {arm.name: arm.overrides for arm in arms}
    if twins := [arm.name for arm in arms if arm.overrides != by_name[arm.name]]:
        raise ConfigError(f"the sweep {kind} returns two arms with the name {printable(twins[0])}")
    return [arm if arm.origins else replace(arm, origins={n: places[n] for n in arm.overrides}) for arm in arms]


def _call(kind: str, axes: Sequence[Axis]) -> list[ArmSpec]:
    try:
        return list(SWEEPS[kind](axes))
    except Exception as error:  # a sweep may be the code of a plug-in
        raise ConfigError(f"the sweep {kind} fails: {type(error).__name__}: {printable(str(error))}") from error


def _points(axes: Sequence[Axis]) -> list[list[tuple[Axis, int]]]:
    return [[(axis, i) for i in range(len(axis.values))] for axis in axes]


def make_arm(points: Sequence[tuple[Axis, int]]) -> ArmSpec:
    """The arm that sets each of some axes to the value with this index; its name lists them."""
    overrides = {axis.setting: axis.values[i] for axis, i in points}
    origins = {axis.setting: (*axis.location, i) for axis, i in points}
    return ArmSpec(", ".join(axis.names[i] for axis, i in points), overrides, origins=origins)
