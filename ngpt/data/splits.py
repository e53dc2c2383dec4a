"""Assigns files to splits by the words of their names, as corpora are published: train.bin, wiki.valid.txt, test/0.bin.

A file that is named for no split belongs to the train split, from which `val_fraction` takes the validation split
unless files are named for it. Files of the test split are never trained on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ngpt.config.base import ConfigError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
MODES = ("names", "fraction")  # of data.splits: fraction ignores the names
LETTERS = re.compile(r"[^\W\d_]+")  # so train00 begins with the word train
CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")  # and so does trainData
SHOWN = 3  # files of a split in a message


def split_of(name: str) -> str | None:
    """Returns the split that a file is named for, by its path inside the corpus; None if there is none.

    A folder or file name that consists of nothing but the split and numbers, such as `validation/` or
    `train-00000-of-00005.parquet`, counts before one that contains the word among others, such as `test_plan.txt`. Of
    the latter, the file name counts first, then the nearest folder. Raises ConfigError if a name names two splits.
    """
    *folders, file = PurePosixPath(name).parts
    exact = {split for part in [*folders, file.split(".")[0]] if (split := _exact_split(part))}
    if len(exact) == 1:
        return exact.pop()
    if exact:
        raise _ambiguous(name, exact)
    for part in [file, *reversed(folders)]:
        found = {SPLIT_OF_WORD[word] for word in _words(part) if word in SPLIT_OF_WORD}
        if len(found) > 1:
            raise _ambiguous(name, found)
        if found:
            return found.pop()
    return None


def is_split_folder(name: str) -> bool:
    """Whether a folder is named for a split and nothing else."""
    return _exact_split(name) is not None


class NoTrainingFilesError(ConfigError):
    """All files of a corpus are named for other splits, which are `splits`."""

    def __init__(self, message: str, splits: set[str]) -> None:
        super().__init__(message)
        self.splits = splits


@dataclass(frozen=True)
class SplitFiles:
    """The files of a corpus by split, in order. `by_name` has the split of each file that is named for one."""

    root: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]  # empty: `val_fraction` of train
    test: tuple[Path, ...]
    by_name: Mapping[Path, str]
    ignored: tuple[Path, ...] = ()  # other files beside them, which are not read

    @property
    def changes_anything(self) -> bool:
        """Whether the names matter. Without a validation or test file everything falls under `val_fraction`."""
        return bool(self.val or self.test)

    def describe(self, val_fraction: str) -> str:
        """Says in one line which files are in which split. `val_fraction` says how val is made of train."""
        parts = [f"train is {self._shown(self.train)}", f"val is {self._shown(self.val) if self.val else val_fraction}"]
        if self.test:
            parts.append(f"test is {self._shown(self.test)}, not trained on")
        if self.ignored:
            parts.append(f"not read: {self._shown(self.ignored)}")
        return "; ".join(parts)

    def names(self) -> dict[str, list[str]]:
        """Returns the names of the files of each split, relative to the corpus."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {split: [self.name(path) for path in paths] for split, paths in splits.items() if paths}

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _shown(self, paths: Sequence[Path]) -> str:
        names = [self.name(path) for path in paths]
        if len(names) <= SHOWN:
            return ", ".join(names)
        return f"{len(names)} files ({names[0]} to {names[-1]})"


def split_files(
    root: Path,
    files: Sequence[Path],
    *,
    mode: str = "names",
    ignored: Sequence[Path] = (),
    names: Mapping[Path, str] | None = None,
) -> SplitFiles:
    """Assigns the files below `root` to splits by name; in mode `fraction` all of them to train.

    `names` are looked at instead of those of the files, where these are copies under another name. Raises ConfigError
    if a name is ambiguous or there is no file to train on.
    """
    by_name: dict[Path, str] = {}
    if mode == "names":
        published = names or {path: path.relative_to(root).as_posix() for path in files}
        by_name = {path: split for path in files if (split := split_of(published[path]))}
    val, test = (tuple(path for path in files if by_name.get(path) == split) for split in ("val", "test"))
    train = tuple(path for path in files if by_name.get(path) not in ("val", "test"))
    if not train:
        found = ", ".join(path.relative_to(root).as_posix() for path in files[:SHOWN])
        more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        text = f"{root} has no file to train on: by their names, {found}{more} are val or test; {HINT}"
        raise NoTrainingFilesError(text, {*by_name.values()})
    return SplitFiles(root, train, val, test, by_name, tuple(ignored))


HINT = "rename files, or set data.splits=fraction (--splits fraction) to split without names"


def _exact_split(part: str) -> str | None:
    found = {SPLIT_OF_WORD.get(word) for word in _words(part) if word != "of"}  # train-00000-of-00005
    return found.pop() if len(found) == 1 else None


def _words(text: str) -> list[str]:
    return [word.lower() for letters in LETTERS.findall(text) for word in CAMEL_CASE.split(letters)]


def _ambiguous(name: str, splits: set[str]) -> ConfigError:
    return ConfigError(f"the name {name} says {' and '.join(sorted(splits))}: a file is in one split; {HINT}")
