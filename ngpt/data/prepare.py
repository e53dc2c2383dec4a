"""Tokenizes text into a folder of shards.

`progress.json` records where in the text each shard ends, so a killed preparation continues with the next shard.
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.sources import Corpus
from ngpt.data.text.progress import Log, Meter
from ngpt.data.tokens.formats import KNOWN_WITHOUT_RECORD
from ngpt.data.tokens.shards import CorruptShardError, Shard, token_crc, verify_shard, write_shard
from ngpt.data.tokens.tokenizer import (
    MODEL_FILES,
    Tokenizer,
    load_tokenizer,
    parse_spec,
    read_model,
    train_sentencepiece,
)
from ngpt.system.atomic_files import write_atomic, write_json
from ngpt.system.cgroups import usable_cpus

Entry = dict[str, Any]  # one shard in the manifest
Text = tuple[str, str]  # split, text

SHARD_TOKENS = 100_000_000
TOKEN_BYTES_FILE = "token_bytes.npy"
PROGRESS_FILE = "progress.json"
SPLITS = ("train", "val")  # and test, if files are named for it
BATCH, MAX_BATCH = 1 << 20, 1 << 25  # characters per batch: the usual minimum, and the limit if texts are large
MAX_HELD_OUT = 1_000_000  # documents, about 70 MB
EMPTY_LINE = "\n\n"  # after each document if the tokenizer has no document separator


def tokenize(
    corpus: Corpus, *, tokenizer: str, val_fraction: float, folder: Path, log: Log, workers: int | None = None
) -> dict[str, Any]:
    """Writes the shards and tokenizer files of `corpus` into `folder` and returns the manifest entries about them.

    A sentencepiece vocabulary is trained on the train split only. `workers` threads encode, by default one per core;
    their number does not change the files. Intact shards of an interrupted call are kept. Raises ConfigError if a split
    is empty, or the tokenizer is not available.
    """
    _provide_model(corpus, tokenizer, val_fraction, folder, log)
    loaded = load_tokenizer(tokenizer, folder)
    progress = _Progress(folder, loaded)
    split_names = [*SPLITS, *(split for split in corpus.held_out if split not in SPLITS)]
    writers = {split: _SplitWriter(folder, split, loaded.vocab_size, progress) for split in split_names}
    content, held_out = hashlib.sha256(), _held_out_digests(corpus)
    size, n_read, n_skipped, n_tokens, n_repeated = corpus.size(), 0, 0, 0, 0
    ending = EMPTY_LINE if corpus.separated and loaded.document_separator is None else ""

    def texts() -> Iterator[Text]:
        """Reads and hashes all texts, and yields those that are not in a finished shard."""
        nonlocal n_read, n_skipped, n_repeated
        for split, text in split_texts(corpus, val_fraction):
            content.update(text.encode())
            n_repeated += split == "train" and bool(held_out) and _digest(text) in held_out
            text += ending
            n_bytes = len(text.encode())
            n_read += n_bytes
            if writers[split].wants(n_bytes):
                yield split, text
            else:
                n_skipped += n_bytes

    threads = workers or default_threads()
    resumed = f", {progress.n_shards} shards are already done" if progress.n_shards else ""
    log(f"{corpus.name}: tokenizing{f' in {threads} threads' if threads > 1 else ''}{resumed}")
    meter = Meter(log, corpus.name)
    for split, ids, lossless in encode_in_order(texts(), loaded, marked=corpus.separated, threads=threads):
        if progress.lossless and not lossless:
            log(f"{tokenizer} changes this text: no bits per byte")
            progress.lossless = False
        writers[split].add(ids)
        n_tokens += len(ids)
        meter.update(n_tokens, "tokens", fraction=n_read / max(size, 1), before=n_skipped / max(size, 1))
    reason = f"too little text for data.val_fraction {val_fraction}"
    splits = {
        split: writer.close("its files hold no text" if split in corpus.held_out else reason)
        for split, writer in writers.items()
    }
    about = {"splits": splits, "vocab_size": loaded.vocab_size, "content_sha256": content.hexdigest(), "skipped": []}
    if n_repeated:
        about["repeated"] = n_repeated
        found = f"{n_repeated:,} document{'s' * (n_repeated > 1)} of train, too"
        log(f"{corpus.name}: warning: {' and '.join(corpus.held_out)} hold {found}")
    if corpus.separated:
        about["left_out"] = dict(sorted(corpus.left_out.items())) | {"files": list(corpus.files_left_out)}
        for reason, count in sorted(corpus.left_out.items()):
            log(f"{corpus.name}: {count:,} document{'s' * (count > 1)} left out: {reason}")
    return about | add_tokenizer(folder, tokenizer, loaded, loaded.token_bytes() if progress.lossless else None)


def default_threads() -> int:
    """Returns the number of available cores, but 1 in a Ray worker, since workers share the cores."""
    if Path(getattr(sys.modules["__main__"], "__file__", None) or "").name == "default_worker.py":
        return 1
    return usable_cpus()


def encode_in_order(
    texts: Iterable[Text], tokenizer: Tokenizer, *, marked: bool, threads: int
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Yields the split of each text, its ids (N,), and whether they decode to as many bytes as the text has.

    `marked` texts start with the document separator token, if the tokenizer has one.
    """
    separator = tokenizer.document_separator if marked else None
    prefix = [] if separator is None else [separator]
    sizes = tokenizer.token_bytes()
    for batch in _batches(texts, threads):
        encoded = tokenizer.encode_batch([text for _, text in batch], threads=threads)
        for (split, text), text_ids in zip(batch, encoded, strict=True):
            ids = np.concatenate([np.array(prefix, text_ids.dtype), text_ids])
            yield split, ids, sizes is not None and int(sizes[ids].sum()) == len(text.encode())


