"""The named corpora, and local files as a corpus. To add a corpus, write a function and add it to `CORPORA`.

A corpus is a generator of documents or a list of existing shards, with an identity that is known without reading them.
"""

import hashlib
import http.client
import json
import platform
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from ngpt.config.base import ConfigError, printable
from ngpt.data.splits import SplitFiles, split_files
from ngpt.data.text.documents import (
    COLUMN,
    edges_crc,
    files_identity,
    find_files,
    has_byte_order_mark,
    read_documents,
    read_file,
    read_text,
    refuse_repeated,
    repeated_files,
    select_files,
    text_size,
)
from ngpt.data.text.formats import format_of
from ngpt.data.text.hub import HINT, download, list_hub
from ngpt.data.text.hub_datasets import find_dataset
from ngpt.data.text.progress import Log, silent
from ngpt.data.text.python_docs import DOCSTRINGS_FORMAT, python_documents
from ngpt.data.tokens.formats import HEADER_BYTES, MAGIC, NPY_MAGIC, TOKEN_SUFFIXES
from ngpt.data.tokens.gpt2_bpe import VOCAB_SIZE
from ngpt.system.atomic_files import write_json
from ngpt.system.cache import cache_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT = 10  # seconds without a byte
EDGE = 1 << 20  # bytes at each end that identify a shard without CRC

# Tokenized by KellerJordan/modded-nanogpt (data/fineweb.py): 100 million tokens a file, the last one has fewer.
FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103
FINEWEB_BYTES = HEADER_BYTES + 2 * 100_000_000
OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_REVISION = "refs/convert/parquet"  # the hub's own conversion


@dataclass(frozen=True)
class Corpus:
    """Text to prepare."""

    name: str  # for messages and folder names
    identity: str  # equal if and only if the text is equal; cheap to compute
    documents: Callable[[], Iterator[str]]  # the text from its start, without what is held out
    size: Callable[[], int]  # approximate bytes
    # document: by the hash of each document, so that both splits have the same kind of text; position: the end is val.
    split_by: Literal["document", "position"] = "document"
    separated: bool = False  # whether to add the document separator token, or an empty line if there is none
    fetch: Callable[[Log], object] = lambda log: None  # downloads the files that `documents` reads
    files_left_out: Sequence[str] = ()  # files beside the documents
    left_out: Counter[str] = field(default_factory=Counter)  # documents without text by reason, once all were read
    # The text of the splits `val` and `test` if files are named for them; with `val`, all documents are trained on.
    held_out: Mapping[str, Callable[[], Iterator[str]]] = field(default_factory=dict)
    files: SplitFiles | None = None  # the files of a folder
    about: Mapping[str, Any] = field(default_factory=dict)  # for the manifest


@dataclass(frozen=True)
class ShardCorpus:
    """A corpus that is published as shards of tokens."""

    name: str  # for messages and folder names
    identity: str  # the same before and after the download
    tokenizer: str  # as in `data.tokenizer`
    vocab_size: int
    fetch: Callable[[Log], Sequence[Path]]  # the paths of the shards, after downloading missing ones


def python_docs(path: Path | None, shards: int) -> Corpus:
    """The documentation in the running Python, 2 MB; a document is a language topic or the docstrings of a module."""
    _require_one_shard("python-docs", shards)
    if path is not None:
        raise ConfigError("python-docs is read from Python itself: leave out data.path (--from)")
    return Corpus(
        name="python-docs",
        identity=f"python-docs:{DOCSTRINGS_FORMAT}:{platform.python_version()}",
        documents=lambda: iter(python_documents()),
        size=lambda: sum(map(len, python_documents())),
    )


def shakespeare(path: Path | None, shards: int) -> Corpus:
    """Tiny Shakespeare, 1.1 MB, from karpathy/char-rnn or a local copy; split as in nanoGPT."""
    _require_one_shard("shakespeare", shards)
    if path is not None:
        read_file(path)  # raises ConfigError now, rather than when the text is used
    return Corpus(
        name="shakespeare",
        identity=f"sha256:{SHAKESPEARE_SHA256}",
        documents=lambda: iter([_shakespeare_text(path)]),
        split_by="position",
        size=lambda: len(_shakespeare_text(path)),
    )


