"""Checks of complete configs: each problem is put where the value to blame was written."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, Problem, build, dotted, settings
from ngpt.config.overrides import MOST_PROBLEMS
from ngpt.config.yaml_reader import Document
from ngpt.data import dataset as corpora
from ngpt.data.sources import CORPORA
from ngpt.data.tokens.tokenizer import parse_spec, tokenizer_vocab_size
from ngpt.model.residual import RESIDUAL_ALIASES
from ngpt.training.config import TrainConfig, resolved

Given = Mapping[str, tuple[Any, Location]]  # values by full dotted name, and where each was written

OPTION = "--set"  # how a location begins that is not in the file


class TooManyProblems(Exception):
    """There is no point in looking for more of them."""


class Problems:
    """What is wrong with a file: collected, so that all of it is reported at once."""

    def __init__(self) -> None:
        self.all: list[Problem] = []
        self._blamed: set[Location] = set()

    def add(self, location: Location, message: str) -> None:
        """Collects a problem.

        Raises:
            TooManyProblems: that makes MOST_PROBLEMS.
        """
        self.all.append(Problem(location, message))
        if len(self.all) >= MOST_PROBLEMS:
            raise TooManyProblems

    def add_value(self, location: Location, message: str) -> None:
        """Adds a problem with a value, unless it has one: a value that spoils a hundred arms is one mistake."""
        if location not in self._blamed:
            self._blamed.add(location)
            self.add(location, message)

    def in_file_order(self, document: Document) -> str:
        """A line for each problem, with path, line and column; those of the command line come last."""
        options = [problem for problem in self.all if _is_option(problem.location)]
        in_file = [problem for problem in self.all if not _is_option(problem.location)]
        in_file.sort(key=lambda problem: document.position(problem.location))
        lines = [*map(document.describe, in_file), *map(Problem.line, options)]
        if len(self.all) >= MOST_PROBLEMS:
            lines.append(f"{document.path}: these are the first {MOST_PROBLEMS} problems, the rest was not looked at")
        return "\n".join(dict.fromkeys(lines))


class ConfigChecker:
    """Builds configs on top of one base; a corpus is looked up once."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._base: Given = {}
        self._looked_up: set[str] = set()

    def check_base(self, given: Given, options: Given) -> TrainConfig | None:
        """Sets the base, the file's `given` and the `options` that beat it; None if something is wrong with it."""
        self._base = {**given, **options}
        try:
            base = build(TrainConfig, _values(self._base))
        except ConfigError as error:
            base, culprit = None, _culprit(given, options)
            for problem in error.problems:
                name, rest = _split(problem.location)
                if name not in options:
                    name = culprit or name
                self._blame(self._base, name, rest, problem.message)
        return base if self._check_data(self._base, {}, "") else None

    def check(self, changes: Given, *, start: Given | None = None, note: str = "") -> None:
        """Checks the base with `start`, if any, and then `changes`; `note` is added to messages.

        What is possible without the changes, and impossible with them, is blamed on the changes; what is wrong with
        the base has been said when it was set.
        """
        given = {**self._base, **(start or {}), **changes}
        try:
            build(TrainConfig, _values(given))
        except ConfigError as error:
            culprit = _culprit(self._base, {**(start or {}), **changes})
            for problem in error.problems:
                name, rest = _split(problem.location)
                if name in changes:
                    self._blame(given, name, rest, problem.message + note)
                elif culprit:
                    self._blame(given, culprit, (), problem.message + note)
        self._check_data({**self._base, **(start or {})}, changes, note)

    def _blame(self, given: Given, name: str, rest: Location, message: str) -> None:
        """Files a problem with the value of a setting, or with the item of it that `rest` leads to."""
        value, location = given.get(name, (None, ("base",)))
        if len(rest) == 1 and isinstance(value, list) and rest[0] in range(len(value)):
            value, location = value[int(rest[0])], (*location, *rest)
        elif rest and message.startswith("field required"):
            message = message.replace("field required", f"value {int(rest[0]) + 1} is missing", 1)
        self._problems.add_value(location, message + _advice(message, value))

    def _check_data(self, base: Given, changes: Given, note: str) -> bool:
        """Whether corpus and tokenizer exist and fit the model; each combination is looked up once."""
        given = {name: entry for name, entry in {**base, **changes}.items() if name in DATA_SETTINGS}
        key = repr(sorted((name, value) for name, (value, _) in given.items()))
        if key in self._looked_up or not _possible(given):
            return True
        self._looked_up.add(key)
        config = build(TrainConfig, _values(given))
        for name, look_up in DATA_CHECKS.items():
            try:
                look_up(config)
            except (ConfigError, OSError) as error:  # OSError: a path that is too long, or that may not be read
                # Where it was written, or else the nearest setting that corpus and tokenizer depend on.
                written = [layer[key] for layer in (changes, base) for key in (name, *DATA_CHECKS) if key in layer]
                self._problems.add_value(written[0][1] if written else ("base",), f"{error}{note}")
                return False
        return True


