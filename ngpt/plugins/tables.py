"""The tables of choices that plug-ins add to, and what an entry of each must be like."""

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from ngpt.code.plugins import Table
from ngpt.config.base import ConfigError, printable

WORD = r"[A-Za-z]\w*"  # of one that becomes the key of a file or the column of a table
OWN = ("ngpt", "tune", "run_campaign")  # the packages whose functions a plug-in must not exchange


class PluginError(ConfigError):
    """A plug-in cannot be used; the message is one line that names it."""


# What a single run uses. tune/spec/plugins.py has the tables that campaigns use besides.
TABLES = (
    Table(
        "residual rule",
        "ngpt.model.residual",
        "RESIDUAL_RULES",
        ("x", "f", "alpha", "norm"),
        reserved=("ngpt.model.residual", "RESIDUAL_ALIASES"),
    ),
    Table("norm mode", "ngpt.model.norm", "NORM_MODES", ("r", "dot", "decay")),
    Table("optimizer", "ngpt.optim.optimizers", "OPTIMIZERS", ("model", "cfg")),
    Table("width rule", "ngpt.optim.optimizers", "WIDTH_RULES", ("kind", "ratio")),
    Table("schedule", "ngpt.optim.schedule", "SCHEDULES", ("progress", "cfg")),
    Table("corpus", "ngpt.data.sources", "CORPORA", ("path", "shards")),
    Table(
        "metric",
        "ngpt.training.evaluation",
        "METRICS",
        ("model", "eval_set"),
        wrapped=("EvalMetric", "compute"),
        pattern=WORD,
        reserved=("ngpt.training.evaluation", "BUILT_IN_METRICS"),
    ),
)


def check_entry(table: Table, key: Any, value: Any) -> None:
    """Raises PluginError if an entry that was added to a table does not fit it; the message names the entry only."""
    where = f"{table.name}[{printable(repr(key))}]"
    if not isinstance(key, str) or not re.fullmatch(table.pattern, key):
        signs = "letters, digits and _" if table.pattern == WORD else "letters, digits and any of _ . -"
        raise PluginError(f"{where}: the name of a {table.what} starts with a letter, and has only {signs}")
    if table.reserved and key in getattr(importlib.import_module(table.reserved[0]), table.reserved[1]):
        raise PluginError(f"{where}: the name {key} means something else already; choose another")
    call = f"({', '.join(table.arguments)})"
    needed = f"a {table.what} is a function {call}"
    if table.wrapped:
        kind, field = table.wrapped
        needed = f"a {table.what} is an object of {kind} with a function {call}"
        if type(value).__name__ != kind:
            raise PluginError(f"{where} is {_described(value)}; {needed}")
        value = getattr(value, field)
    if inspect.isclass(value) or not callable(value):
        raise PluginError(f"{where} is {_described(value)}; {needed}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of a function in C that does not say it
        return
    try:
        signature.bind(*table.arguments)
    except TypeError:
        raise PluginError(f"{where} is a function {signature}; it is called with {call}") from None


def _described(value: Any) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    return f"a function {inspect.signature(value)}" if inspect.isfunction(value) else printable(repr(value), 80)


def place_of(table: Table, value: Any) -> str:
    """File and line of the function of an entry."""
    function = getattr(value, table.wrapped[1], value) if table.wrapped else value
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    if code is None:
        return table.module
    path, root = Path(code.co_filename), Path(__file__).parents[2]
    name = path.relative_to(root).as_posix() if path.is_relative_to(root / "ngpt") else path.name
    return f"{name}:{code.co_firstlineno}"


def watch_functions() -> Callable[[], list[str]]:
    """Notes the functions and classes of our packages; returns a function that puts back, and names, exchanged ones."""
    before = list(_functions())

    def put_back() -> list[str]:
        exchanged = [each for each in before if vars(each[0]).get(each[1]) is not each[2]]
        for owner, name, value in exchanged:
            setattr(owner, name, value)
        return [f"{_dotted(owner)}.{name}" for owner, name, _ in exchanged]

    return put_back


def _functions() -> Iterator[tuple[Any, str, object]]:
    """The module or class, the name and the value of each function and class."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in OWN:
            for name, value in _members(module):
                yield module, name, value
                if isinstance(value, type) and value.__module__ == module_name:
                    yield from ((value, each, function) for each, function in _members(value))


def _members(owner: object) -> list[tuple[str, object]]:
    return [(name, value) for name, value in vars(owner).items() if isinstance(value, FunctionType | type)]


def _dotted(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
