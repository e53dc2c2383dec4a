"""Readers of a campaign file: generators that yield each problem they find, then return the value they read.

    seeds = yield from read_seeds(raw, location)

Problems propagate through `yield from` up to `load_campaign`. Reading stops after `MAX_PROBLEMS`.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ngpt.config.base import QUOTES, ConfigError, Location, Problem, settings
from ngpt.config.overrides import MAX_PROBLEMS
from ngpt.config.yaml_reader import Document
from ngpt.model.residual import RESIDUAL_ALIASES
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.storage.names import MAX_SEED, NAME

Value = TypeVar("Value")
Reading = Generator[Problem, None, Value]  # `Reading[None]` only checks
LocatedSettings = Mapping[str, tuple[Any, Location]]  # by full dotted name: the value and its location

OPTION = "--set"  # a location that starts with it is a command line argument
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._=,:+-]{0,79}")


def collect(reading: Reading[Value]) -> tuple[Value | None, list[Problem]]:
    """Runs a reader and returns its value and problems; stops after MAX_PROBLEMS, and the value is then None."""
    problems: list[Problem] = []
    while len(problems) < MAX_PROBLEMS:
        try:
            problems.append(next(reading))
        except StopIteration as end:
            return end.value, problems
    return None, problems


def complete(reading: Reading[Value | None], document: Document) -> Value:
    """Runs a reader and returns its value.

    Raises:
        ConfigError: there are problems; the message has one line for each, with path, line and column, in file order,
            then those of `--set` options.
    """
    value, problems = collect(reading)
    if not problems and value is not None:
        return value
    on_option = [problem for problem in problems if str(*problem.location[:1]).startswith(OPTION)]
    in_file = [problem for problem in problems if problem not in on_option]
    in_file.sort(key=lambda problem: document.position(problem.location))
    lines = [*map(document.describe, in_file), *map(Problem.line, on_option)]
    if len(lines) >= MAX_PROBLEMS:
        lines.append(f"{document.path}: only the first {MAX_PROBLEMS} problems are listed; the rest was not checked")
    raise ConfigError("\n".join(dict.fromkeys(lines)))


def check_name(name: Any, at: Location, what: str) -> Reading[bool]:
    """Checks the name of a campaign, phase, claim or arm; arm names may be longer and have more characters."""
    pattern, longest, also = (ARM_NAME, 80, " ' ', '=', ',', ':', '+',") if what == "arm" else (NAME, 64, "")
    article = "an" if what == "arm" else "a"
    if isinstance(name, str) and pattern.fullmatch(name) and ".." not in name:
        return True
    if isinstance(name, bool | int | float):
        yield Problem(at, f"{fmt.value(name)} cannot be the name of {article} {what}: {QUOTES}")
        return False
    shown = repr(fmt.shorten(name, 40)) if isinstance(name, str) else repr(name)
    rule = f"1 to {longest} letters, digits,{also} '.', '_' and '-', the first a letter or digit, and no '..'"
    yield Problem(at, f"{shown} cannot be the name of {article} {what}: use {rule}")
    return False


def read_seeds(data: Any, at: Location) -> Reading[tuple[int, ...]]:
    """Reads a list of seeds; returns an empty tuple if any seed is invalid."""
    if not isinstance(data, list):
        hint = "; fresh seeds are those of a phase" if isinstance(data, str) and data.startswith("fresh") else ""
        yield Problem(at, f"expected a list of seeds such as [1, 2, 3], got {data!r}{hint}")
        return ()
    if not data:
        yield Problem(at, "the list of seeds is empty")
    seen: set[int] = set()
    for i, seed in enumerate(data):
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            yield Problem((*at, i), f"a seed is a whole number from 0 to {MAX_SEED}, got {seed!r}")
        elif seed in seen:
            yield Problem((*at, i), f"seed {seed} is listed twice")
        else:
            seen.add(seed)
    return tuple(data) if len(seen) == len(data) else ()


def repeated(values: Sequence[Any]) -> Iterator[int]:
    """The indices of values that occurred before."""
    seen = set()
    for i, value in enumerate(values):
        if (key := comparable(value)) in seen:
            yield i
        seen.add(key)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Drops values equal to an earlier one."""
    first: dict[Any, Any] = {}
    for value in values:
        first.setdefault(comparable(value), value)
    return list(first.values())


def comparable(value: Any) -> Any:
    """A hashable key for comparing values: 1 equals 1.0 but not true, and a list equals a tuple of the same items."""
    if isinstance(value, list | tuple):
        return tuple(map(comparable, value))
    if isinstance(value, str):
        return RESIDUAL_ALIASES.get(value, value)  # unambiguous: no other setting has such a value
    return repr(value) if isinstance(value, bool | dict) else value


def short(setting: str) -> str:
    """The last part of a setting's name if it is unique, otherwise the full name."""
    leaf = setting.rpartition(".")[2]
    return leaf if sum(full.rpartition(".")[2] == leaf for full in settings(TrainConfig)) == 1 else setting
