"""How a campaign file is read: a reader yields each problem that it finds, then returns its value.

    seeds = yield from read_seeds(raw, location)

Values and problems go up together, from the YAML nodes to `load_campaign`, and reading ends at `MOST_PROBLEMS`.
"""

from collections.abc import Generator, Iterable
from typing import TypeVar

from ngpt.config.base import Problem
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
    in_file: list[Problem] = []
    options: list[Problem] = []
    for problem in problems:
        is_option = problem.location and str(problem.location[0]).startswith(OPTION)
        (options if is_option else in_file).append(problem)
    in_file.sort(key=lambda problem: document.position(problem.location))
    lines = [*map(document.describe, in_file), *map(Problem.line, options)]
    if len(lines) >= MOST_PROBLEMS:
        lines.append(f"{document.path}: these are the first {MOST_PROBLEMS} problems, the rest was not checked")
    return "\n".join(dict.fromkeys(lines))
