"""The experiments that ship with this program: their list, and copies of them that run anywhere."""

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tune
from ngpt.code.version import PROGRAM, SCRIPT, command
from ngpt.config.base import ConfigError, unknown_message
from ngpt.config.overrides import SUFFIXES
from tune.storage.names import NAME

FOLDER = "experiments"  # in a checkout; an installed package has it inside of `tune`
MODELS = "models"
SUFFIX = ".yaml"
SECTION = re.compile(rf"(?<![\w/.-])(?:{FOLDER}/)?({MODELS}/[\w.-]+?\{SUFFIX})\b")  # a file that an experiment names

NAMED = re.compile(r"^campaign: .+$", re.MULTILINE)


@dataclass(frozen=True)
class Shipped:
    """An experiment, or a model size for the section `model:` of one."""

    name: str  # quickstart, models/30.5M
    path: Path
    about: str  # one line

    @property
    def is_campaign(self) -> bool:
        """Whether it is a campaign, and not a section of one."""
        return not self.name.startswith(f"{MODELS}/")


def shipped() -> list[Shipped]:
    """All shipped experiments, then the model sizes, each with what it says about itself."""
    package = Path(tune.__path__[0])
    folder = next(path for path in (package / FOLDER, package.parent / FOLDER) if path.is_dir())
    files = [*sorted(folder.glob(f"*{SUFFIX}")), *sorted(folder.glob(f"{MODELS}/*{SUFFIX}"))]
    return [Shipped(_name(path), path, _about(path)) for path in files]


def shipped_text() -> str:
    """The list of shipped experiments and model sizes for the terminal."""
    every = shipped()
    width = max(len(each.name) for each in every)
    return "\n".join(f"{each.name:{width}}  {each.about}" for each in every)


def find_shipped(name: str) -> Shipped:
    """The experiment of that name, also written as a path. Raises ConfigError with the nearest name, or all names."""
    found = {each.name: each for each in shipped()}
    wanted = name.removeprefix(f"{FOLDER}/").removesuffix(SUFFIX)
    if wanted not in found:
        raise ConfigError(unknown_message("experiment", name, found))
    return found[wanted]


def copy_experiment(chosen: Shipped, out: Path | None) -> list[Path]:
    """Copies an experiment, and model sizes that it names, to the file or into the folder `out`; returns the files.

    Comments of the copies name them by their paths from the working directory, and the command as it was called. A
    campaign that gets another file name is named after it, so that its results do not mix with those of the original.

    Raises:
        ConfigError: a file exists already, and is not what would be written there; or `out` is a file of another kind.
            Then nothing is written.
    """
    target = _target(chosen, out)
    copies = {target: chosen.path}
    for section in SECTION.findall(chosen.path.read_text(encoding="utf-8")):
        if (source := chosen.path.parent / section).is_file():
            copies[target.parent / section] = source
    moved = {f"{FOLDER}/{_name(source)}{SUFFIX}": shlex.quote(str(path)) for path, source in copies.items()}
    texts = {path: _adapted(source.read_text(encoding="utf-8"), moved) for path, source in copies.items()}
    if chosen.is_campaign and target.stem != chosen.name and NAME.fullmatch(target.stem):
        texts[target] = NAMED.sub(f"campaign: {target.stem}", texts[target], count=1)
    for path, text in texts.items():
        if os.path.lexists(path) and (path == target or not _contains(path, text)):
            raise ConfigError(f"{path} exists already and is not overwritten; choose another place with --out")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path == target or not os.path.lexists(path):
            with path.open("x", encoding="utf-8") as file:  # somebody may have made it meanwhile
                file.write(text)
    return list(texts)


def nearest_files(path: Path) -> list[str]:
    """Campaign files whose names are most like that of a missing one: beside it, or in `experiments` here."""
    folders = dict.fromkeys((path.parent, Path(FOLDER)))
    files = {str(file): file.stem for folder in folders for file in _campaign_files(folder)}
    stems = difflib.get_close_matches(path.stem, files.values(), n=1)
    return [file for file, stem in files.items() if stem in stems]


def missing_file_message(path: Path) -> str | None:
    """What to write instead of a campaign file that does not exist: a near one, or the command that makes it."""
    named = [f"did you mean '{near}'?" for near in nearest_files(path)[:1]]
    if not named:
        stems = difflib.get_close_matches(path.stem, [each.name for each in shipped()], n=1)
        named = [f"`{command()} new {stem}` copies the shipped experiment" for stem in stems]
    return f"{path}: no such file, {named[0]}" if named else None


def _campaign_files(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    except (OSError, ValueError):
        return


def _name(path: Path) -> str:
    return f"{MODELS}/{path.stem}" if path.parent.name == MODELS else path.stem


def _target(chosen: Shipped, out: Path | None) -> Path:
    """The file to write; `out` is a folder if it is one, and else a file."""
    name = f"{Path(chosen.name).name}{SUFFIX}"
    if out is None:
        return Path(f"{chosen.name}{SUFFIX}")
    if out.is_dir() or out.suffix not in SUFFIXES:
        if os.path.lexists(out) and not out.is_dir():
            raise ConfigError(f"{out} is not a folder; give --out a folder, or a new file that ends in {SUFFIX}")
        return out / name
    return out


def _adapted(text: str, moved: Mapping[str, str]) -> str:
    """Replaces commands and paths of a checkout in the comments of an experiment."""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.startswith("#"):
            for old, new in {**moved, SCRIPT: command()}.items():
                line = line.replace(old, new)
            lines[i] = re.sub(r"pip install -e '\.(\[\w+\])'", rf"pip install '{PROGRAM}\1'", line)
    return "".join(lines)


def _contains(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def _about(path: Path) -> str:
    """The description of an experiment, or the first sentence of a comment."""
    text = path.read_text(encoding="utf-8")
    if found := re.search(r"^description: (.+)$", text, flags=re.MULTILINE):
        return found[1].strip("\"' ")
    comment = " ".join(line.removeprefix("#").strip() for line in re.findall(r"\A((?:#.*\n)*)", text)[0].splitlines())
    return re.split(r"(?<=[\w)])\. ", comment, maxsplit=1)[0].rstrip(".")
