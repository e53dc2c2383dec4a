"""`search: {method: random | optuna, trials: N, space: {...}}`: arms that are drawn instead of listed.

    space: {optim.lr: {log: [1e-4, 1e-2]}, alpha: {uniform: [0.05, 0.5]}, n_layer: {choice: [4, 6]}}

Random arms are a pure function of the space and the seed: the random number behind each value is seeded by the search's
seed, the setting's name and the arm's index, so neither the order of the settings nor a larger `trials` changes an arm.
Values are rounded to four digits, as in the arm's name. tune/planning/optuna_search.py runs the Optuna search.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ngpt.config.base import Location, Problem, settings, unknown_message
from ngpt.training.config import TrainConfig
from tune.spec.reading import LocatedSettings, Reading, collect, repeated
from tune.spec.sweeps import ArmSpec, Axis

METHODS = ("random", "optuna")
KEYS = ("method", "trials", "space", "seed", "parallel", "confirm")
PARALLEL = 4  # default number of arms per batch that optuna proposes
DIGITS = 4  # significant digits of a value drawn from an interval
MAX_NUMBER = 2**31 - 1  # largest `trials`, `seed` and `parallel`
MAX_BOUND = 1e300  # magnitude of an interval's ends

SettingsReader = Callable[[Any, Location], Reading[LocatedSettings]]


@dataclass(frozen=True)
class Dimension:
    """A setting with the distribution of its values: a `log` or `uniform` interval, or a `choice`."""

    label: str
    setting: str
    kind: str
    values: tuple[Any, ...]  # low and high, or the choices
    location: Location

    @property
    def is_whole(self) -> bool:
        kinds = str(settings(TrainConfig)[self.setting].annotation)
        return "int" in kinds and "float" not in kinds

    def contains(self, value: Any) -> bool:
        """Whether a search may draw this value."""
        if self.kind == "choice":
            return value in self.values
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.values[0] <= value <= self.values[1]

    def at(self, share: float) -> Any:
        """The value at quantile `share` in [0, 1)."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        if self.is_whole and self.kind == "uniform":
            return low + int(share * (high - low + 1))
        if self.is_whole:  # as in optuna: makes the ends as likely as their neighbors
            low, high = low - 0.5, high + 0.5
        exact = low * (high / low) ** share if self.kind == "log" else low + share * (high - low)
        return self.rounded(exact)

    def rounded(self, exact: Any) -> Any:
        """Rounds a drawn value to an integer or to DIGITS digits and clips it to the interval."""
        if self.kind == "choice":
            return exact
        low, high = self.values
        value = round(exact) if self.is_whole else float(f"{exact:.{DIGITS}g}")
        return min(max(value, low), high)


