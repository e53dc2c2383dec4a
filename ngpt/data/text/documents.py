"""Chooses and reads local files: plain text, and documents in a column of Parquet, Arrow, JSON, CSV or TSV."""

import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from ngpt.config.base import ConfigError
from ngpt.data.text.delimited import DELIMITERS, read_delimited
from ngpt.data.text.formats import FileFormat, Format, format_of
from ngpt.data.text.json_documents import missing_column, read_json_array, read_json_lines, read_json_object
from ngpt.data.text.streams import (
    BOM,
    MAGIC,
    MAX_DOCUMENT,
    compression_of,
    open_stream,
    read_head,
    too_large,
    utf8_error,
)
from ngpt.data.text.tables import parquet_text_size, read_arrow, read_parquet

COLUMN = "text"
BLOCK = 1 << 22  # characters of a text file in memory at once
MAX_LINE = 2 * MAX_DOCUMENT  # characters; text8, all on one line, has 100 million
COMPRESSION_RATIO = 3  # approximate compression ratio of English
MAX_HASHED_BYTES = 1 << 30  # bytes; larger files are identified by their edges and samples in between
SAMPLE, SAMPLE_EVERY = 1 << 16, 1 << 26  # bytes
DATASET_STATE = "state.json"  # lists the Arrow files of a data set that `datasets` saved
DERIVED_ARROW = "cache-"  # how `datasets` names the results of `map` and `filter` beside the data

READERS: dict[Format, Callable[[Path, str], Iterator[str | None]]] = {
    "parquet": read_parquet,
    "arrow": read_arrow,
    "json_lines": read_json_lines,
    "json_array": read_json_array,
    "json_object": read_json_object,
    "csv": partial(read_delimited, delimiters=DELIMITERS[".csv"]),
    "tsv": partial(read_delimited, delimiters=DELIMITERS[".tsv"]),
}


class Selection(NamedTuple):
    """The files of a corpus: documents, or else text. `left_out` are files beside documents that hold none."""

    documents: list[Path]
    texts: list[Path]
    left_out: list[Path]