def fineweb(path: Path | None, shards: int) -> ShardCorpus:
    """FineWeb, 10 billion GPT-2 tokens, from the hub or a local folder: `shards` files of 100 million tokens.

    Another file is the validation split. The identity consists of the file names, so it is known before the download. A
    local folder has the same identity if its files are as long as the published ones, else one from their content.
    """
    if shards > FINEWEB_SHARDS:
        raise ConfigError(f"data.shards {shards}: fineweb has {FINEWEB_SHARDS} training shards")
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in range(1, shards + 1))]
    local = [path / name for name in names] if path is not None else []
    if missing := [file.name for file in local if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{path} has no {missing[0]}{more}, which data.shards {shards} needs")
    whole = all(map(_is_published_fineweb, local))
    return ShardCorpus(
        name="fineweb",
        identity=f"{FINEWEB}:{shards}" if whole else f"shards:{shards_identity(local)}",
        tokenizer="gpt2",
        vocab_size=VOCAB_SIZE,
        fetch=lambda log: local or _fetch_fineweb(names, log),
    )


def openwebtext(path: Path | None, shards: int) -> Corpus:
    """OpenWebText, 8 million web pages: `shards` Parquet files of the hub, 100,000 pages each, or all local files."""
    if path is not None:
        files = find_files(path)
        identity = f"documents:{files_identity(path, files)}"
        return _document_corpus("openwebtext", identity, lambda log: files, chosen=_choose(path, files, "names"))
    return _document_corpus("openwebtext", f"{OPENWEBTEXT}:{shards}", lambda log: _fetch_openwebtext(shards, log))


CORPORA: dict[str, Callable[[Path | None, int], Corpus | ShardCorpus]] = {
    "python-docs": python_docs,
    "shakespeare": shakespeare,
    "fineweb": fineweb,
    "openwebtext": openwebtext,
}


def text_corpus(path: Path, column: str = COLUMN, splits: str = "names") -> Corpus:
    """A corpus from a file or folder: its documents under `column`, else all files as text, without hidden ones.

    `splits` is as in `data.splits`.
    """
    files = find_files(path)
    name = path.resolve().stem
    documents, _, left_out = select_files(files, column)
    if documents:
        identity = f"documents:{files_identity(path, documents)}"
        names = [file.relative_to(path).as_posix() for file in left_out]

        def fetch(log: Log) -> list[Path]:
            log(_describe_documents(name, documents, names))
            return documents

        chosen = _choose(path, documents, splits)
        return _document_corpus(name, identity, fetch, column, files_left_out=names, chosen=chosen)
    if column != COLUMN:
        raise ConfigError(
            f"data.text_column {column} is for documents (Parquet, Arrow, JSON, CSV or TSV), and {path} is text"
        )
    if tokens := [file for file in files if file.suffix.lower() in TOKEN_SUFFIXES]:
        found = f"{len(tokens)} token files, such as {tokens[0]}" if len(tokens) > 1 else f"a token file, {tokens[0]}"
        raise ConfigError(f"{path} would be read as text, but holds {found}; name the folder or file of one of both")
    chosen = _choose(path, files, splits)

    def read(files: Sequence[Path]) -> Iterator[str]:
        return (piece for file in files for piece in read_text(file))

    return Corpus(
        name=name,
        # A text was another one when its byte order mark was part of it.
        identity=("without-bom:" if any(map(has_byte_order_mark, files)) else "") + files_identity(path, files),
        documents=lambda: read(chosen.train),
        split_by="position",
        size=lambda: text_size(files),
        held_out=_held_out(chosen, read),
        files=chosen,
    )


def hub_corpus(uri: str, column: str = COLUMN, splits: str = "names") -> Corpus:
    """A data set of the hub, `hf://OWNER/NAME[@REVISION][/SUBSET][:SPLIT]`. A split that is named is all trained on."""
    found = find_dataset(uri)
    paths = [found.folder / file.name for file in found.files]
    names = dict(zip(paths, found.names, strict=True))
    chosen = split_files(found.folder, paths, mode="fraction" if found.name.split else splits, names=names)
    content = [[file.path, file.sha256 or file.blob_id] for file in found.files]
    identity = f"hub:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"

    def fetch(log: Log) -> list[Path]:
        log(f"{uri}: {found.describe()}")
        return download(found.files, found.folder, name=found.name.dataset, log=log)

    name = found.name.dataset.rpartition("/")[2]
    if not found.is_text:
        return _document_corpus(name, identity, fetch, column, chosen=chosen, about={"hub": found.about})
    if column != COLUMN:
        raise ConfigError(
            f"data.text_column {column} is for documents (Parquet, Arrow, JSON, CSV or TSV), and {uri} is text"
        )

    def read(files: Sequence[Path]) -> Iterator[str]:
        for file in files:
            if format_of(file).kind != "text":
                raise ConfigError(f"{uri}: {file} is named as a text and holds documents; download it, and rename it")
            yield from read_text(file)

    return Corpus(
        name=name,
        identity=identity,
        documents=lambda: read(chosen.train),
        split_by="position",
        size=lambda: text_size(paths),
        fetch=fetch,
        held_out=_held_out(chosen, read),
        files=chosen,
        about={"hub": found.about},
    )


def repetition(files: SplitFiles) -> str | None:
    """Says which files repeat others, for instance as copies; None if there are none."""
    if not (found := repeated_files([*files.train, *files.val, *files.test])):
        return None
    file, earlier = map(files.name, found[0])
    repeats = f"{file} repeats the text of {earlier}"
    more = f", as {len(found) - 1} more files do" if len(found) > 1 else ""
    return f"{repeats}{more}: what is trained on may be in val too"


def shards_identity(paths: Sequence[Path], root: Path | None = None) -> list[list[Any]]:
    """Returns names below `root`, sizes and headers, and checksums of both ends of shards without a CRC."""
    identity = []
    for path in paths:
        name = path.relative_to(root).as_posix() if root else path.name
        if not path.is_file():  # a dangling link, reported when the shards are verified
            identity.append([name])
            continue
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
        has_crc = len(start) == HEADER_BYTES and any(start[20:24]) and not start.startswith(NPY_MAGIC)
        edges = [] if has_crc else edges_crc(path, EDGE)
        identity.append([name, path.stat().st_size, start[:24].hex(), *edges])
    return identity


def _choose(path: Path, files: Sequence[Path], splits: str) -> SplitFiles:
    """Assigns the files of a folder to splits. A file that is named itself is taken whatever its name says."""
    refuse_repeated(files)
    return split_files(path, files, mode=splits) if path.is_dir() else split_files(path.parent, files, mode="fraction")


def _held_out(
    chosen: SplitFiles, read: Callable[[Sequence[Path]], Iterator[str]]
) -> dict[str, Callable[[], Iterator[str]]]:
    held_out = {"val": chosen.val, "test": chosen.test}
    return {split: partial(read, files) for split, files in held_out.items() if files}


def _document_corpus(
    name: str,
    identity: str,
    fetch: Callable[[Log], list[Path]],
    column: str = COLUMN,
    *,
    files_left_out: Sequence[str] = (),
    chosen: SplitFiles | None = None,
    about: Mapping[str, Any] | None = None,
) -> Corpus:
    """A corpus of files that hold documents, with the splits that local ones are named for."""
    left_out: Counter[str] = Counter()

    def read(files: Sequence[Path]) -> Iterator[str]:
        return read_documents(files, column, left_out)

    def documents() -> Iterator[str]:
        left_out.clear()  # what is held out is read, and counted, afterwards
        return read(chosen.train if chosen else fetch(silent))

    return Corpus(
        name=name,
        identity=identity if column == COLUMN else f"{identity}:{column}",
        documents=documents,
        size=lambda: text_size(fetch(silent), column),
        separated=True,
        fetch=fetch,
        files_left_out=files_left_out,
        left_out=left_out,
        held_out=_held_out(chosen, read) if chosen else {},
        files=chosen,
        about=about or {},
    )


def _describe_documents(name: str, documents: Sequence[Path], files_left_out: Sequence[str]) -> str:
    """What is read of a folder, in one line."""
    kinds = Counter(format_of(file).kind.replace("_", " ") for file in documents)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    line = f"{name}: documents from {len(documents)} file{'s' * (len(documents) > 1)} ({found})"
    if not files_left_out:
        return line
    shown, more = files_left_out[:3], len(files_left_out) - 3
    return f"{line}; left out: {printable(', '.join(shown))}{f' and {more} more' if more > 0 else ''}"


def _require_one_shard(name: str, shards: int) -> None:
    if shards != 1:
        raise ConfigError(f"data.shards {shards}: {name} does not come in parts; fineweb and openwebtext do")


def _is_published_fineweb(path: Path) -> bool:
    """Whether size and header match the published file. The content is checked when it is opened."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
    last = path.name == f"fineweb_train_{FINEWEB_SHARDS:06d}.bin"
    right_size = HEADER_BYTES < size <= FINEWEB_BYTES if last else size == FINEWEB_BYTES
    return right_size and start == MAGIC.to_bytes(4, "little")


def _fetch_fineweb(names: Sequence[str], log: Log) -> list[Path]:
    folder = cache_folder() / "downloads" / "fineweb"
    paths = [folder / name for name in names]
    if all(path.exists() for path in paths):
        return paths
    listed = {file.path: file for file in list_hub(FINEWEB)}
    if missing := [name for name in names if name not in listed]:
        raise ConfigError(f"the hub's {FINEWEB} has no {missing[0]}; {HINT}")
    return download([listed[name] for name in names], folder, name="fineweb", log=log)


def _fetch_openwebtext(shards: int, log: Log) -> list[Path]:
    """The first files of the hub's list, which is kept so that downloaded files need no network."""
    folder = cache_folder() / "downloads" / "openwebtext"
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
    if path is not None:
        data = read_file(path)
    else:
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT) as response:
                data = response.read()
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise ConfigError(f"cannot download {SHAKESPEARE_URL} ({error}); {HINT}") from error
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        wrong = f"is not tiny Shakespeare: its SHA-256 is not {SHAKESPEARE_SHA256[:12]}..."
        raise ConfigError(f"{path or SHAKESPEARE_URL} {wrong}; a text of your own is a corpus by its path")
    return data.decode()
