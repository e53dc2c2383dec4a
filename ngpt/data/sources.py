"""Where text and tokens come from: the named corpora, and files of one's own.

A corpus is a generator of documents, or a list of ready-made shards, and what identifies it without reading them. A
new one is a function and an entry in `CORPORA`.
"""

import hashlib
import http.client
import json
import platform
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ngpt.config.base import ConfigError
from ngpt.data.text.documents import (
    edges_crc,
    files_identity,
    find_files,
    holds_documents,
    read_documents,
    read_file,
    read_text,
    text_size,
)
from ngpt.data.text.hub import HINT, download, downloads_folder, list_hub
from ngpt.data.text.progress import Log, silent
from ngpt.data.text.python_docs import DOCSTRINGS_FORMAT, python_documents
from ngpt.data.tokens.gpt2_bpe import VOCAB_SIZE
from ngpt.data.tokens.shards import HEADER_BYTES, MAGIC
from ngpt.system.atomic_files import write_json

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT = 10  # seconds without a byte
EDGE = 1 << 20  # bytes at either end of a shard without CRC that identify it

# Tokenized by KellerJordan/modded-nanogpt (data/fineweb.py): 100 million tokens a file, the last one has fewer.
FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103
FINEWEB_BYTES = HEADER_BYTES + 2 * 100_000_000
OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_REVISION = "refs/convert/parquet"  # what the hub itself makes of every data set


@dataclass(frozen=True)
class Corpus:
    """Text to prepare.

    Attributes:
        name: for people and folder names.
        identity: the same exactly if the text is the same; cheap.
        documents: yields the text from its start each time it is called.
        split_by: "document" sends whole documents to either split by their hash, so that both hold the same kind of
            text; "position" keeps the order and takes the end of the text for validation.
        size: about how many bytes of text there are.
        separated: whether documents are told apart by the tokenizer's mark, or by an empty line where it has none.
        fetch: downloads what `documents` reads.
    """

    name: str
    identity: str
    documents: Callable[[], Iterator[str]]
    split_by: Literal["document", "position"]
    size: Callable[[], int]
    separated: bool = False
    fetch: Callable[[Log], object] = lambda log: None


@dataclass(frozen=True)
class ShardCorpus:
    """Text that somebody else has tokenized.

    Attributes:
        name: for people and folder names.
        identity: the same before and after the download.
        tokenizer: what it was tokenized with, as in `data.tokenizer`; `vocab_size` is how many tokens that has.
        fetch: the shards, downloaded if they are not there.
    """

    name: str
    identity: str
    tokenizer: str
    vocab_size: int
    fetch: Callable[[Log], Sequence[Path]]


def python_docs(path: Path | None, shards: int) -> Corpus:
    """The documentation inside the running Python: language topics and standard library docstrings. No network.

    One document is one topic, or one module. About 2 MB of technical English.
    """
    _is_whole("python-docs", shards)
    if path is not None:
        raise ConfigError("python-docs is read from Python itself: leave out data.path (--from)")
    return Corpus(
        name="python-docs",
        identity=f"python-docs:{DOCSTRINGS_FORMAT}:{platform.python_version()}",
        documents=lambda: iter(python_documents()),
        split_by="document",
        size=lambda: sum(map(len, python_documents())),
    )


def shakespeare(path: Path | None, shards: int) -> Corpus:
    """Tiny Shakespeare, 1.1 MB, from its home in karpathy/char-rnn or a local copy; split as nanoGPT splits it."""
    _is_whole("shakespeare", shards)
    if path is not None:
        read_file(path)
    return Corpus(
        name="shakespeare",
        identity=f"sha256:{SHAKESPEARE_SHA256}",
        documents=lambda: iter([_shakespeare_text(path)]),
        split_by="position",
        size=lambda: len(_shakespeare_text(path)),
    )