def _batches(texts: Iterable[Text], threads: int) -> Iterator[list[Text]]:
    """Groups texts into batches that occupy all threads but need little memory."""
    batch: list[Text] = []
    size = 0
    for split, text in texts:
        batch.append((split, text))
        size += len(text)
        if size >= MAX_BATCH or (size >= BATCH and len(batch) >= threads):
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def shard_entry(shard: Shard, first: int, stop: int, root: Path | None = None) -> Entry:
    """Returns the manifest entry of a shard whose tokens [first, stop) are in the split. The CRC covers all tokens."""
    return {
        "name": shard.path.relative_to(root).as_posix() if root else shard.path.name,
        "size": shard.path.stat().st_size,
        "crc32": shard.crc32 if shard.crc32 is not None else token_crc(shard.words),
        "first": first,
        "tokens": stop - first,
        **({} if shard.format in KNOWN_WITHOUT_RECORD else {"format": shard.format}),
    }


def split_totals(entries: list[Entry], n_bytes: int | None) -> dict[str, Any]:
    """Returns the manifest entry of a split."""
    return {"tokens": sum(entry["tokens"] for entry in entries), "bytes": n_bytes, "shards": entries}


def add_tokenizer(folder: Path, spec: str, tokenizer: Tokenizer | None, sizes: np.ndarray | None) -> dict[str, Any]:
    """Writes the bytes per token, if known, so that training needs no tokenizer. Returns the manifest entries."""
    crc = None
    if sizes is not None:
        narrow = sizes.astype("<u2" if sizes.min() >= 0 else "<i2")
        content = io.BytesIO()
        np.save(content, narrow)  # not into the file, because NumPy's error on a full disk has neither number nor path
        write_atomic(folder / TOKEN_BYTES_FILE, content.getvalue())
        crc = token_crc(narrow)
    return {"tokenizer": {"spec": spec, "sha256": tokenizer.sha256 if tokenizer else None}, "token_bytes_crc32": crc}


def _provide_model(corpus: Corpus, tokenizer: str, val_fraction: float, folder: Path, log: Log) -> None:
    kind, argument = parse_spec(tokenizer)
    path = folder / MODEL_FILES.get(kind, "")
    if (content := read_model(tokenizer)) is not None:
        write_atomic(path, content)
    elif kind == "sentencepiece" and not path.is_file():  # it exists after an interrupted preparation
        log(f"{corpus.name}: training {tokenizer}")
        train_texts = (text for split, text in split_texts(corpus, val_fraction) if split == "train")
        train_sentencepiece(train_texts, int(argument), path)


def split_texts(corpus: Corpus, val_fraction: float) -> Iterator[Text]:
    """Yields all texts with their splits: what falls under `val_fraction`, then what is held out."""
    if "val" in corpus.held_out:
        yield from (("train", text) for text in corpus.documents())
    elif corpus.split_by == "document":
        yield from ((_drawn_split(text, val_fraction), text) for text in corpus.documents())
    else:
        yield from _split_by_position(corpus, val_fraction)
    for split, documents in corpus.held_out.items():
        yield from ((split, text) for text in documents())


def _drawn_split(text: str, val_fraction: float) -> str:
    return "val" if _digest(text) / 2**64 < val_fraction else "train"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _held_out_digests(corpus: Corpus) -> set[int]:
    """What tells the documents that are held out, the first `MAX_HELD_OUT` of them, among those to train on."""
    texts = chain.from_iterable(documents() for documents in corpus.held_out.values())
    return set(map(_digest, islice(texts, MAX_HELD_OUT))) if corpus.separated else set()


