"""Settings as people write them: sections, dotted names, bare last words, and sections kept in files of their own.

base:
  model: models/30.5M.yaml     # a section as a file of its settings
  alpha: 0.2                   # beats what the file says
  optim: {name: muon}
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngpt.config import Config, ConfigError, Location, Problem, resolve, section_type, settings, unknown
from ngpt.yamlfile import YamlError, read_yaml

Found = dict[str, tuple[Any, Location]]  # value and place of each setting by full dotted name


def named_settings(
    cls: type[Config], data: Any, at: Location = (), *, folder: Path = Path()
) -> tuple[Found, list[Problem]]:
    """The settings in a mapping as people write it: sections (`optim: {lr: 1}`), dotted names or bare leaves.

    A section may also be the path of a YAML file with its settings, relative to `folder`, that of the file that names
    it; what is written beside it beats the file. Returns the value and location of each setting, and a problem for each
    key that names no setting, is given twice, or is a section without a mapping. Values are not checked.
    """
    from_files: Found = {}
    found: Found = {}
    problems: list[Problem] = []
    if not isinstance(data, Mapping):
        return found, [Problem(at, f"must be a mapping of settings, got {data!r}")]
    sections = {name.rpartition(".")[0] for name in settings(cls)} - {""}
    for key, value in data.items():
        location = (*at, key)
        if key in sections and isinstance(value, str):
            part, wrong = _section_file(section_type(cls, key), folder / Path(value).expanduser(), location)
            from_files |= {f"{key}.{name}": entry for name, entry in part.items()}
            problems += wrong
            continue
        if key in sections:
            part, wrong = named_settings(section_type(cls, key), value, location, folder=folder)
            part = {f"{key}.{name}": entry for name, entry in part.items()}
            problems += wrong
        else:
            try:
                part = {resolve(cls, key): (value, location)}
            except ConfigError as error:
                near = difflib.get_close_matches(key, sections, n=1) if isinstance(value, Mapping) else []
                problems.append(Problem(location, unknown("section", key, near) if near else str(error)))
                continue
        problems += [Problem(entry[1], f"{name} is given twice") for name, entry in part.items() if name in found]
        found |= part
    return from_files | found, problems


def _section_file(cls: type[Config], path: Path, at: Location) -> tuple[Found, list[Problem]]:
    """The settings in a file, all located where the file is named; its own mistakes with their place in it."""
    try:
        document = read_yaml(path)
    except YamlError as error:
        return {}, [Problem(at, str(error))]
    found, wrong = named_settings(cls, document.data, folder=path.parent)
    return {name: (value, at) for name, (value, _) in found.items()}, [
        Problem(at, document.describe(problem)) for problem in wrong
    ]