def fineweb(path: Path | None, shards: int) -> ShardCorpus:
    """FineWeb, 10 billion tokens of GPT-2's, from the hub or a local folder: `shards` files of 100 million tokens.

    One more file is the validation split. Files are known by their names, which is why the identity is there before
    them; a local folder has the same one if its files are as long as the published ones. Anything else in it is known
    by its content.

    Raises:
        ConfigError: more shards than there are, or the local folder lacks one.
    """
    if shards > FINEWEB_SHARDS:
        raise ConfigError(f"data.shards {shards}: fineweb has {FINEWEB_SHARDS} training shards")
    numbers = range(1, shards + 1)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in numbers)]
    local = [path / name for name in names] if path is not None else []
    if missing := [file.name for file in local if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{path} has no {missing[0]}{more}, which data.shards {shards} needs")
    published = f"{FINEWEB}:{shards}"
    whole = path is None or all(map(_is_published_fineweb, local))
    return ShardCorpus(
        name="fineweb",
        identity=published if whole else f"shards:{shards_identity(local)}",
        tokenizer="gpt2",
        vocab_size=VOCAB_SIZE,
        fetch=lambda log: local or _fetch_fineweb(names, log),
    )


def openwebtext(path: Path | None, shards: int) -> Corpus:
    """OpenWebText, 8 million web pages, from Parquet, JSON lines or text files of one's own, or from the hub.

    Of the hub's Parquet files the first `shards` are taken, about 100,000 pages each; of local files all.
    """
    if path is not None:
        return _document_corpus("openwebtext", path, find_files(path))
    return Corpus(
        name="openwebtext",
        identity=f"{OPENWEBTEXT}:{shards}",
        documents=lambda: read_documents(_fetch_openwebtext(shards, silent)),
        split_by="document",
        size=lambda: text_size(_fetch_openwebtext(shards, silent)),
        separated=True,
        fetch=lambda log: _fetch_openwebtext(shards, log),
    )


CORPORA: dict[str, Callable[[Path | None, int], Corpus | ShardCorpus]] = {
    "python-docs": python_docs,
    "shakespeare": shakespeare,
    "fineweb": fineweb,
    "openwebtext": openwebtext,
}


def text_corpus(path: Path) -> Corpus:
    """A file, or all files in a folder and its folders (not the hidden ones) one after the other.

    If there is Parquet or are JSON lines, the documents in these are the corpus. Else all files are UTF-8 text.

    Raises:
        ConfigError: the folder has no files.
    """
    files = find_files(path)
    if documents := [file for file in files if holds_documents(file)]:
        return _document_corpus(path.resolve().stem, path, documents)
    return Corpus(
        name=path.resolve().stem,
        identity=files_identity(path, files),
        documents=lambda: (piece for file in files for piece in read_text(file)),
        split_by="position",
        size=lambda: text_size(files),
    )


def shards_identity(paths: Sequence[Path]) -> list[list[Any]]:
    """Names, sizes and headers; of a shard without CRC also its two ends."""
    identity = []
    for path in paths:
        if not path.is_file():  # a link to nowhere, which is reported when the shards are verified
            identity.append([path.name])
            continue
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
        has_crc = len(start) == HEADER_BYTES and any(start[20:24])
        edges = [] if has_crc else edges_crc(path, EDGE)
        identity.append([path.name, path.stat().st_size, start[:24].hex(), *edges])
    return identity


def _document_corpus(name: str, path: Path, files: list[Path]) -> Corpus:
    return Corpus(
        name=name,
        identity=f"documents:{files_identity(path, files)}",
        documents=lambda: read_documents(files),
        split_by="document",
        size=lambda: text_size(files),
        separated=True,
    )


def _is_whole(name: str, shards: int) -> None:
    if shards != 1:
        raise ConfigError(f"data.shards {shards}: {name} does not come in parts; fineweb and openwebtext do")


def _is_published_fineweb(path: Path) -> bool:
    """Whether name, length and header are those of the published file; its content is checked when it is opened."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
    last = path.name == f"fineweb_train_{FINEWEB_SHARDS:06d}.bin"
    right_size = HEADER_BYTES < size <= FINEWEB_BYTES if last else size == FINEWEB_BYTES
    return right_size and start == MAGIC.to_bytes(4, "little")


def _fetch_fineweb(names: Sequence[str], log: Log) -> list[Path]:
    folder = downloads_folder() / "fineweb"
    paths = [folder / name for name in names]
    if all(path.exists() for path in paths):
        return paths
    listed = {file.path: file for file in list_hub(FINEWEB)}
    if missing := [name for name in names if name not in listed]:
        raise ConfigError(f"the hub's {FINEWEB} has no {missing[0]}; {HINT}")
    return download([listed[name] for name in names], folder, name="fineweb", log=log)


def _fetch_openwebtext(shards: int, log: Log) -> list[Path]:
    """The first files in the order in which the hub lists them, which is kept: what is there needs no network."""
    folder = downloads_folder() / "openwebtext"
    listing = folder / "listing.json"
    if listing.exists():
        paths = [folder / name for name in json.loads(listing.read_text(encoding="utf-8"))[:shards]]
        if len(paths) == shards and all(path.exists() for path in paths):
            return paths
    listed = [file for file in list_hub(OPENWEBTEXT, revision=OPENWEBTEXT_REVISION) if file.path.endswith(".parquet")]
    if shards > len(listed):
        raise ConfigError(f"data.shards {shards}: the hub has {len(listed)} Parquet files of openwebtext")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(listing, [file.name for file in listed])
    return download(listed[:shards], folder, name="openwebtext", log=log)


@cache
def _shakespeare_text(path: Path | None) -> str:
    data = _download(SHAKESPEARE_URL) if path is None else read_file(path)
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise ConfigError(
            f"{path or SHAKESPEARE_URL} is not tiny Shakespeare: its SHA-256 is not {SHAKESPEARE_SHA256[:12]}...; "
            "a text of your own is a corpus by its path"
        )
    return data.decode()


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise ConfigError(f"cannot download {url} ({error}); {HINT}") from error
