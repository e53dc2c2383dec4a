"""Indexes existing shards: which are intact, which split they belong to, how many tokens they hold."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.prepare import add_tokenizer, shard_entry, split_totals
from ngpt.data.text.progress import Log, Meter
from ngpt.data.tokens.shards import CorruptShardError, Shard, read_shard, verify_shard
from ngpt.data.tokens.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer, parse_spec, tokenizer_vocab_size

READERS = 4  # threads; checksums release the interpreter lock

Part = tuple[Shard, int, int]  # the tokens [first, stop) of a shard


def index_shards(
    paths: Sequence[Path], *, vocab_size: int, tokenizer: str, val_fraction: float, folder: Path, log: Log
) -> dict[str, Any]:
    """Verifies shards without moving them, and returns the manifest entries about them.

    A corrupt shard is logged and listed under `skipped`, so that all trials with this manifest leave out the same ones.
    Raises ConfigError if a split has no intact shard, or the shards were made with another tokenizer.
    """
    source = paths[0].parent
    loaded = _load_if_available(tokenizer, source, log)
    if loaded is not None and loaded.vocab_size != vocab_size:
        raise ConfigError(f"{source} has {vocab_size} tokens, its tokenizer {tokenizer} {loaded.vocab_size}")
    sizes = loaded.token_bytes() if loaded else None
    sound, skipped = _verify(paths, vocab_size, log)
    if not sound:
        first = skipped[0]
        hint = f"; were the shards made with data.tokenizer {tokenizer}?" if "vocabulary" in first["reason"] else ""
        raise ConfigError(f"{source} has no sound shard: {first['name']} {first['reason']}{hint}")
    splits = {}
    for split, parts in _assign(paths, sound, val_fraction).items():
        entries = [shard_entry(shard, first, stop) for shard, first, stop in parts]
        n_bytes = None if sizes is None else sum(_count_bytes(part, sizes) for part in parts)
        splits[split] = split_totals(entries, n_bytes)
    content = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    about = {"splits": splits, "vocab_size": vocab_size, "content_sha256": content, "skipped": skipped}
    return about | add_tokenizer(folder, tokenizer, loaded, sizes)


def shard_paths(folder: Path) -> list[Path]:
    """Returns the shards of a folder, sorted by name."""
    return sorted(folder.glob("*.bin"))


def shard_vocab_size(folder: Path, tokenizer: str) -> int:
    """Returns the vocabulary size from the shard headers, else from the tokenizer. ConfigError if they differ."""
    declared: dict[int, str] = {}
    for path in shard_paths(folder):
        with suppress(CorruptShardError):  # reported when the folder is indexed
            if (size := read_shard(path).vocab_size) is not None:
                declared[size] = path.name
    if len(declared) > 1:
        found = ", ".join(f"{name} {size}" for size, name in declared.items())
        raise ConfigError(f"the shards of {folder} come from different tokenizers, by vocabulary: {found}")
    if not declared:
        return tokenizer_vocab_size(tokenizer)
    return known_vocab_size(str(folder), next(iter(declared)), tokenizer)


def known_vocab_size(name: str, known: int, tokenizer: str) -> int:
    """Returns `known`, the vocabulary size of existing shards. ConfigError if that of `tokenizer` differs."""
    # sentencepiece:SIZE would train a tokenizer, which does not apply to existing shards.
    if parse_spec(tokenizer)[0] != "sentencepiece" and (given := tokenizer_vocab_size(tokenizer)) != known:
        raise ConfigError(f"{name} has {known} tokens, data.tokenizer {tokenizer} {given}")
    return known


def _verify(paths: Sequence[Path], vocab_size: int, log: Log) -> tuple[list[Shard], list[dict[str, str]]]:
    """Returns the intact shards, and the names of all others with the reason."""

    def check(path: Path) -> Shard | CorruptShardError:
        try:
            return verify_shard(path, vocab_size=vocab_size)
        except CorruptShardError as error:
            return error

    meter = Meter(log, f"checking {paths[0].parent}")
    sound: list[Shard] = []
    skipped = []
    with ThreadPoolExecutor(READERS) as pool:
        for number, found in enumerate(pool.map(check, paths), start=1):
            meter.update(number, "shards", fraction=number / len(paths))
            if isinstance(found, CorruptShardError):
                log(f"skipped, {found}")
                skipped.append({"name": found.path.name, "reason": found.reason})
            else:
                log(f"{found.path.name}: {found.tokens.size:,} tokens")
                sound.append(found)
    return sound, skipped


def _assign(paths: Sequence[Path], shards: list[Shard], val_fraction: float) -> dict[str, list[Part]]:
    """Assigns shards to splits. Validation: shards named "val", else the last one, else the end of the only one."""
    whole = [(shard, 0, shard.tokens.size) for shard in shards]
    val = [part for part in whole if "val" in part[0].path.name]
    train = [part for part in whole if "val" not in part[0].path.name]
    if any("val" in path.name for path in paths):  # including corrupt ones, so that train never becomes validation
        for split, parts in (("train", train), ("val", val)):
            if not parts:
                raise ConfigError(f"{paths[0].parent} has no sound shard for the {split} split")
    elif len(whole) > 1:
        train, val = whole[:-1], whole[-1:]
    else:
        shard, _, size = whole[0]
        cut = int(size * (1 - val_fraction))
        if cut in (0, size):
            raise ConfigError(f"{shard.path} has {size} tokens: too few to split")
        train, val = [(shard, 0, cut)], [(shard, cut, size)]
    return {"train": train, "val": val}


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
        if spec != "gpt2":
            raise
        log(f"no bits per byte: {error}")
        return None