@dataclass(frozen=True)
class Search:
    """The validated `search:` section of a phase."""

    method: str
    trials: int  # number of arms
    seed: int
    parallel: int  # arms per batch
    space: tuple[Dimension, ...]  # sorted by setting name

    @property
    def question(self) -> dict[str, Any]:
        """What the search asks, as in the journal. A larger `trials` or another `parallel` asks the same."""
        kinds = {d.setting: {"kind": d.kind, "values": list(d.values), "whole": d.is_whole} for d in self.space}
        return json.loads(json.dumps({"method": self.method, "seed": self.seed, "space": kinds}))

    def values_of(self, overrides: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The values of an arm in the order of `space`, the inverse of `arm`; None if they lie outside the space."""
        values = tuple(_frozen(overrides.get(d.setting)) for d in self.space)
        is_inside = all(d.contains(value) for d, value in zip(self.space, values, strict=True))
        return values if is_inside and len(overrides) == len(self.space) else None

    def arm(self, values: Sequence[Any]) -> ArmSpec:
        """The arm with the given values, one per dimension in the order of `space`."""
        chosen = list(zip(self.space, values, strict=True))
        names = (Axis(d.label, d.setting, (value,), d.location).names[0] for d, value in chosen)
        overrides = {d.setting: value for d, value in chosen}
        return ArmSpec(", ".join(names), overrides, origins={d.setting: d.location for d in self.space})

    def probes(self) -> Iterator[ArmSpec]:
        """One arm per interval end and per choice; if these configs are valid, so is every drawn arm."""
        for d in self.space:
            for i, value in enumerate(d.values):
                yield ArmSpec(f"{d.label}={value}", {d.setting: value}, origins={d.setting: (*d.location, d.kind, i)})


def random_arms(search: Search) -> list[ArmSpec]:
    """Draws `search.trials` distinct arms; returns fewer if a small space does not yield them in 100 draws per arm."""
    arms: dict[str, ArmSpec] = {}
    for i in range(100 * search.trials):
        shares = [random.Random(f"{search.seed}/{d.setting}/{i}").random() for d in search.space]
        arm = search.arm([d.at(share) for d, share in zip(search.space, shares, strict=True)])
        arms.setdefault(arm.name, arm)
        if len(arms) == search.trials:
            break
    return list(arms.values())


def read_search(data: Any, at: Location, read_settings: SettingsReader) -> Reading[Search | None]:
    """Reads a `search:` section; returns None if there is any problem."""
    search, wrong = collect(_read_search(data, at, read_settings))
    yield from wrong
    return None if wrong else search


def _read_search(data: Any, at: Location, read_settings: SettingsReader) -> Reading[Search | None]:
    if not isinstance(data, dict):
        yield Problem(at, f"expected a mapping with {', '.join(KEYS)}, got {data!r}")
        return None
    numbers = yield from _read_numbers(data, at)
    if not isinstance(data.get("space"), dict) or not data["space"]:
        yield Problem((*at, "space"), "nothing varies: give `space:` with at least one setting")
        return None
    entries = yield from read_settings(data["space"], (*at, "space"))
    space: list[Dimension] = []
    for name in sorted(entries):
        dimension = yield from _read_dimension(name, *entries[name])
        space += [dimension] if dimension else []
    return Search(data.get("method", "random"), **numbers, space=tuple(space))


def _read_numbers(data: dict[str, Any], at: Location) -> Reading[dict[str, int]]:
    """The integer settings of a search; also checks the method and the names of all keys."""
    for key in data:
        if key not in KEYS:
            yield Problem((*at, key), unknown_message("setting", key, KEYS))
    method = data.get("method", "random")
    if method not in METHODS:
        yield Problem((*at, "method"), unknown_message("method", method, METHODS))
    numbers = {"trials": data.get("trials"), "seed": data.get("seed", 0), "parallel": data.get("parallel", PARALLEL)}
    for name, value in numbers.items():
        lowest = 0 if name == "seed" else 1
        if type(value) is not int or not lowest <= value <= MAX_NUMBER:
            where = (*at, name) if name in data else at
            yield Problem(where, f"`{name}:` is a whole number from {lowest} to {MAX_NUMBER:,}, got {value!r}")
    return numbers


def _read_dimension(setting: str, data: Any, at: Location) -> Reading[Dimension | None]:
    kind = next(iter(data)) if isinstance(data, dict) and len(data) == 1 else None
    values = data[kind] if kind is not None else None
    if kind not in ("uniform", "log", "choice") or not isinstance(values, list):
        kinds = "{uniform: [LOW, HIGH]}, {log: [LOW, HIGH]} or {choice: [A, B, ...]}"
        yield Problem(at, f"expected {kinds}, got {data!r}")
        return None
    where = (*at, kind)
    dimension = Dimension(str(at[-1]), setting, kind, tuple(map(_frozen, values)), at)
    if kind == "choice":
        if not values:
            yield Problem(where, "the list of values is empty")
        for i, value in enumerate(values):
            if isinstance(value, dict):
                yield Problem((*where, i), f"a choice cannot be a mapping, got {value!r}")
        for i in repeated(values):
            yield Problem((*where, i), f"{values[i]!r} is listed twice")
    elif problem := _interval_problem(dimension):
        yield Problem(where, problem)
    return dimension


def _frozen(value: Any) -> Any:
    """Converts lists to tuples, so that a search is hashable."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _interval_problem(dimension: Dimension) -> str | None:
    values = dimension.values
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return f"an interval is two numbers, the low and the high end, got {list(values)!r}"
    low, high = values
    if not (-MAX_BOUND <= low < high <= MAX_BOUND):
        return f"the low end must be below the high end, got [{low!r}, {high!r}]"
    if dimension.is_whole and (type(low) is not int or type(high) is not int):
        return f"{dimension.setting} takes whole numbers, got [{low!r}, {high!r}]"
    if dimension.kind == "log" and low <= 0:
        return f"a logarithmic interval must lie above 0, got [{low!r}, {high!r}]"
    return None
