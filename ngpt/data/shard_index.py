"""Finds and indexes existing token files: which are intact, which split they belong to, how many tokens they hold."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.prepare import TOKEN_BYTES_FILE, Entry, add_tokenizer, shard_entry, split_totals
from ngpt.data.splits import SplitFiles, is_split_folder, split_files, split_of
from ngpt.data.text.documents import find_files
from ngpt.data.text.formats import format_of
from ngpt.data.text.progress import Log, Meter
from ngpt.data.tokens.formats import KNOWN_WITHOUT_RECORD, find_layout
from ngpt.data.tokens.shards import CorruptShardError, Shard, read_shard, verify_shard
from ngpt.data.tokens.tokenizer import (
    MODEL_FILE,
    MODEL_FILES,
    Tokenizer,
    load_tokenizer,
    names_file,
    parse_spec,
    tokenizer_vocab_size,
)

SUFFIXES = (".bin", ".npy")  # in this order: a folder with .bin files is read for them alone
BESIDE_TOKENS = (".json", ".model", ".pkl", ".yaml", ".yml")  # suffixes of files that describe tokens
ABOUT = ("readme", "license")
READERS = 4  # threads; checksums release the interpreter lock

Part = tuple[Shard, int, int]  # the tokens [first, stop) of a shard


def index_shards(
    files: SplitFiles,
    *,
    vocab_size: int,
    tokenizer: str,
    val_fraction: float,
    folder: Path,
    log: Log,
    bare_dtype: str | None = None,
) -> dict[str, Any]:
    """Verifies shards without moving them, and returns the manifest entries about them.

    A corrupt shard is logged and listed under `skipped`, so that all trials with this manifest leave out the same ones.
    `bare_dtype` is the width of files without a header. Raises ConfigError if a split has no intact shard, or the
    shards were made with another tokenizer.
    """
    source = files.root
    loaded = _load_if_available(tokenizer, source, log)
    if loaded is not None and loaded.vocab_size != vocab_size:
        raise ConfigError(f"{source} has {vocab_size} tokens, its tokenizer {tokenizer} {loaded.vocab_size}")
    sizes = loaded.token_bytes() if loaded else None
    sound, skipped = _verify(files, vocab_size, bare_dtype, log)
    if not sound:
        first = skipped[0]
        hint = f"; were the shards made with data.tokenizer {tokenizer}?" if "vocabulary" in first["reason"] else ""
        raise ConfigError(f"{source} has no sound shard: {first['name']} {first['reason']}{hint}")
    splits = {}
    for split, parts in _assign(files, sound, val_fraction).items():
        entries = [shard_entry(shard, first, stop, source) for shard, first, stop in parts]
        n_bytes = None if sizes is None else sum(_count_bytes(part, sizes) for part in parts)
        splits[split] = split_totals(entries, n_bytes)
    if warning := _repetition([entry for counts in splits.values() for entry in counts["shards"]]):
        log(f"{source.name}: warning: {warning}")
    content = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    about = {"splits": splits, "vocab_size": vocab_size, "content_sha256": content, "skipped": skipped}
    return about | add_tokenizer(folder, tokenizer, loaded, sizes)


def shard_paths(source: Path) -> list[Path]:
    """Returns the token files of a folder, sorted by name, or the file that `source` is; empty if it holds none.

    These are its `.bin` files, else `.bin` or `.npy` files in folders named for splits, as in `data/train/0.bin`, else
    its `.npy` files unless texts beside them are the corpus. Raises ConfigError if folders of splits belong to several
    corpora.
    """
    if source.is_file():
        return [source] if source.suffix in SUFFIXES else []
    if bare := sorted(source.glob("*.bin")):
        return bare
    if not source.is_dir():
        return []
    folders = {path: path.relative_to(source).parts[:-1] for path in find_files(source)}
    for suffix in SUFFIXES:
        if found := [path for path in folders if path.suffix == suffix and any(map(is_split_folder, folders[path]))]:
            _require_one_corpus(source, [folders[path] for path in found])
            return found
    arrays = [path for path in sorted(source.glob("*.npy")) if path in folders and path.name != TOKEN_BYTES_FILE]
    return arrays if _are_tokens(arrays, [path for path in folders if path not in set(arrays)]) else []


def _are_tokens(arrays: Sequence[Path], others: Sequence[Path]) -> bool:
    """Whether `.npy` files are a corpus, rather than labels or embeddings of the texts beside them."""
    if not arrays or any(found.kind != "text" and found.is_table for found in map(format_of, others)):
        return False
    texts = [path for path in others if path.suffix not in BESIDE_TOKENS and path.stem.lower() not in ABOUT]
    return not texts or all(split_of(path.name) for path in arrays)


def choose_shards(source: Path, splits: str) -> SplitFiles:
    """Assigns the token files of a folder to splits; `splits` is as in `data.splits`. A file is taken by itself."""
    paths = shard_paths(source)
    if source.is_file():
        return split_files(source.parent, paths, mode="fraction")
    others = {*find_files(source)} - {*paths} - {path.with_suffix(".idx") for path in paths}
    ignored = sorted(others - {source / name for name in (*MODEL_FILES.values(), TOKEN_BYTES_FILE)})
    return split_files(source, paths, mode=splits, ignored=ignored)


def resolve_splits(files: SplitFiles, intact: Sequence[Path]) -> SplitFiles:
    """Returns the final splits of the intact files. Without files named for it, validation is the last one of several.

    Of those, one that is not named for the train split counts first. It stays empty if there is one training file only.
    """
    sound = {*intact}
    train, val, test = (tuple(filter(sound.__contains__, paths)) for paths in (files.train, files.val, files.test))
    if not files.val and len(train) > 1:
        unnamed = [path for path in train if path not in files.by_name]
        val = ((unnamed or train)[-1],)
        train = tuple(path for path in train if path not in val)
    return replace(files, train=train, val=val, test=test)


def splits_to_record(files: SplitFiles) -> dict[str, list[str]] | None:
    """Returns the splits by name if they differ from those of versions that looked for "val" in names, else None."""
    paths = [*files.train, *files.val, *files.test]
    now = resolve_splits(files, paths)
    return None if _same_splits(now, sorted(paths)) else now.names()


def formats_to_record(files: SplitFiles, bare_dtype: str | None) -> dict[str, str]:
    """Returns the formats of files that are neither bare uint16 arrays nor shards of llm.c version 1, by name."""
    formats = {}
    for path in (*files.train, *files.val, *files.test):
        with suppress(CorruptShardError):  # reported when the folder is indexed
            if (found := find_layout(path, bare_dtype).format) not in KNOWN_WITHOUT_RECORD:
                formats[files.name(path)] = found
    return formats


def check_recorded_splits(manifest: dict[str, Any], folder: Path) -> None:
    """Raises ConfigError if a manifest without file names was made when other names meant other splits."""
    if "files" in manifest or manifest["shard_folder"] is None:
        return
    root = Path(manifest["shard_folder"])
    entries = [entry for counts in manifest["splits"].values() for entry in counts["shards"]]
    names = {entry["name"] for entry in [*entries, *manifest["skipped"]]}
    if recorded := splits_to_record(split_files(root, sorted(root / name for name in names))):
        now = "; ".join(f"{split} is {', '.join(names)}" for split, names in recorded.items())
        raise ConfigError(f"{folder} was prepared when names meant other splits; prepare {root} again, now {now}")


def _same_splits(now: SplitFiles, paths: Sequence[Path]) -> bool:
    """Whether earlier versions made the same splits: val in the name, else the last file, else the end of one."""
    val = [path for path in paths if "val" in path.name] or (list(paths[-1:]) if len(paths) > 1 else [])
    return not now.test and set(now.val) == set(val)


def _require_one_corpus(source: Path, folders: Sequence[tuple[str, ...]]) -> None:
    """Raises ConfigError if folders of splits lie below several folders, which are probably of several tokenizers."""
    corpora = {tuple(part for part in parts if not is_split_folder(part)) for parts in folders}
    if len(corpora) > 1:
        found = ", ".join(sorted("/".join(parts) or "." for parts in corpora)[:3])
        raise ConfigError(f"{source} holds token files of {len(corpora)} corpora, in {found}: name one of them")


def shard_vocab_size(source: Path, tokenizer: str, bare_dtype: str | None = None) -> int:
    """Returns the vocabulary size from the shard headers, else from the tokenizer. ConfigError if they differ."""
    declared: dict[int, str] = {}
    for path in shard_paths(source):
        with suppress(CorruptShardError):  # reported when the folder is indexed
            if (size := read_shard(path, bare_dtype).vocab_size) is not None:
                declared[size] = path.name
    if len(declared) > 1:
        found = ", ".join(f"{name} {size}" for size, name in declared.items())
        raise ConfigError(f"the shards of {source} come from different tokenizers, by vocabulary: {found}")
    if not declared:
        return tokenizer_vocab_size(tokenizer)
    return known_vocab_size(str(source), next(iter(declared)), tokenizer)


def known_vocab_size(name: str, known: int, tokenizer: str) -> int:
    """Returns `known`, the vocabulary size of existing shards. ConfigError if that of `tokenizer` differs."""
    # sentencepiece:SIZE would train a tokenizer, which does not apply to existing shards.
    if parse_spec(tokenizer)[0] != "sentencepiece" and (given := tokenizer_vocab_size(tokenizer)) != known:
        raise ConfigError(f"{name} has {known} tokens, data.tokenizer {tokenizer} {given}")
    return known


def _verify(
    files: SplitFiles, vocab_size: int, bare_dtype: str | None, log: Log
) -> tuple[list[Shard], list[dict[str, str]]]:
    """Returns the intact shards, and the names of all others with the reason."""
    paths = sorted([*files.train, *files.val, *files.test])

    def check(path: Path) -> Shard | CorruptShardError:
        try:
            return verify_shard(path, vocab_size=vocab_size, bare_dtype=bare_dtype)
        except CorruptShardError as error:
            return error

    meter = Meter(log, f"checking {files.root}")
    sound: list[Shard] = []
    skipped = []
    with ThreadPoolExecutor(READERS) as pool:
        for number, found in enumerate(pool.map(check, paths), start=1):
            meter.update(number, "shards", fraction=number / len(paths))
            if isinstance(found, CorruptShardError):
                log(f"skipped, {found}")
                skipped.append({"name": files.name(found.path), "reason": found.reason})
            else:
                log(f"{files.name(found.path)}: {found.tokens.size:,} tokens{_note(found)}")
                sound.append(found)
    return sound, skipped


def _repetition(entries: Sequence[Entry]) -> str | None:
    """Says which files hold the tokens of others, for instance as copies or links; None if there are none."""
    first: dict[tuple[int, int], str] = {}
    pairs = [(entry["name"], first.setdefault((entry["size"], entry["crc32"]), entry["name"])) for entry in entries]
    if not (found := {name: earlier for name, earlier in pairs if name != earlier}):
        return None
    name, earlier = next(iter(found.items()))
    more = f", as {len(found) - 1} more files do" if len(found) > 1 else ""
    return f"{name} repeats the tokens of {earlier}{more}: what is trained on may be in val too"


def _note(shard: Shard) -> str:
    return "" if shard.format in KNOWN_WITHOUT_RECORD else f" ({shard.format})"


def _assign(files: SplitFiles, shards: list[Shard], val_fraction: float) -> dict[str, list[Part]]:
    """Returns the parts of intact shards in each split; the end of the only training file is validation."""
    resolved = resolve_splits(files, [shard.path for shard in shards])
    whole = {shard.path: (shard, 0, shard.tokens.size) for shard in shards}
    train, val, test = ([whole[path] for path in paths] for paths in (resolved.train, resolved.val, resolved.test))
    # Files of a split may all be corrupt. Then no others take their place.
    for split, parts, named in (("train", train, files.train), ("val", val, files.val)):
        if named and not parts:
            raise ConfigError(f"{files.root} has no sound shard for the {split} split")
    if not val:
        shard, _, size = train[0]
        cut = int(size * (1 - val_fraction))
        if cut in (0, size):
            raise ConfigError(f"{shard.path} has {size} tokens: too few to split")
        train, val = [(shard, 0, cut)], [(shard, cut, size)]
    return {"train": train, "val": val} | ({"test": test} if test else {})


def _count_bytes(part: Part, sizes: np.ndarray) -> int:
    shard, first, stop = part
    chunk = 1 << 22  # tokens: looking up all 100M of a shard at once would take 800 MB
    return sum(int(sizes[shard.tokens[start : min(start + chunk, stop)]].sum()) for start in range(first, stop, chunk))


def _load_if_available(spec: str, folder: Path, log: Log) -> Tokenizer | None:
    """Loads the tokenizer of existing shards, or returns None if it is missing; training works without it."""
    if parse_spec(spec)[0] == "sentencepiece" and not (folder / MODEL_FILE).is_file():
        return None
    try:
        return load_tokenizer(spec, folder)
    except ConfigError as error:
        if names_file(spec):
            raise
        log(f"no bits per byte: {error}")
        return None