def _split_by_position(corpus: Corpus, val_fraction: float) -> Iterator[Text]:
    cut = int(sum(map(len, corpus.documents())) * (1 - val_fraction))  # characters, as nanoGPT counts
    for text in corpus.documents():
        local_cut = min(max(cut, 0), len(text))
        cut -= len(text)
        yield from (pair for pair in (("train", text[:local_cut]), ("val", text[local_cut:])) if pair[1])


class _Progress:
    """The finished shards of each split, recorded on disk, including those of an interrupted process.

    A record has the manifest entry of the shard, the number of texts that end in this or an earlier shard, and the
    number of tokens that it contains of the next text.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._key = [SHARD_TOKENS, tokenizer.sha256]
        self.lossless = tokenizer.token_bytes() is not None
        self.shards: dict[str, list[dict[str, Any]]] = {}
        if (folder / PROGRESS_FILE).is_file():
            before = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            if before["key"] == self._key:
                self.lossless = before["lossless"]
                records = before["shards"].items()
                self.shards = {split: self._intact(entries, tokenizer.vocab_size) for split, entries in records}
        self.n_shards = sum(map(len, self.shards.values()))
        kept = {record["entry"]["name"] for records in self.shards.values() for record in records}
        for path in folder.iterdir():  # including partial files of a killed process
            if path.name not in kept | set(MODEL_FILES.values()):
                path.unlink()

    def add(self, split: str, entry: Entry, n_texts: int, n_tokens: int) -> None:
        self.shards.setdefault(split, []).append({"entry": entry, "texts": n_texts, "tokens": n_tokens})
        write_json(self._folder / PROGRESS_FILE, {"key": self._key, "lossless": self.lossless, "shards": self.shards})

    def _intact(self, records: list[dict[str, Any]], vocab_size: int) -> list[dict[str, Any]]:
        """Returns the records up to the first shard that is missing, damaged or changed."""
        intact = []
        with suppress(CorruptShardError):
            for record in records:
                shard = verify_shard(self._folder / record["entry"]["name"], vocab_size=vocab_size)
                if shard_entry(shard, 0, shard.tokens.size) != record["entry"]:
                    break
                intact.append(record)
        return intact


class _SplitWriter:
    """Collects the tokens of a split and writes them as shards."""

    def __init__(self, folder: Path, split: str, vocab_size: int, progress: _Progress) -> None:
        self._folder, self._split, self._vocab_size, self._progress = folder, split, vocab_size, progress
        finished = progress.shards.get(split, [])
        last = finished[-1] if finished else {"texts": 0, "tokens": 0}
        self._entries: list[Entry] = [record["entry"] for record in finished]
        self._n_seen = 0  # texts
        self._n_added = self._n_finished = last["texts"]
        self._n_dropped = last["tokens"]  # of the next text, in finished shards
        self._n_bytes = 0
        self._waiting: list[np.ndarray] = []
        self._n_waiting = 0

    def wants(self, n_bytes: int) -> bool:
        """Counts the next text. Returns False if finished shards contain all of it, so that it need not be encoded."""
        self._n_bytes += n_bytes
        self._n_seen += 1
        return self._n_seen > self._n_finished

    def add(self, ids: np.ndarray) -> None:
        """Adds the tokens of the next text that `wants` returned True for."""
        self._waiting.append(ids[self._n_dropped :])
        self._n_waiting += len(ids) - self._n_dropped
        self._n_dropped = 0
        self._n_added += 1
        while self._n_waiting >= SHARD_TOKENS:
            self._write(SHARD_TOKENS)
            whole = self._n_waiting == 0  # else the end of this text goes into the next shard
            n_tokens = 0 if whole else len(ids) - self._n_waiting
            self._progress.add(self._split, self._entries[-1], self._n_added if whole else self._n_added - 1, n_tokens)

    def close(self, reason: str) -> dict[str, Any]:
        """Writes the last shard and returns the manifest entry. ConfigError with `reason` if there is no text."""
        if self._n_waiting:
            self._write(self._n_waiting)
        if not self._entries:
            raise ConfigError(f"the {self._split} split is empty: {reason}")
        return split_totals(self._entries, self._n_bytes)

    def _write(self, count: int) -> None:
        tokens = np.concatenate(self._waiting)
        path = self._folder / f"{self._split}_{len(self._entries):03d}.bin"
        shard = write_shard(path, tokens[:count], vocab_size=self._vocab_size)
        self._entries.append(shard_entry(shard, 0, count))
        self._waiting, self._n_waiting = [tokens[count:]], len(tokens) - count
