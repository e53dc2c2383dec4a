"""`search: {method: random | optuna, trials: N, space: {...}}`: arms that are drawn instead of listed.

    space: {optim.lr: {log: [1e-4, 1e-2]}, alpha: {uniform: [0.05, 0.5]}, n_layer: {choice: [4, 6]}}

Random arms are a pure function of the space and the seed. Each value has a random number of its own, drawn from the
seed, the setting's name and its position: so neither the order of the settings nor a larger `trials` changes an arm.
Values are rounded to four digits, which is what an arm's name shows. What optuna does is in tune/planning/optuna_search.py.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ngpt.config.base import ConfigError, Location, settings, unknown
from ngpt.training.config import TrainConfig
from tune.spec.sweeps import ArmSpec, Axis
from tune.spec.validation import Problems, written_alike

METHODS = ("random", "optuna")
KEYS = ("method", "trials", "space", "seed", "parallel")
PARALLEL = 4  # arms that optuna is asked for at once
DIGITS = 4
LARGEST = 1e300  # end of an interval


@dataclass(frozen=True)
class Dimension:
    """One setting and where its values are drawn from: an interval, `log` or `uniform`, or a `choice`."""

    label: str
    setting: str
    kind: str
    values: tuple[Any, ...]  # low and high, or what to choose from
    location: Location

    @property
    def is_whole(self) -> bool:
        """Whether the setting takes whole numbers, so that an interval is one of them."""
        kinds = str(settings(TrainConfig)[self.setting].annotation)
        return "int" in kinds and "float" not in kinds

    def at(self, share: float) -> Any:
        """The value that has the `share`, in [0, 1), of the space below it."""
        if self.kind == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        if self.is_whole and self.kind == "uniform":
            return low + int(share * (high - low + 1))
        if self.is_whole:  # both ends get all that is rounded to them, as the numbers between them do, and in optuna
            low, high = low - 0.5, high + 0.5
        exact = low * (high / low) ** share if self.kind == "log" else low + share * (high - low)
        return self.rounded(exact)

    def rounded(self, exact: Any) -> Any:
        """A drawn value as an arm has it: a few digits, and inside of the bounds."""
        if self.kind == "choice":
            return exact
        low, high = self.values
        value = round(exact) if self.is_whole else float(f"{exact:.{DIGITS}g}")
        return min(max(value, low), high)


@dataclass(frozen=True)
class Search:
    """What `search:` says, checked."""

    method: str
    trials: int  # arms
    seed: int
    parallel: int  # arms of a batch
    space: tuple[Dimension, ...]  # by name of the setting

    def arm(self, values: Sequence[Any]) -> ArmSpec:
        """The arm with these values, one for each dimension."""
        return ArmSpec(
            name=", ".join(
                Axis(d.label, d.setting, (v,), d.location).names[0] for d, v in zip(self.space, values, strict=True)
            ),
            overrides={d.setting: v for d, v in zip(self.space, values, strict=True)},
            origins={d.setting: d.location for d in self.space},
        )

    def probes(self) -> Iterator[ArmSpec]:
        """The ends of each interval and each choice, one at a time: what has to be possible for any draw to be."""
        for d in self.space:
            for i, value in enumerate(d.values):
                yield ArmSpec(f"{d.label}={value}", {d.setting: value}, origins={d.setting: (*d.location, d.kind, i)})


def random_arms(search: Search) -> list[ArmSpec]:
    """Distinct arms, `search.trials` of them, or as many as a small space has (after 100 draws for each)."""
    arms: dict[str, ArmSpec] = {}
    for i in range(100 * search.trials):
        shares = [random.Random(f"{search.seed}/{d.setting}/{i}").random() for d in search.space]
        arm = search.arm([d.at(share) for d, share in zip(search.space, shares, strict=True)])
        arms.setdefault(arm.name, arm)
        if len(arms) == search.trials:
            break
    return list(arms.values())


def read_search(
    problems: Problems,
    data: Any,
    at: Location,
    read_settings: Callable[[Any, Location], dict[str, tuple[Any, Location]]],
) -> Search | None:
    """The search in `data`; None, and problems, if anything is wrong with it."""
    before = len(problems.all)
    if not isinstance(data, dict):
        problems.add(at, f"expected a mapping with {', '.join(KEYS)}, got {data!r}")
        return None
    for key in data:
        if key not in KEYS:
            problems.add((*at, key), unknown("setting", key, KEYS))
    method = data.get("method", "random")
    if method not in METHODS:
        problems.add((*at, "method"), unknown("method", method, METHODS))
    numbers = {"trials": None, "seed": 0, "parallel": PARALLEL}
    for name, default in numbers.items():
        least, value = int(name != "seed"), data.get(name, default)
        if type(value) is not int or not least <= value < 2**31:
            where = (*at, name) if name in data else at
            problems.add(where, f"`{name}:` is a whole number from {least} on, got {value!r}")
        numbers[name] = value
    if not isinstance(data.get("space"), dict) or not data["space"]:
        problems.add((*at, "space"), "nothing varies: give `space:` with at least one setting")
        return None
    found = read_settings(data["space"], (*at, "space"))
    space = [_dimension(problems, name, *found[name]) for name in sorted(found)]
    if len(problems.all) > before:
        return None
    kept = tuple(dimension for dimension in space if dimension)
    return Search(method, numbers["trials"] or 0, numbers["seed"] or 0, numbers["parallel"] or 1, kept)


def _dimension(problems: Problems, setting: str, data: Any, at: Location) -> Dimension | None:
    kind = next(iter(data)) if isinstance(data, dict) and len(data) == 1 else None
    values = data[kind] if isinstance(data, dict) and kind is not None else None
    if kind not in ("uniform", "log", "choice") or not isinstance(values, list):
        kinds = "{uniform: [LOW, HIGH]}, {log: [LOW, HIGH]} or {choice: [A, B, ...]}"
        problems.add(at, f"expected {kinds}, got {data!r}")
        return None
    where = (*at, kind)
    dimension = Dimension(str(at[-1]), setting, kind, tuple(map(_frozen, values)), at)
    if kind == "choice":
        if not values:
            problems.add(where, "the list of values is empty")
        for i, value in enumerate(values):
            if isinstance(value, dict):
                problems.add((*where, i), f"a choice is between values, got {value!r}")
        for i in written_alike(values):
            problems.add((*where, i), f"{values[i]!r} is listed twice")
    elif wrong := _wrong_interval(dimension):
        problems.add(where, wrong)
    return dimension


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that a search can be a key."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _wrong_interval(dimension: Dimension) -> str | None:
    values = dimension.values
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return f"an interval is two numbers, the low and the high end, got {list(values)!r}"
    low, high = values
    if not (-LARGEST <= low < high <= LARGEST):
        return f"the low end must be below the high one, got [{low!r}, {high!r}]"
    if dimension.is_whole and (type(low) is not int or type(high) is not int):
        return f"{dimension.setting} takes whole numbers, got [{low!r}, {high!r}]"
    if dimension.kind == "log" and low <= 0:
        return f"a logarithmic interval lies above 0, got [{low!r}, {high!r}]"
    return None


ADVICE = "the package optuna is not installed: pip install 'ngpt-campaign[search]'"


def check_optuna() -> None:
    """Raises ConfigError, with the command that helps, where optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError(ADVICE) from None
