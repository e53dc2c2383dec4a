"""Reads settings written as sections, dotted names, unique last parts, or sections in separate files.

base:
  model: models/30.5M.yaml     # a section in its own file
  alpha: 0.2                   # overrides the file
  optim: {name: muon}
"""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ngpt.config.base import (
    Config,
    ConfigError,
    Location,
    Problem,
    dotted_name,
    printable,
    resolve,
    sections,
    unknown_message,
)
from ngpt.config.yaml_reader import Document, YamlError, read_yaml

MAX_PROBLEMS = 100  # reported at once
SUFFIXES = (".yaml", ".yml")  # of section files; no other file is opened, so an error message cannot quote one

Found = dict[str, tuple[Any, Location]]  # value and location of each setting by full dotted name


def named_settings(
    cls: type[Config], data: Any, at: Location = (), *, folder: Path = Path()
) -> tuple[Found, list[Problem]]:
    """Reads a mapping whose keys are sections (`optim: {lr: 1}`), dotted names or unique last parts.

    A section may also be the path of a YAML file, relative to `folder`; settings next to it override the file. Returns
    the settings, and a problem for each key that is unknown, given twice, or a section without a mapping. Stops after
    `MAX_PROBLEMS`. Values are not checked.
    """
    from_files: Found = {}
    found: Found = {}  # outside files
    problems: list[Problem] = []
    if not isinstance(data, Mapping):
        return found, [Problem(at, f"must be a mapping of settings, got {data!r}")]
    subconfigs = sections(cls)
    for key, value in data.items():
        if len(problems) >= MAX_PROBLEMS:
            break
        location = (*at, key)
        added: Found = {}
        wrong: list[Problem] = []
        if key not in subconfigs:
            try:
                added = {resolve(cls, key): (value, location)}
            except ConfigError as error:
                near = difflib.get_close_matches(key, subconfigs, n=1) if isinstance(value, Mapping) else []
                wrong = [Problem(location, unknown_message("section", key, near) if near else str(error))]
        elif not isinstance(value, str):
            inner, wrong = named_settings(subconfigs[key], value, location, folder=folder)
            added = {f"{key}.{name}": entry for name, entry in inner.items()}
        elif value.endswith(SUFFIXES):
            # Not Path.expanduser, which raises for a user that does not exist.
            inner, wrong = _section_file(subconfigs[key], folder / os.path.expanduser(value), location)
            from_files |= {f"{key}.{name}": entry for name, entry in inner.items()}
        else:
            message = f"must be a mapping of settings or the path of a .yaml file, got {value!r}"
            wrong = [Problem(location, message)]
        problems += wrong
        problems += [Problem(entry[1], f"{name} is given twice") for name, entry in added.items() if name in found]
        found |= added
    return from_files | found, problems


def located(problem: Problem, given: Found) -> Problem:
    """Moves a problem at `optim.betas[0]` to where the file sets `betas`, with or without the prefix `optim`."""
    location = problem.location
    for end in range(len(location), 0, -1):
        name = dotted_name(location[:end])
        if name in given:
            return Problem((*given[name][1], *location[end:]), problem.message)
    return problem


def _section_file(cls: type[Config], path: Path, at: Location) -> tuple[Found, list[Problem]]:
    """Reads a section file. All settings get the location of its path; problems name the line in the file."""
    try:
        document = _document(path, _file_state(path))
    except YamlError as error:
        return {}, [Problem(at, str(error))]
    found, wrong = named_settings(cls, document.data, folder=path.parent)
    problems = [Problem(at, document.describe(problem)) for problem in wrong]
    return {name: (value, at) for name, (value, _) in found.items()}, problems


def _file_state(path: Path) -> tuple[int, ...]:
    try:
        state = path.stat()
    except (OSError, ValueError):
        return ()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


@lru_cache(maxsize=64)
def _document(path: Path, state: tuple[int, ...]) -> Document:
    """Reads a file once for all arms that use it; a changed `state` misses the cache."""
    return read_yaml(path)


def as_assignments(overrides: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Returns overrides as the command line has them, `name=value`; the values of a mapping become YAML.

    Raises:
        ConfigError: a value has a type that no setting has.
    """
    if isinstance(overrides, str):
        return (overrides,)
    if not isinstance(overrides, Mapping):
        return tuple(map(str, overrides))
    return tuple(f"{name}={_as_yaml(name, value)}" for name, value in overrides.items())


def _as_yaml(name: str, value: Any) -> str:
    def convert(item: Any) -> Any:
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        if hasattr(item, "tolist"):  # a number or an array of NumPy
            return item.tolist()
        raise ConfigError(f"{name}: a setting cannot be a {type(item).__name__}, got {printable(repr(item))}")

    return json.dumps(value, ensure_ascii=False, default=convert)  # JSON is YAML
