"""From a corpus by name or path to mapped tokens: fingerprint, one-time preparation, opening.

Prepared corpora live under `$NGPT_CACHE` (default `~/.cache/ngpt`), one folder per fingerprint. A folder there is
complete or absent: it is filled under another name by the one process that holds its lock, and then renamed.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from filelock import FileLock

from ngpt.config import Config, ConfigError, invalid, runtime, unknown
from ngpt.data.prepare import TOKEN_BYTES_FILE, index_shards, shard_paths, shard_vocab_size, tokenize
from ngpt.data.shards import HEADER_BYTES, CorruptShardError, read_shard, token_crc
from ngpt.data.sources import CORPORA, Corpus, text_corpus
from ngpt.data.tokenizer import parse_spec, tokenizer_identity, tokenizer_vocab_size
from ngpt.durable import commit_folder, write_json

FORMAT = 1  # of the prepared folder; raise it when other tokens come out of the same corpus
MANIFEST = "manifest.json"
EDGE = 1 << 20  # bytes at either end of a shard without CRC that identify it

log = logging.getLogger(__name__)


def _tokenizer_spec(spec: str) -> str:
    try:
        parse_spec(spec)
    except ConfigError as error:
        raise invalid(str(error)) from None
    return spec


class DataConfig(Config, frozen=True):
    """What to train on."""

    corpus: str = "python-docs"  # a name in CORPORA; a text file; a folder of text files, shards or a prepared corpus
    tokenizer: Annotated[str, pydantic.AfterValidator(_tokenizer_spec)] = "sentencepiece:2048"
    path: str | None = runtime(None)  # a local copy of a named corpus that is otherwise downloaded
    val_fraction: float = pydantic.Field(default=0.1, gt=0, lt=1)


@dataclass(frozen=True)
class Dataset:
    """A corpus ready to train on: the tokens of each split, one uint16 array per shard, mapped read-only.

    `token_bytes` (V,) int64 is the number of UTF-8 bytes of each token, None where the tokenizer is not at hand.
    """

    train: tuple[np.ndarray, ...]
    val: tuple[np.ndarray, ...]
    vocab_size: int
    token_bytes: np.ndarray | None
    manifest: dict[str, Any]
    folder: Path


def vocab_size(config: DataConfig) -> int:
    """The number of tokens, before anything is prepared.

    Raises:
        ConfigError: unknown corpus, missing files.
    """
    kind, path = _locate(config)
    if kind == "prepared":
        return _read_manifest(path)["vocab_size"]
    return shard_vocab_size(path, config.tokenizer) if kind == "shards" else tokenizer_vocab_size(config.tokenizer)


def fingerprint(config: DataConfig) -> str:
    """Twelve hex digits for the tokens that come out: the corpus' content, the tokenizer and the split.

    Neither the machine nor the place of the files enters. Reads files at most once per process, prepares nothing.

    Raises:
        ConfigError: unknown corpus, missing files.
    """
    kind, path = _locate(config)
    if kind == "prepared":
        return _read_manifest(path)["fingerprint"]
    identity = [
        FORMAT,
        _shards_identity(path) if kind == "shards" else _corpus(config).identity,
        tokenizer_identity(config.tokenizer),
        config.val_fraction,
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def prepare(config: DataConfig, *, out: Path | None = None, log: Callable[[str], None] | None = None) -> Path:
    """The folder with the prepared corpus; made if it is not there. `log` is told what takes time.

    Of two processes that need the same corpus one prepares it and the other waits.

    Raises:
        ConfigError: unknown corpus, missing files, no network, or `out` holds something else.
        OSError: the disk is full or not writable.
    """
    kind, path = _locate(config)
    if kind == "prepared":
        if out is not None:
            raise ConfigError(f"{path} is prepared already: there is nothing to write to {out}")
        return path
    key = fingerprint(config)
    final = out.absolute() if out else cache_folder() / f"{_folder_name(config)}-{key}"
    if not _is_done(final, key):
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f".{final.name}.lock"):
            if not _is_done(final, key):  # somebody else may have had the lock before us
                _fill(config, final, key, log or (lambda _: None))
    return final


def open_dataset(config: DataConfig) -> Dataset:
    """The corpus as arrays, prepared first where necessary; checks each shard once per process.

    Raises:
        ConfigError: as `prepare`.
        CorruptShardError: a file is not as the manifest has it.
    """
    folder = prepare(config, log=log.info)
    manifest = _read_manifest(folder)
    kind, path = _locate(config)
    shards = path if kind == "shards" else Path(manifest["shard_folder"] or folder)
    for skipped in manifest["skipped"]:
        log.warning("corrupt shard left out: %s %s", shards / skipped["name"], skipped["reason"])
    splits = {
        split: tuple(_open_shard(shards / entry["name"], entry) for entry in counts["shards"])
        for split, counts in manifest["splits"].items()
    }
    return Dataset(
        train=splits["train"],
        val=splits["val"],
        vocab_size=manifest["vocab_size"],
        token_bytes=_open_token_bytes(folder, manifest),
        manifest=manifest,
        folder=folder,
    )


def _locate(config: DataConfig) -> tuple[Literal["text", "shards", "prepared"], Path]:
    """What kind of corpus the config names, and its path (of no use for a named one)."""
    path = Path(config.corpus).expanduser()
    if config.corpus in CORPORA:
        return "text", path
    if not path.exists():
        known = unknown("corpus", config.corpus, CORPORA)
        raise ConfigError(f"{known}; nor is there such a file or folder")
    if config.path is not None:
        raise ConfigError("data.path (--from) is a local copy of a named corpus, and this corpus is a path itself")
    if (path / MANIFEST).is_file():
        return "prepared", path
    return ("shards" if path.is_dir() and shard_paths(path) else "text"), path


def _corpus(config: DataConfig) -> Corpus:
    if config.corpus not in CORPORA:
        return text_corpus(_locate(config)[1])
    return CORPORA[config.corpus](Path(config.path).expanduser() if config.path else None)


def cache_folder() -> Path:
    """Where prepared corpora and measured speeds are kept."""
    return Path(os.environ.get("NGPT_CACHE") or "~/.cache/ngpt").expanduser().absolute()


def _folder_name(config: DataConfig) -> str:
    """Letters, digits, `-` and `_` only, whatever the file is called."""
    return re.sub(r"\W+", "-", Path(config.corpus).stem) or "corpus"


def _is_done(folder: Path, key: str) -> bool:
    """Whether the corpus is there; something else in its place is an error."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).is_file() or _read_manifest(folder)["fingerprint"] != key:
        raise ConfigError(f"{folder} holds something else; choose another folder, or remove it")
    return True