def _vocab_size(config: TrainConfig) -> int:
    if not config.data.corpus.strip():  # as a path it would be the working directory, all of it
        raise ConfigError(f"a corpus is a name, a file or a folder, got {config.data.corpus!r}")
    return corpora.vocab_size(config.data)


# What to look up, and the setting to blame if it is not there, in the order in which it makes sense.
DATA_CHECKS: dict[str, Callable[[TrainConfig], object]] = {
    "data.tokenizer": lambda config: tokenizer_vocab_size(config.data.tokenizer),
    "data.corpus": _vocab_size,
    "data.shards": lambda config: corpora.check_shards(config.data),
    "data.path": lambda config: corpora.fingerprint(config.data),
    "model.vocab_size": resolved,
}
DATA_SETTINGS = (*DATA_CHECKS, "data.val_fraction")


def with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the paths in them made absolute, since Ray changes the working directory of its workers.

    Names of corpora, kinds of tokenizers, and whatever is no path at all, stay as they are.
    """
    return {name: PATHS[name](value) if name in PATHS and value else value for name, value in values.items()}


def _corpus(value: Any) -> Any:
    """A name in CORPORA wins over a folder of that name; what is neither is a mistake that is reported as written."""
    if not isinstance(value, str) or value in CORPORA:
        return value
    return _absolute(value) if value.startswith("~") or os.path.exists(value) else value


def _tokenizer(value: Any) -> Any:
    try:
        kind, argument = parse_spec(value) if isinstance(value, str) else ("", "")
    except ConfigError:
        return value
    if kind == "model":
        return _absolute(argument)
    return f"gpt2:{_absolute(argument)}" if kind == "gpt2" and argument else value


def _absolute(value: Any) -> Any:
    # Not Path.expanduser, which raises for a user that does not exist.
    return str(Path(os.path.expanduser(value)).absolute()) if isinstance(value, str) else value


PATHS: dict[str, Callable[[Any], Any]] = {
    "data.corpus": _corpus,
    "data.path": _absolute,
    "data.tokenizer": _tokenizer,
}


def given_in(values: Mapping[str, Any], origins: Mapping[str, Location]) -> Given:
    """Values with their places of origin."""
    return {name: (value, origins.get(name, ())) for name, value in values.items()}


def written_alike(values: Sequence[Any]) -> Iterable[int]:
    """The indices of values that came before; 1 and 1.0 are the same number, 1 and true are not."""
    seen = set()
    for i, value in enumerate(values):
        if (key := _key(value)) in seen:
            yield i
        seen.add(key)


def _key(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, str):
        return RESIDUAL_ALIASES.get(value, value)  # two names for one residual rule; no other setting has either
    return repr(value) if isinstance(value, bool | dict) else value


def _values(given: Given) -> dict[str, Any]:
    return with_absolute_paths({name: value for name, (value, _) in given.items()})


def _culprit(base: Given, changes: Given) -> str | None:
    """The first of the changes that makes a config impossible which is possible without them."""
    given = dict(base)
    if not _possible(given):
        return None
    for name, entry in changes.items():
        given[name] = entry
        if not _possible(given):
            return name
    return None


def _possible(given: Given) -> bool:
    try:
        build(TrainConfig, _values(given))
    except ConfigError:
        return False
    return True


def _split(location: Location) -> tuple[str, Location]:
    """The setting of a location that `build` reports, and the place inside its value."""
    for end in range(len(location), 0, -1):
        if (name := dotted(location[:end])) in settings(TrainConfig):
            return name, location[end:]
    return dotted(location), ()


def _advice(message: str, value: Any) -> str:
    """What to write instead of `1e3`, where that is not obvious."""
    whole = message.startswith("input should be a valid integer") and isinstance(value, float) and value.is_integer()
    return f"; write {int(value)}" if whole else ""


def _is_option(location: Location) -> bool:
    return bool(location) and str(location[0]).startswith(OPTION)
