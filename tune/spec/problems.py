"""How a campaign file is read: a reader yields each problem that it finds, then returns its value.

    seeds = yield from read_seeds(raw, location)

Values and problems go up together, from the YAML nodes to `load_campaign`, and reading ends at `MOST_PROBLEMS`.
"""

from collections.abc import Generator, Iterable
from typing import TypeVar

from ngpt.config.base import Location, Problem
from ngpt.config.overrides import MOST_PROBLEMS
from ngpt.config.yaml_reader import Document

Value = TypeVar("Value")
Reading = Generator[Problem, None, Value]  # `Reading[None]` is a check

OPTION = "--set"  # the first word of a location on the command line


def collect(reading: Reading[Value]) -> tuple[Value | None, list[Problem]]:
    """Runs a reading and returns its value and problems; after MOST_PROBLEMS it stops, and the value is None."""
    problems: list[Problem] = []
    while len(problems) < MOST_PROBLEMS:
        try:
            problems.append(next(reading))
        except StopIteration as end:
            return end.value, problems
    return None, problems


def describe(problems: Iterable[Problem], document: Document) -> str:
    """A line per problem with path, line and column, in file order; problems with `--set` options come last."""
    problems = list(problems)
    options = [problem for problem in problems if _is_option(problem.location)]
    in_file = [problem for problem in problems if not _is_option(problem.location)]
    in_file.sort(key=lambda problem: document.position(problem.location))
    lines = [*map(document.describe, in_file), *map(Problem.line, options)]
    if len(problems) >= MOST_PROBLEMS:
        lines.append(f"{document.path}: these are the first {MOST_PROBLEMS} problems, the rest was not looked at")
    return "\n".join(dict.fromkeys(lines))


def _is_option(location: Location) -> bool:
    return bool(location) and str(location[0]).startswith(OPTION)