def _fill(config: DataConfig, final: Path, key: str, log: Callable[[str], None]) -> None:
    """Prepares under a temporary name, then commits. The caller holds the lock."""
    kind, source = _locate(config)
    prefix = f".tmp-{final.name}-"
    for stale in final.parent.glob(f"{prefix}*"):  # of a process that was killed: a living one would have the lock
        shutil.rmtree(stale)
    temp = final.with_name(prefix + uuid.uuid4().hex)
    temp.mkdir()
    how = {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction, "folder": temp, "log": log}
    try:
        made = index_shards(source, **how) if kind == "shards" else tokenize(_corpus(config), **how)
        about = {
            "format": FORMAT,
            "corpus": config.corpus if config.corpus in CORPORA else source.resolve().name,
            "fingerprint": key,
            "val_fraction": config.val_fraction,
            "python": platform.python_version(),
            "shard_folder": str(source.resolve()) if kind == "shards" else None,
        }
        write_json(temp / MANIFEST, about | made)
        commit_folder(temp, final)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "splits" not in manifest:
        raise ConfigError(f"{path} is not the manifest of a corpus that this version prepared")
    return manifest


def _open_shard(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """The part of a shard that belongs to the split, after a check against the manifest."""
    shard = read_shard(path)
    state = path.stat()
    if state.st_size != entry["size"] or _crc(path.resolve(), state.st_size, state.st_mtime_ns) != entry["crc32"]:
        raise CorruptShardError(path, f"is not as the manifest has it; remove {path.parent} to prepare it again")
    return np.asarray(shard.tokens)[entry["first"] : entry["first"] + entry["tokens"]]


@cache
def _crc(path: Path, size: int, changed: int) -> int:
    """CRC32 of a shard's tokens; computed once per process unless the file changes."""
    return token_crc(read_shard(path).tokens)


def _open_token_bytes(folder: Path, manifest: dict[str, Any]) -> np.ndarray | None:
    if manifest["token_bytes_crc32"] is None:
        return None
    path = folder / TOKEN_BYTES_FILE
    sizes = np.load(path)
    if token_crc(sizes) != manifest["token_bytes_crc32"]:
        raise CorruptShardError(path, f"is not as the manifest has it; remove {folder} to prepare it again")
    return sizes.astype(np.int64)


def _shards_identity(folder: Path) -> list[list[Any]]:
    """Names, sizes and headers; of a shard without CRC also its two ends."""
    identity = []
    for path in shard_paths(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(EDGE)
            file.seek(max(0, size - EDGE))
            end = file.read(EDGE)
        has_crc = len(start) >= HEADER_BYTES and any(start[20:24])
        edges = [] if has_crc else [zlib.crc32(start), zlib.crc32(end)]
        identity.append([path.name, size, start[:24].hex(), *edges])
    return identity
