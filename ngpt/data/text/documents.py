"""Reads local files: plain text, and documents in the column `text` of Parquet or (compressed) JSON lines."""

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError

COLUMN = "text"
PARQUET = ".parquet"
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BLOCK = 1 << 22  # characters of a text file in memory at once
ROWS = 1000  # of a Parquet file in memory at once
COMPRESSION_RATIO = 3  # approximate compression ratio of English
MAX_HASHED_BYTES = 1 << 30  # bytes; larger files are identified by their edges and samples in between
SAMPLE, SAMPLE_EVERY = 1 << 16, 1 << 26  # bytes


def find_files(path: Path) -> list[Path]:
    """Returns the file, or all non-hidden files below a folder, sorted. Raises ConfigError if there are none."""
    if not path.exists():
        raise ConfigError(f"no such file: {path}")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not visible:
        raise ConfigError(f"{path} has no files in it")
    return visible


def holds_documents(path: Path) -> bool:
    """Whether the file has the extension of a Parquet or JSON-lines file."""
    return path.name.lower().endswith((PARQUET, *JSON_LINES))


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """Yields the non-empty documents of all files; a text file is one document. ConfigError if it is unreadable."""
    for path in files:
        if not holds_documents(path):
            texts = iter(["".join(read_text(path))])
        elif path.name.lower().endswith(PARQUET):
            texts = _read_parquet(path)
        else:
            texts = _read_json_lines(path)
        yield from (text for text in texts if text)


def text_size(files: Sequence[Path]) -> int:
    """Estimates the bytes of text in the files; of a Parquet file it reads only the footer."""
    return sum(map(_text_size, files))


def read_text(path: Path) -> Iterator[str]:
    """Yields a file in large pieces of whole lines, with unchanged line ends. ConfigError if it is not UTF-8."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while piece := file.read(BLOCK):
                yield piece + file.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


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
    known_by = _sampled if documents and sum(file.stat().st_size for file in files) > MAX_HASHED_BYTES else file_sha256
    if path.is_file():
        return f"sha256:{known_by(path)}"
    names = [f"{file.relative_to(path).as_posix()}:{known_by(file)}" for file in files]
    return f"sha256:{hashlib.sha256(chr(10).join(names).encode()).hexdigest()}"


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


def _text_size(path: Path) -> int:
    if not path.name.lower().endswith(PARQUET):
        size = path.stat().st_size
        return size if path.suffix.lower() not in (".gz", ".zst") else COMPRESSION_RATIO * size
    with _parquet(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        columns = [group.column(index) for group in groups for index in range(group.num_columns)]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == COLUMN)


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow

    with _parquet(path) as file:
        try:
            for batch in file.iter_batches(batch_size=ROWS, columns=[COLUMN]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {_one_line(error)}") from None


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is not a Parquet file: {_one_line(error)}") from None
    schema = file.schema_arrow
    if COLUMN not in schema.names:
        file.close()
        raise ConfigError(f"{path} has no column {COLUMN!r}; it has {', '.join(schema.names) or 'none'}")
    kind = schema.field(COLUMN).type
    of_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_null)  # null: all are missing
    if not any(is_one(kind) for is_one in of_text):
        file.close()
        raise ConfigError(f"the column {COLUMN!r} of {path} holds {kind}, not text")
    return file


def _read_json_lines(path: Path) -> Iterator[str]:
    import pyarrow

    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    number = 0
    try:
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            for number, line in enumerate(io.BufferedReader(stream), start=1):
                if line.strip():
                    yield _text_of(json.loads(line), path, number)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}, line {number or 1}: {_one_line(error)}") from None


def _text_of(row: Any, path: Path, number: int) -> str:
    if isinstance(row, dict) and COLUMN not in row:
        raise ConfigError(f"{path}, line {number} has no text under {COLUMN!r}; it has {', '.join(row) or 'none'}")
    text = row[COLUMN] if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(text, str):
        raise ConfigError(f"{path}, line {number} has no text under {COLUMN!r}; it is {text!r:.40}")
    text.encode()  # ValueError for an escaped half of a surrogate pair, which is not valid UTF-8
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
