"""Turns a corpus into a folder that training can map: shards, the tokenizer, and a manifest that accounts for them.

Both functions fill a folder that does not have its final name yet; `corpora.prepare` gives it one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config import ConfigError
from ngpt.data.shards import CorruptShardError, Shard, read_shard, token_crc, verify_shard, write_shard
from ngpt.data.sources import Corpus, read_file
from ngpt.data.tokenizer import (
    MODEL_FILE,
    Tokenizer,
    load_tokenizer,
    parse_spec,
    tokenizer_vocab_size,
    train_sentencepiece,
)
from ngpt.durable import write_atomic

Log = Callable[[str], None]
Entry = dict[str, Any]  # one shard in the manifest

SHARD_TOKENS = 100_000_000
TOKEN_BYTES_FILE = "token_bytes.npy"
SPLITS = ("train", "val")


def tokenize(corpus: Corpus, *, tokenizer: str, val_fraction: float, folder: Path, log: Log) -> dict[str, Any]:
    """Writes the shards and tokenizer files of `corpus` into `folder` and returns what the manifest says of them.

    A sentencepiece vocabulary is learnt from the train split alone.

    Raises:
        ConfigError: a split is empty, or the tokenizer cannot be had.
    """
    kind, argument = parse_spec(tokenizer)
    if kind == "sentencepiece":
        log(f"{corpus.name}: training {tokenizer}")
        train_texts = (text for split, text in _split(corpus, val_fraction) if split == "train")
        train_sentencepiece(train_texts, int(argument), folder / MODEL_FILE)
    elif kind == "model":
        write_atomic(folder / MODEL_FILE, read_file(Path(argument).expanduser()))
    loaded = load_tokenizer(tokenizer, folder)
    sizes = loaded.token_bytes()
    writers = {split: _SplitWriter(folder, split, loaded.vocab_size) for split in SPLITS}
    content = hashlib.sha256()
    log(f"{corpus.name}: tokenizing")
    for split, text in _split(corpus, val_fraction):
        data = text.encode()
        content.update(data)
        ids = loaded.encode(text)
        writers[split].add(ids, len(data))
        if sizes is not None and sizes[ids].sum() != len(data):
            log(f"{tokenizer} does not keep this text as it is: no bits per byte")
            sizes = None
    return {
        "splits": {split: writer.close() for split, writer in writers.items()},
        "tokenizer": _describe(tokenizer, loaded),
        "vocab_size": loaded.vocab_size,
        "token_bytes_crc32": _write_token_bytes(folder, sizes),
        "content_sha256": content.hexdigest(),
        "skipped": [],
    }


def index_shards(source: Path, *, tokenizer: str, val_fraction: float, folder: Path, log: Log) -> dict[str, Any]:
    """Verifies every shard in `source` and returns what the manifest says of them; the shards stay where they are.

    A corrupt shard is left out: logged, and listed under `skipped` with the reason, so that all trials that use this
    manifest leave out the same ones.

    Raises:
        ConfigError: no sound shard is left for a split, or the tokenizer is not the one that the shards were made with.
    """
    vocab_size = shard_vocab_size(source, tokenizer)
    loaded = _tokenizer_at_hand(tokenizer, source, log)
    if loaded is not None and loaded.vocab_size != vocab_size:
        raise ConfigError(f"{source} has {vocab_size} tokens, its tokenizer {tokenizer} {loaded.vocab_size}")
    sizes = loaded.token_bytes() if loaded else None
    sound: list[Shard] = []
    skipped = []
    for path in shard_paths(source):
        try:
            sound.append(verify_shard(path, vocab_size=vocab_size))
            log(f"{path.name}: {sound[-1].tokens.size:,} tokens")
        except CorruptShardError as error:
            log(f"skipped, {error}")
            skipped.append({"name": path.name, "reason": error.reason})
    if not sound:
        first = skipped[0]
        hint = f"; is data.tokenizer {tokenizer} theirs?" if "vocabulary" in first["reason"] else ""
        raise ConfigError(f"{source} has no sound shard: {first['name']} {first['reason']}{hint}")
    splits = {}
    for split, parts in _assign(source, sound, val_fraction).items():
        entries = [_entry(shard, first, stop) for shard, first, stop in parts]
        n_bytes = None if sizes is None else sum(_count_bytes(part, sizes) for part in parts)
        splits[split] = _totals(entries, n_bytes)
    return {
        "splits": splits,
        "tokenizer": _describe(tokenizer, loaded),
        "vocab_size": vocab_size,
        "token_bytes_crc32": _write_token_bytes(folder, sizes),
        "content_sha256": hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest(),
        "skipped": skipped,
    }


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder by name."""
    return sorted(folder.glob("*.bin"))


def shard_vocab_size(folder: Path, tokenizer: str) -> int:
    """The vocabulary that the shards' headers declare; where none does, that of the tokenizer.

    Raises:
        ConfigError: two shards declare different ones, or a given tokenizer has another one.
    """
    declared: dict[int, str] = {}
    for path in shard_paths(folder):
        try:
            size = read_shard(path).vocab_size
        except CorruptShardError:  # reported when the folder is indexed
            continue
        if size is not None:
            declared[size] = path.name
    if len(declared) > 1:
        found = ", ".join(f"{name} {size}" for size, name in declared.items())
        raise ConfigError(f"the shards of {folder} come from different tokenizers, by vocabulary: {found}")
    # A size to train says nothing about shards that exist already; the other kinds name one vocabulary.
    if declared and parse_spec(tokenizer)[0] == "sentencepiece":
        return next(iter(declared))
    given = tokenizer_vocab_size(tokenizer)
    if declared and given not in declared:
        raise ConfigError(f"{folder} has {next(iter(declared))} tokens, data.tokenizer {tokenizer} {given}")
    return given


