"""Finds a corpus by name or path, prepares it once, and opens it as memory-mapped tokens.

Prepared corpora live in `$NGPT_CACHE` (default `~/.cache/ngpt`), one folder per fingerprint. A folder is complete or
absent: the process that holds its lock fills a temporary folder and then renames it.
"""

import hashlib
import json
import logging
import platform
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from filelock import FileLock

from ngpt.config.base import (
    Config,
    ConfigError,
    added_setting,
    invalid_setting,
    one_of,
    runtime_setting,
    unknown_message,
)
from ngpt.data.manifest import FORMAT, MANIFEST, is_prepared, open_shard, open_token_bytes, read_manifest
from ngpt.data.prepare import PROGRESS_FILE, tokenize
from ngpt.data.sampling import ORDERS
from ngpt.data.shard_index import (
    READERS,
    check_recorded_splits,
    choose_shards,
    formats_to_record,
    index_shards,
    known_vocab_size,
    resolve_splits,
    shard_paths,
    shard_vocab_size,
    splits_to_record,
)
from ngpt.data.sources import CORPORA, Corpus, ShardCorpus, hub_corpus, repetition, shards_identity, text_corpus
from ngpt.data.splits import MODES, SplitFiles, split_files
from ngpt.data.text.documents import COLUMN
from ngpt.data.text.hub_datasets import SCHEME, parse_uri
from ngpt.data.text.progress import Log, silent
from ngpt.data.tokens.formats import BARE_DTYPES
from ngpt.data.tokens.tokenizer import parse_spec, tokenizer_identity, tokenizer_vocab_size
from ngpt.system.atomic_files import commit_folder, write_json
from ngpt.system.cache import cache_folder

POLICIES = ("skip", "fail")  # what to do about corrupt shards
MAX_NAME = 200  # bytes of a corpus' name in that of its folder; a file system allows 255 in all

log = logging.getLogger(__name__)


def _tokenizer_spec(spec: str) -> str:
    try:
        parse_spec(spec)
    except ConfigError as error:
        raise invalid_setting(str(error)) from None
    return spec


class DataConfig(Config, frozen=True):
    """The corpus to train on, and the order of its windows."""

    corpus: str = "python-docs"
    """A named corpus, `hf://OWNER/NAME`, or the path of a file or folder of text, documents or tokens."""
    tokenizer: Annotated[str, pydantic.AfterValidator(_tokenizer_spec)] = "sentencepiece:2048"
    """Tokenizer of text: `sentencepiece:SIZE` is trained on the corpus; `gpt2`, `tiktoken:NAME`, `hf:DIR`, a file."""
    path: str | None = runtime_setting(None)
    """Local copy of a named corpus, used instead of a download."""
    val_fraction: float = pydantic.Field(default=0.1, gt=0, lt=1)
    """Share of the validation split."""
    shards: Annotated[int, pydantic.Field(ge=1, le=10**6)] = 1
    """Number of files, for a corpus that is published in parts."""
    on_corrupt: Annotated[str, one_of(POLICIES, "policy")] = runtime_setting("skip")
    """Corrupt shards: `skip` them with a warning, or `fail`."""
    order: Annotated[str, one_of(ORDERS, "order")] = "windows"
    """Order of the windows: random, each once per epoch (`shards`), or through a buffer (`reservoir`)."""
    reservoir: Annotated[int, pydantic.Field(ge=1, le=10**7)] = 4096
    """Windows in the buffer of the order `reservoir`."""
    text_column: Annotated[str, pydantic.Field(min_length=1)] = added_setting(COLUMN)
    """Column of the documents; `a.b` is `b` inside `a`."""
    splits: Annotated[str, one_of(MODES, "way to split")] = added_setting("names")
    """`names`: files named train, val or test are these splits; `fraction`: `val_fraction` alone decides."""
    token_dtype: Annotated[str, one_of(BARE_DTYPES, "dtype")] | None = added_setting(None)
    """Width of token files without a header; null: uint16 unless the content contradicts."""


@dataclass(frozen=True)
class Dataset:
    """A corpus ready to train on: the tokens of each split, one read-only memory-mapped array of integers per shard.

    `test` is empty unless files are named for it; nothing is trained on it.
    `token_bytes` (V,) int64 is the number of UTF-8 bytes of each token; None without the tokenizer.
    """

    train: tuple[np.ndarray, ...]
    val: tuple[np.ndarray, ...]
    vocab_size: int
    token_bytes: np.ndarray | None
    manifest: dict[str, Any]
    folder: Path
    test: tuple[np.ndarray, ...] = ()

    @property
    def has_tokenizer(self) -> bool:
        """Whether it is known which tokenizer made the tokens, so that they can be decoded."""
        return has_tokenizer(self.manifest)