def find_files(path: Path) -> list[Path]:
    """Returns the file, or all non-hidden files below a folder, sorted. Raises ConfigError if there are none.

    Links to folders are followed, unless the files there are found without the link.
    """
    if not path.exists():
        raise ConfigError(f"no such file: {path}")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path} is neither a file nor a folder")
    files: list[Path] = []
    folders, links, seen = [path], list[Path](), set[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # a folder keeps its own name beside a link to it
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        for found in sorted(folder.iterdir()):
            if found.name.startswith("."):
                continue
            if found.is_dir():
                (links if found.is_symlink() else folders).append(found)
            elif found.is_file():
                files.append(found)
    if not files:
        raise ConfigError(f"{path} has no files in it")
    return sorted(files)


def refuse_repeated(files: Sequence[Path]) -> None:
    """Raises ConfigError if a file is there twice: under two names, or compressed and not."""
    by_place: dict[object, Path] = {}
    for file in files:
        state = file.stat()
        unpacked = file.with_suffix("") if file.suffix.lower() in MAGIC else file
        for place in ((state.st_dev, state.st_ino), unpacked):
            if (other := by_place.setdefault(place, file)) is not file:
                raise ConfigError(f"{other} and {file} are one text, which would be read twice: remove one of them")


def repeated_files(files: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Returns each file that has the content of an earlier one, with the earlier one. Empty files do not count."""
    by_size: dict[int, list[Path]] = {}
    for file in files:
        by_size.setdefault(file.stat().st_size, []).append(file)
    found, first = list[tuple[Path, Path]](), dict[str, Path]()
    for size, alike in by_size.items():
        for file in alike if size and len(alike) > 1 else ():
            if (earlier := first.setdefault(file_sha256(file), file)) is not file:
                found.append((file, earlier))
    return found


def holds_documents(path: Path) -> bool:
    """Whether the file holds documents, by its name or its content, and is not one text."""
    return format_of(path).kind != "text"


def select_files(files: Sequence[Path], column: str = COLUMN) -> Selection:
    """Tells documents from text among the files of a corpus.

    Files beside documents, such as a README, are left out. JSON objects without the column are files like
    `package.json`: left out beside documents, and text among texts. ConfigError if it is not clear what is meant.
    """
    formats = {file: format_of(file) for file in files}
    documents = [file for file, found in formats.items() if found.by_name or _holds(found, column)]
    if not documents:
        for file, found in formats.items():
            if found.kind != "text" and (found.is_table or len(files) == 1):
                raise missing_column(file, column, sorted(found.columns or ()))
        return Selection([], list(files), [])
    unnamed = {file.suffix.lower(): file for file in documents if not formats[file].by_name}
    for file, found in formats.items():
        if found.kind == "text" and (other := unnamed.get(file.suffix.lower())) is not None:
            raise ConfigError(f"{other} holds documents and {file} text: move them to different folders")
    chosen = _drop_derived(documents)
    return Selection(chosen, [], [file for file in files if file not in set(chosen)])


def read_documents(files: Sequence[Path], column: str = COLUMN, left_out: Counter[str] | None = None) -> Iterator[str]:
    """Yields the non-empty documents of all files; a text file is one document. ConfigError if it is unreadable.

    `left_out` counts the others: `null`, without a text, and `empty`.
    """
    for path in files:
        kind = format_of(path).kind
        texts = iter([_whole_text(path)]) if kind == "text" else READERS[kind](path, column)
        for text in texts:
            if text:
                yield text
            elif left_out is not None:
                left_out["null" if text is None else "empty"] += 1


def text_size(files: Sequence[Path], column: str = COLUMN) -> int:
    """Estimates the bytes of text in the files; of a Parquet file it reads only the footer."""
    return sum(_text_size(file, column) for file in files)


def read_text(path: Path) -> Iterator[str]:
    """Yields a file in large pieces of whole lines, with unchanged line ends and without a byte order mark.

    A line above `MAX_LINE`, which may be the whole of a file, is divided.
    ConfigError if it is not UTF-8, or holds zero bytes as binary files and UTF-16 do.
    """
    with open_stream(path) as stream:
        file = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            while piece := file.read(BLOCK):
                piece += file.readline(MAX_LINE)
                if "\0" in piece:
                    raise ConfigError(f"{path} is not a text file: it has zero bytes in it")
                yield piece
        except UnicodeDecodeError:
            raise utf8_error(path) from None


def _whole_text(path: Path) -> str:
    """A text file as one document."""
    pieces, size = list[str](), 0
    for piece in read_text(path):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_DOCUMENT:
            raise too_large(path)
    return "".join(pieces)


def has_byte_order_mark(path: Path) -> bool:
    """Whether a file starts with U+FEFF, which `read_text` drops."""
    return read_head(path, len(BOM)) == BOM


def read_file(path: Path, *, max_bytes: int | None = None) -> bytes:
    """Reads a file that the user named. Raises ConfigError if it is missing or larger than `max_bytes`."""
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise ConfigError(f"{path} is too large: {size} bytes, at most {max_bytes} are read")
    return path.read_bytes()


def files_identity(path: Path, files: Sequence[Path]) -> str:
    """A hash of a file, or of the names and contents below a folder, from samples above `MAX_HASHED_BYTES`."""
    documents = any(map(holds_documents, files))
    hash_of = _sampled if documents and sum(file.stat().st_size for file in files) > MAX_HASHED_BYTES else file_sha256
    if path.is_file():
        return f"sha256:{hash_of(path)}"
    listed = "\n".join(f"{file.relative_to(path).as_posix()}:{hash_of(file)}" for file in files)
    # A name may hold bytes that are no UTF-8.
    return f"sha256:{hashlib.sha256(listed.encode(errors='surrogateescape')).hexdigest()}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; cached in this process while the file does not change."""
    state = path.stat()
    return _file_sha256(path.resolve(), state.st_size, state.st_mtime_ns)


def edges_crc(path: Path, edge: int) -> tuple[int, int]:
    """CRC32 of the first and last `edge` bytes; cached in this process while the file does not change."""
    state = path.stat()
    return _edges_crc(path.resolve(), state.st_size, state.st_mtime_ns, edge)


@cache
def _file_sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _edges_crc(path: Path, size: int, changed: int, edge: int) -> tuple[int, int]:
    with path.open("rb") as file:
        start = file.read(edge)
        file.seek(max(0, size - edge))
        return zlib.crc32(start), zlib.crc32(file.read(edge))


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}:{edges_crc(path, 1 << 20)}".encode())
    with path.open("rb") as file:
        for at in range(0, size, SAMPLE_EVERY):
            file.seek(at)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _text_size(path: Path, column: str) -> int:
    if format_of(path).kind == "parquet":
        return parquet_text_size(path, column)
    return path.stat().st_size * (1 if compression_of(path) is None else COMPRESSION_RATIO)


def _holds(found: FileFormat, column: str) -> bool:
    """Whether documents were recognised by their content, with the column."""
    return found.kind != "text" and found.has_column(column)


def _drop_derived(documents: Sequence[Path]) -> list[Path]:
    """Leaves out Arrow files that `datasets` keeps beside those of a data set. ConfigError if one of these is missing.

    They hold rows of it once more, as `map` and `filter` returned them.
    """
    arrow = [file for file in documents if format_of(file).kind == "arrow"]
    listed: dict[Path, set[str] | None] = {folder: _data_files(folder) for folder in {file.parent for file in arrow}}
    for folder, names in listed.items():
        if missing := sorted((names or set()) - {file.name for file in arrow if file.parent == folder}):
            raise ConfigError(f"{folder} has no {missing[0]}, which its {DATASET_STATE} names")

    def is_derived(file: Path) -> bool:
        if (names := listed.get(file.parent)) is not None:
            return file.name not in names
        return file.name.startswith(DERIVED_ARROW)

    arrow_files = set(arrow)
    kept = [file for file in documents if file not in arrow_files or not is_derived(file)]
    return kept or list(documents)


def _data_files(folder: Path) -> set[str] | None:
    """The names of the Arrow files of a data set that was saved in `folder`; None if none was."""
    path = folder / DATASET_STATE
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_bytes())
        names = {str(file["filename"]) for file in state["_data_files"]}
    except (ValueError, TypeError, KeyError, RecursionError):  # of another program
        return None
    if state.get("_indices_data_files"):
        raise ConfigError(f"{folder} holds a selection of its rows; save it again with a newer version of datasets")
    return names