def _split(corpus: Corpus, val_fraction: float) -> Iterator[tuple[str, str]]:
    """(split, text) in the order of the corpus."""
    if corpus.split_by == "document":
        for text in corpus.documents():
            draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
            yield ("val" if draw < val_fraction else "train"), text
        return
    cut = int(sum(map(len, corpus.documents())) * (1 - val_fraction))  # characters, as nanoGPT counts
    for text in corpus.documents():
        here = min(max(cut, 0), len(text))
        cut -= len(text)
        yield from (pair for pair in (("train", text[:here]), ("val", text[here:])) if pair[1])


class _SplitWriter:
    """Collects the tokens of a split and writes a shard whenever there are enough."""

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        self._folder, self._split, self._vocab_size = folder, split, vocab_size
        self._waiting: list[np.ndarray] = []
        self._n_waiting = 0
        self._n_bytes = 0
        self._entries: list[Entry] = []

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        self._waiting.append(ids)
        self._n_waiting += len(ids)
        self._n_bytes += n_bytes
        while self._n_waiting >= SHARD_TOKENS:
            self._write(SHARD_TOKENS)

    def close(self) -> dict[str, Any]:
        if self._n_waiting:
            self._write(self._n_waiting)
        if not self._entries:
            raise ConfigError(f"the {self._split} split is empty: too little text for this data.val_fraction")
        return _totals(self._entries, self._n_bytes)

    def _write(self, count: int) -> None:
        tokens = np.concatenate(self._waiting)
        path = self._folder / f"{self._split}_{len(self._entries):03d}.bin"
        shard = write_shard(path, tokens[:count], vocab_size=self._vocab_size)
        self._entries.append(_entry(shard, 0, count))
        self._waiting, self._n_waiting = [tokens[count:]], len(tokens) - count


Part = tuple[Shard, int, int]  # the tokens [first, stop) of a shard


def _assign(source: Path, shards: list[Shard], val_fraction: float) -> dict[str, list[Part]]:
    """Which shard belongs to which split: by name, else the last one, else the end of the only one is validation."""
    whole = [(shard, 0, shard.tokens.size) for shard in shards]
    val = [part for part in whole if "val" in part[0].path.name]
    train = [part for part in whole if "val" not in part[0].path.name]
    if any("val" in path.name for path in shard_paths(source)):  # a corrupt one counts: train never becomes validation
        for split, parts in (("train", train), ("val", val)):
            if not parts:
                raise ConfigError(f"{source} has no sound shard for the {split} split")
    elif len(whole) > 1:
        train, val = whole[:-1], whole[-1:]
    else:
        shard, _, size = whole[0]
        cut = int(size * (1 - val_fraction))
        if cut in (0, size):
            raise ConfigError(f"{shard.path} has {size} tokens: too few to split")
        train, val = [(shard, 0, cut)], [(shard, cut, size)]
    return {"train": train, "val": val}


def _entry(shard: Shard, first: int, stop: int) -> Entry:
    """A shard in the manifest: the CRC is that of all its tokens, also where the split takes a part of them."""
    return {
        "name": shard.path.name,
        "size": shard.path.stat().st_size,
        "crc32": shard.crc32 if shard.crc32 is not None else token_crc(shard.tokens),
        "first": first,
        "tokens": stop - first,
    }


def _totals(entries: list[Entry], n_bytes: int | None) -> dict[str, Any]:
    return {"tokens": sum(entry["tokens"] for entry in entries), "bytes": n_bytes, "shards": entries}


def _count_bytes(part: Part, sizes: np.ndarray) -> int:
    shard, first, stop = part
    chunk = 1 << 22  # tokens: looking up all 100M of a shard at once would take 800 MB
    return sum(int(sizes[shard.tokens[at : min(at + chunk, stop)]].sum()) for at in range(first, stop, chunk))


def _tokenizer_at_hand(spec: str, folder: Path, log: Log) -> Tokenizer | None:
    """The tokenizer of ready-made shards, which can be trained on without it."""
    if parse_spec(spec)[0] == "sentencepiece" and not (folder / MODEL_FILE).is_file():
        return None
    try:
        return load_tokenizer(spec, folder)
    except ConfigError as error:
        if spec != "gpt2":
            raise
        log(f"no bits per byte: {error}")
        return None


def _describe(spec: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {"spec": spec, "sha256": tokenizer.sha256 if tokenizer else None}


def _write_token_bytes(folder: Path, sizes: np.ndarray | None) -> int | None:
    """Writes the bytes per token, so that training needs no tokenizer library; returns their CRC32."""
    if sizes is None:
        return None
    narrow = sizes.astype("<u2")
    np.save(folder / TOKEN_BYTES_FILE, narrow)
    return token_crc(narrow)