def has_tokenizer(manifest: dict[str, Any]) -> bool:
    """Whether the manifest of a corpus says which tokenizer made its tokens."""
    return manifest["tokenizer"].get("sha256") is not None


def vocab_size(config: DataConfig) -> int:
    """Returns the vocabulary size without preparing. ConfigError if the tokenizer does not match existing shards."""
    # The local copy and number of files of a named corpus do not matter here; `fingerprint` checks them.
    source = CORPORA[config.corpus](None, 1) if config.corpus in CORPORA else locate(config)
    if isinstance(source, ShardCorpus):
        return known_vocab_size(source.name, source.vocab_size, config.tokenizer)
    if isinstance(source, Corpus):
        return tokenizer_vocab_size(config.tokenizer)
    if is_prepared(source):
        return read_manifest(source)["vocab_size"]
    return shard_vocab_size(source, config.tokenizer, config.token_dtype)


def fingerprint(config: DataConfig) -> str:
    """Returns twelve hex digits that identify the tokens: content of the corpus, tokenizer and split.

    Independent of the machine, the location of the files, and the order of training (`order_settings`). Reads each file
    at most once per process; prepares and downloads nothing.
    """
    return _fingerprints(config)[0]


def _fingerprints(config: DataConfig) -> tuple[str, str]:
    """Returns the fingerprint, and that of versions that knew one width of tokens and less about names.

    Both are equal unless other splits or formats are read now.
    """
    check_shards(config)
    source = locate(config)
    if isinstance(source, Path) and is_prepared(source):
        recorded = read_manifest(source)["fingerprint"]
        return recorded, recorded
    added: dict[str, Any] = {}
    if isinstance(source, Path):
        files = choose_shards(source, config.splits)
        paths = sorted([*files.train, *files.val, *files.test])
        content: Any = shards_identity(paths, files.root)
        added = {"splits": splits_to_record(files), "formats": formats_to_record(files, config.token_dtype)}
    else:
        content = source.identity
        if isinstance(source, Corpus) and source.held_out and source.files:
            added = {"splits": source.files.names()}
    added = {name: value for name, value in added.items() if value}
    identity = [FORMAT, content, tokenizer_identity(_tokenizer(config, source)), config.val_fraction]
    return _hash([*identity, added] if added else identity), _hash(identity)


