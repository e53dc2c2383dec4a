"""Data sets of the Hugging Face hub by name: hf://OWNER/NAME[@REVISION][/SUBSET][:SPLIT].

The first use asks the hub which commit the revision is, and records the answer. Later uses read the record, so that the
data stay the same, and need no network once the files are there. A revision that is a commit never changes.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ngpt.config.base import ConfigError, printable, unknown_message
from ngpt.data.text.hub import HubFile, HubListing, read_listing
from ngpt.data.text.streams import base_name
from ngpt.system.atomic_files import write_json
from ngpt.system.cache import cache_folder

SCHEME = "hf://"
FORM = "hf://OWNER/NAME[@REVISION][/SUBSET][:SPLIT]"
NAME = r"[A-Za-z0-9][\w.-]*"
URI = re.compile(
    rf"hf://(?:datasets/)?({NAME}/{NAME})(?:@(refs/(?:convert|pr)/[\w.-]+|[\w.-]+))?(?:/([^:@]+?))?/?(?::([\w.-]+))?"
)
# Of several kinds of files, the first is read: data sets often hold the same rows in more than one.
KINDS = ((".parquet",), (".arrow",), (".jsonl", ".ndjson", ".jsonlines"), (".json",), (".csv",), (".tsv",), (".txt",))
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CONVERTED = "refs/convert/parquet"  # where the hub keeps its own conversion of most data sets
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class HubName:
    """The parts of a URI."""

    dataset: str
    revision: str = "main"
    subset: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class HubSelection:
    """The files of a data set that a URI names.

    `names` has the split of each file if the data set declares it, else its path. `folder` is where they are kept.
    """

    name: HubName
    commit: str
    files: list[HubFile]
    names: list[str]
    n_others: int  # files that are not read
    folder: Path

    @property
    def is_text(self) -> bool:
        return base_name(Path(self.files[0].path)).endswith(".txt")

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return asdict(self.name) | {"commit": self.commit}

    def describe(self) -> str:
        others = f"; {self.n_others} others are not read" if self.n_others else ""
        return f"{len(self.files)} files of {self.name.dataset} at commit {self.commit}{others}"


def parse_uri(uri: str) -> HubName:
    """Returns the parts of a URI. ConfigError if it is none."""
    found = URI.fullmatch(uri)
    if found is None or ".." in PurePosixPath(found[3] or "").parts:
        raise ConfigError(f"{printable(uri)} is not the name of a data set: write {FORM}")
    return HubName(found[1], found[2] or "main", found[3], found[4])


def find_dataset(uri: str) -> HubSelection:
    """Finds the files that a URI names, from the record or from the hub. ConfigError if there are none."""
    name = parse_uri(uri)
    root = cache_folder() / "downloads" / "hub" / name.dataset.replace("/", "--")
    listing = _recorded_listing(name, root)
    chosen = list(choose_files(listing, name))
    files = [file for file, _ in chosen]
    local = [file.name for file in files]
    if clash := next((path for path in local if local.count(path) > 1), None):
        raise ConfigError(f"{uri} has two files that would both be kept as {clash}")
    folder = root / listing.commit[:12]
    return HubSelection(name, listing.commit, files, [n for _, n in chosen], len(listing.files) - len(files), folder)


def choose_files(listing: HubListing, name: HubName) -> Iterator[tuple[HubFile, str]]:
    """Yields the files of a subset and split, with the name that says which split they are."""
    chosen = list(_of_subset(listing, name))
    if not chosen:
        advice = f"; the hub's conversion may be {SCHEME}{name.dataset}@{CONVERTED}"
        raise ConfigError(f"{_shown(name)} has no Parquet, Arrow, JSON, CSV or text files{advice}")
    by_path: dict[str, str] = {}
    for file, split in chosen:
        if by_path.setdefault(file.path, split) != split:
            raise ConfigError(f"{_shown(name)} has {file.path} in the splits {by_path[file.path]} and {split}")
    for file, split in dict.fromkeys(chosen):
        if name.split is None or _is_of_split(split, name.split):
            yield file, split
    if name.split is not None and not any(_is_of_split(split, name.split) for _, split in chosen):
        found = printable(", ".join(list(dict.fromkeys(split for _, split in chosen))[:SHOWN]))
        raise ConfigError(f"{_shown(name)} has no split {name.split}; it has {found}")


def _recorded_listing(name: HubName, root: Path) -> HubListing:
    record = root / f"{name.revision.replace('/', '-')}.json"
    if record.is_file():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            return HubListing(found["commit"], [HubFile(**file) for file in found["files"]], found["configs"])
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{record} is damaged: remove it, and the hub is asked again") from None
    listing = read_listing(name.dataset, name.revision, pin=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, asdict(listing) | {"asked": time.strftime("%Y-%m-%d %H:%M:%S")})
    return listing


def _of_subset(listing: HubListing, name: HubName) -> Iterator[tuple[HubFile, str]]:
    declared = [config for config in listing.configs if config.get("data_files") or config.get("data_dir")]
    files = [file for file in listing.files if _may_be_read(file)]
    if not declared:
        inside = [file for file in files if name.subset is None or file.path.startswith(f"{name.subset}/")]
        if name.subset and not inside:
            folders = {str(PurePosixPath(file.path).parent) for file in files}
            raise ConfigError(f"{name.dataset}: {unknown_message('subset', name.subset, folders)}")
        subsets = sorted({PurePosixPath(file.path).parts[0] for file in files})
        if name.revision == CONVERTED and name.subset is None and len(subsets) > 1:
            raise _several_subsets(name, subsets)
        for suffixes in KINDS:
            if found := [file for file in inside if base_name(Path(file.path)).endswith(suffixes)]:
                yield from ((file, file.path) for file in found)
                return
        return
    for split, pattern in _patterns(_config(declared, name)):
        found = [file for file in files if _matches(file.path, pattern)]
        if not found:
            raise ConfigError(
                f"{_shown(name)} declares {printable(pattern)}, and no file that can be read is called so"
            )
        yield from ((file, split or file.path) for file in found)


def _config(declared: Sequence[dict[str, Any]], name: HubName) -> dict[str, Any]:
    by_name = {str(config.get("config_name", "default")): config for config in declared}
    if name.subset is not None:
        if name.subset not in by_name:
            raise ConfigError(f"{name.dataset}: {unknown_message('subset', name.subset, by_name)}")
        return by_name[name.subset]
    marked = [config for config in declared if config.get("default")]
    if len(declared) == 1 or marked or "default" in by_name:
        return declared[0] if len(declared) == 1 else marked[0] if marked else by_name["default"]
    raise _several_subsets(name, list(by_name))


def _several_subsets(name: HubName, subsets: Sequence[str]) -> ConfigError:
    more = f" and {len(subsets) - SHOWN} more" if len(subsets) > SHOWN else ""
    revision = "" if name.revision == "main" else f"@{name.revision}"
    shown, form = printable(", ".join(subsets[:SHOWN])), f"{SCHEME}{name.dataset}{revision}/SUBSET"
    return ConfigError(f"{name.dataset} has the subsets {shown}{more}: write {form}")


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
    """Yields split and pattern of the files of a subset, in all forms that a README may declare them."""
    folder = str(config.get("data_dir") or "").strip("/")
    given = config.get("data_files")
    if not given:
        yield None, f"{folder}/**"
        return
    if isinstance(given, dict):
        entries: Iterable[tuple[Any, Any]] = given.items()
    else:
        listed = given if isinstance(given, list) else [given]
        entries = [(e.get("split"), e.get("path")) if isinstance(e, dict) else (None, e) for e in listed]
    for split, paths in entries:
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, f"{folder}/{path}".lstrip("/") if folder else str(path)


def _matches(path: str, pattern: str) -> bool:
    """Whether a path matches a glob, in which `*` stays inside a folder and `**` does not."""
    return re.fullmatch("".join(map(_as_regex, re.split(r"(\*\*/?|\*|\?|\[[^]]+\])", pattern))), path) is not None


def _as_regex(part: str) -> str:
    if part.startswith("[") and part.endswith("]"):
        letters = part[1:-1].replace("\\", r"\\")
        return f"[^{letters[1:]}]" if letters.startswith("!") else f"[{letters}]"
    return {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))


def _may_be_read(file: HubFile) -> bool:
    path = PurePosixPath(file.path)
    if path.name in ABOUT or any(part.startswith(".") for part in path.parts):
        return False
    return base_name(Path(path.name)).endswith(tuple(suffix for suffixes in KINDS for suffix in suffixes))


def _is_of_split(found: str, wanted: str) -> bool:
    """Whether a declared split, or a path, is of a split: `data/train-00000-of-1` is of `train`, not `train_sft`."""
    return found == wanted or re.search(rf"(^|[/.-]){re.escape(wanted)}([/.-]|$)", found) is not None


def _shown(name: HubName) -> str:
    return f"{SCHEME}{name.dataset}" + (f"/{name.subset}" if name.subset else "")