def _hash(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def check_shards(config: DataConfig) -> None:
    """Raises ConfigError if `data.shards` exceeds the number of files, or the corpus is not published in parts."""
    if config.corpus in CORPORA:
        CORPORA[config.corpus](None, config.shards)
    elif config.shards != 1:
        raise ConfigError(f"data.shards {config.shards} is for corpora that are published in parts, not for a path")


def order_settings(config: DataConfig) -> dict[str, Any]:
    """Returns the settings that determine the order of windows, by dotted name; empty for the default order."""
    if config.order == "windows":
        return {}
    settings = {"data.order": config.order}
    return settings | {"data.reservoir": config.reservoir} if config.order == "reservoir" else settings


def prepare(config: DataConfig, *, out: Path | None = None, log: Log = silent, workers: int | None = None) -> Path:
    """Prepares the corpus unless it is prepared already, and returns its folder.

    Of two processes that need the same corpus, one prepares it and the other waits. `workers` threads tokenize. Raises
    ConfigError for missing files, no network, another corpus in `out`, or a corrupt shard if `on_corrupt` is "fail".
    """
    check_shards(config)
    source = locate(config)
    if isinstance(source, Path) and is_prepared(source):
        if out is not None:
            raise ConfigError(f"{source} is prepared already: there is nothing to write to {out}")
        check_recorded_splits(read_manifest(source), source)
        final = source
    else:
        key, earlier = _fingerprints(config)
        final = out.absolute() if out else _folder_in_cache(config, key)
        if not _is_done(final, key):
            if key != earlier and is_prepared(before := _folder_in_cache(config, earlier)):
                log(f"{before} has other splits or another width of tokens: {config.corpus} is prepared anew")
            final.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(final.parent / f".{final.name}.lock"):
                if not _is_done(final, key):  # another process may have prepared it meanwhile
                    _fill(config, final, key, log, workers)
    if config.on_corrupt == "fail" and (skipped := read_manifest(final)["skipped"]):
        raise _refusal(skipped, f"; {final} leaves them out: remove it once they are repaired")
    return final


def known_manifest(config: DataConfig) -> dict[str, Any] | None:
    """Returns the manifest of a corpus, or None if it is not prepared yet."""
    source = locate(config)
    is_folder = isinstance(source, Path) and is_prepared(source)
    folder = source if is_folder else _folder_in_cache(config, fingerprint(config))
    if not isinstance(folder, Path) or not is_prepared(folder):
        return None
    return read_manifest(folder)


def _folder_in_cache(config: DataConfig, key: str) -> Path:
    name = re.sub(r"\W+", "-", Path(config.corpus).stem).encode()[:MAX_NAME].decode(errors="ignore") or "corpus"
    return cache_folder() / f"{name}-{key}"


def open_dataset(config: DataConfig, *, recheck: bool = False) -> Dataset:
    """Opens the corpus as arrays and prepares it if necessary. Shards are verified once, and again if they change.

    Shards that preparation found corrupt are left out and logged. `recheck` verifies all shards again, as a campaign
    does when it starts: a disk may flip a bit without changing the time of the file. Raises CorruptShardError if a file
    differs from the manifest, and ConfigError like `prepare`.
    """
    folder = prepare(config, log=log.info)
    manifest = read_manifest(folder)
    shards = _shard_folder(config, manifest, folder)
    if "test" in manifest["splits"]:
        log.warning("%s: %s", manifest["corpus"], manifest["chosen"])
    for skipped in manifest["skipped"]:
        log.warning("corrupt shard left out: %s %s", shards / skipped["name"], skipped["reason"])

    def opened(entry: dict[str, Any]) -> np.ndarray:
        bare_dtype = config.token_dtype or manifest.get("token_dtype")
        return open_shard(shards / entry["name"], entry, folder, bare_dtype=bare_dtype, recheck=recheck)

    with ThreadPoolExecutor(READERS) as pool:  # checksums let other threads run
        splits = {split: tuple(pool.map(opened, counts["shards"])) for split, counts in manifest["splits"].items()}
    sizes = open_token_bytes(folder, manifest)
    return Dataset(**splits, vocab_size=manifest["vocab_size"], token_bytes=sizes, manifest=manifest, folder=folder)


Source = Corpus | ShardCorpus | Path  # a path: a folder of shards or of a prepared corpus


def locate(config: DataConfig) -> Source:
    """Returns what a config means, without preparing or downloading it. ConfigError if there is no such corpus."""
    if config.corpus in CORPORA:
        _require_default_column(config, config.corpus)
        if config.splits != "names" or config.token_dtype is not None:
            raise ConfigError(f"data.splits and data.token_dtype are for a path, not for {config.corpus}")
        return CORPORA[config.corpus](Path(config.path).expanduser() if config.path else None, config.shards)
    if config.corpus.startswith(SCHEME):
        if config.token_dtype is not None:
            raise ConfigError(f"data.token_dtype is for a path, not for {config.corpus}")
        if config.path is None:
            return hub_corpus(config.corpus, config.text_column, config.splits)
        parse_uri(config.corpus)
        return text_corpus(Path(config.path).expanduser(), config.text_column, config.splits)
    path = Path(config.corpus).expanduser()
    if not path.exists():
        beside = path.with_name(f"{path.name}.bin")  # Megatron names its files by their prefix
        hint = f"; did you mean {beside}?" if beside.is_file() else ""
        raise ConfigError(f"{unknown_message('corpus', config.corpus, CORPORA)}; there is no such file or folder{hint}")
    if config.path is not None:
        raise ConfigError("data.path (--from) is a local copy of a named corpus, and this corpus is a path itself")
    if is_prepared(path):
        return path
    if shard_paths(path):
        _require_default_column(config, "token files")
        return path
    return text_corpus(path, config.text_column, config.splits)


def _require_default_column(config: DataConfig, what: str) -> None:
    if config.text_column != COLUMN:
        raise ConfigError(f"data.text_column {config.text_column} is for documents of your own, not for {what}")


def prepared_manifest(source: Source) -> dict[str, Any] | None:
    """Returns the manifest of a folder that is prepared; None for any other corpus."""
    return read_manifest(source) if isinstance(source, Path) and is_prepared(source) else None


def _tokenizer(config: DataConfig, source: Source) -> str:
    """Returns the tokenizer spec. Published shards have their own tokenizer, so they ignore sentencepiece:SIZE."""
    is_size = parse_spec(config.tokenizer)[0] == "sentencepiece"
    return source.tokenizer if isinstance(source, ShardCorpus) and is_size else config.tokenizer


def _shard_folder(config: DataConfig, manifest: dict[str, Any], folder: Path) -> Path:
    """Returns the current folder of the shards, which may have moved. Downloads deleted shards again."""
    if manifest["shard_folder"] is None:
        return folder
    source = locate(config)
    if isinstance(source, Path):
        if is_prepared(source):
            return Path(manifest["shard_folder"])
        return source if source.is_dir() else source.parent
    if config.path is not None:
        return Path(config.path).expanduser()
    recorded = Path(manifest["shard_folder"])
    entries = [entry for counts in manifest["splits"].values() for entry in counts["shards"]]
    if isinstance(source, ShardCorpus) and not all((recorded / entry["name"]).is_file() for entry in entries):
        return source.fetch(log.info)[0].parent
    return recorded


def _is_done(folder: Path, key: str) -> bool:
    """Whether `folder` contains this corpus; raises ConfigError if it contains anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not is_prepared(folder) or read_manifest(folder)["fingerprint"] != key:
        raise ConfigError(f"{folder} holds something else; choose another folder, or remove it")
    return True


def _fill(config: DataConfig, final: Path, key: str, log: Log, workers: int | None) -> None:
    """Fills a temporary folder, or that of a killed process, and renames it to `final`. The caller holds the lock."""
    temp = final.with_name(f".tmp-{final.name}-{key}")
    earlier = re.compile(rf"\.tmp-{re.escape(final.name)}-[0-9a-f]{{{len(key)}}}")
    for stale in [path for path in final.parent.iterdir() if earlier.fullmatch(path.name)]:
        if stale != temp:
            shutil.rmtree(stale)
    temp.mkdir(exist_ok=True)
    is_name = config.corpus in CORPORA or config.corpus.startswith(SCHEME)
    corpus = config.corpus if is_name else Path(config.corpus).expanduser().resolve().name
    about = {"format": FORMAT, "corpus": corpus, "fingerprint": key, "val_fraction": config.val_fraction}
    about["python"] = platform.python_version()
    try:
        write_json(temp / MANIFEST, about | _make(config, temp, log, workers))
        commit_folder(temp, final)
        (final / PROGRESS_FILE).unlink(missing_ok=True)  # after the commit, since a kill may come in between
    finally:
        if not (temp / PROGRESS_FILE).is_file():  # no shard was finished
            shutil.rmtree(temp, ignore_errors=True)


def _make(config: DataConfig, temp: Path, log: Log, workers: int | None) -> dict[str, Any]:
    """Fills the folder and returns the manifest entries about it."""
    source = locate(config)
    how = {"tokenizer": _tokenizer(config, source), "val_fraction": config.val_fraction, "folder": temp, "log": log}
    if isinstance(source, Corpus):
        source.fetch(log)
        described: dict[str, Any] = {}
        if source.files is not None:
            part = "of its documents" if source.split_by == "document" else "of it, at its end"
            described = _describe(source.files, f"{config.val_fraction:g} {part}")
            if sum(map(len, described["files"].values())) > 1:
                log(f"{source.name}: {described['chosen']}")
            if warning := repetition(source.files):
                log(f"{source.name}: warning: {warning}")
        described |= source.about
        return {"shard_folder": None} | described | tokenize(source, **how, workers=workers)
    if isinstance(source, ShardCorpus):
        paths = source.fetch(log)
        files = split_files(paths[0].parent, paths)
    else:
        files = choose_shards(source, config.splits)
    made = index_shards(files, vocab_size=vocab_size(config), **how, bare_dtype=config.token_dtype)
    if made["skipped"] and config.on_corrupt == "fail":
        raise _refusal(made["skipped"], "")
    entries = [entry for counts in made["splits"].values() for entry in counts["shards"]]
    resolved = resolve_splits(files, [files.root / entry["name"] for entry in entries])
    described = _describe(resolved, f"{config.val_fraction:g} of it, at its end")
    log(f"{files.root.name}: {described['chosen']}")
    if config.token_dtype is not None:
        described["token_dtype"] = config.token_dtype
    return {"shard_folder": str(files.root.resolve())} | described | made


def _describe(files: SplitFiles, val_fraction: str) -> dict[str, Any]:
    """Returns the manifest entries about the files of the splits; `val_fraction` says how val is made of train."""
    ignored = [files.name(path) for path in files.ignored]
    names = files.names() | ({"not read": ignored} if ignored else {})
    return {"files": names, "chosen": files.describe(val_fraction)}


def _refusal(skipped: Sequence[dict[str, str]], hint: str) -> ConfigError:
    reasons = ", ".join(f"{entry['name']} {entry['reason']}" for entry in skipped)
    return ConfigError(f"{len(skipped)} corrupt shards, and data.on_corrupt is fail: {reasons}{hint}")
