"""Reads documents from a column of Parquet and Arrow files, including those that `datasets` saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.data.text.json_documents import SEPARATOR, missing_column
from ngpt.data.text.streams import MAX_DOCUMENT, too_large

ROWS = 1000  # of a Parquet file in memory at once
MAX_UNPACKED = 1 << 28  # bytes of a column in a row group that are unpacked whatever their compression
MAX_RATIO = 1000  # of their compression otherwise; English has 3
ARROW_FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path, column: str) -> Iterator[str | None]:
    """Yields the text of each row; None for a null. ConfigError with the row if it is not UTF-8."""
    with _parquet(path, column) as file, _one_line_errors(path):
        row = 1
        for batch in file.iter_batches(batch_size=_rows_at_once(file, column, path), columns=[column]):
            yield from _texts(batch, column, path, row)
            row += batch.num_rows


def parquet_text_size(path: Path, column: str) -> int:
    """The uncompressed bytes of the column, from the footer of the file."""
    with _parquet(path, column) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        columns = [group.column(index) for group in groups for index in range(group.num_columns)]
        return sum(found.total_uncompressed_size for found in columns if found.path_in_schema == column)


def _rows_at_once(file: Any, column: str, path: Path) -> int:
    """How many rows of a Parquet file fit into memory. ConfigError if a part of the column unpacks to far more."""
    rows = ROWS
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        for found in (group.column(i) for i in range(group.num_columns)):
            packed, size = found.total_compressed_size, found.total_uncompressed_size
            if found.path_in_schema != column or not group.num_rows:
                continue
            if size > group.num_rows * MAX_DOCUMENT or (size > MAX_UNPACKED and size > MAX_RATIO * packed):
                raise ConfigError(f"{path}: {packed:,} bytes of column {column!r} unpack to {size:,}: not a text")
            rows = min(rows, max(1, MAX_DOCUMENT * group.num_rows // max(1, size)))
    return rows


def read_arrow(path: Path, column: str) -> Iterator[str | None]:
    """Yields the text of each row of an Arrow file or stream, like `read_parquet`."""
    import pyarrow
    import pyarrow.ipc

    with _one_line_errors(path), pyarrow.memory_map(str(path)) as source:
        if source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC:
            file = pyarrow.ipc.open_file(source)
            schema, batches = file.schema, (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            source.seek(max(0, source.size() - len(END_OF_STREAM)))
            if source.read() != END_OF_STREAM:  # the reader would take it as whole if it ends between two batches
                raise ConfigError(f"{path} is incomplete: it does not end like an Arrow stream")
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            schema, batches = stream.schema, iter(stream)
        _check_column(schema, column, path)
        row = 1
        for batch in batches:
            yield from _texts(batch, column, path, row)
            row += batch.num_rows


@contextmanager
def _parquet(path: Path, column: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        _check_column(schema, column, path)
        # As a dictionary, a long text that many rows repeat is in memory once.
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=[column])
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is not a Parquet file: {_one_line(error)}") from None
    with file:
        yield file


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {_one_line(error)}") from None


def _check_column(schema: Any, column: str, path: Path) -> None:
    """Raises ConfigError unless the schema has one such column, and it holds text."""
    import pyarrow.types as types

    kinds = [field.type for field in schema if field.name == column]
    parts = column.split(SEPARATOR)
    if not kinds:
        kinds = [field.type for field in schema if field.name == parts[0]]
        for part in parts[1:]:
            structs = [kind for kind in kinds if types.is_struct(kind) and kind.get_field_index(part) >= 0]
            kinds = [struct.field(part).type for struct in structs]
    if not kinds:
        raise missing_column(path, column, [name for field in schema for name in _leaves(field)])
    if len(kinds) > 1:
        raise ConfigError(f"{path} has {len(kinds)} columns {column!r}")
    kind = _stored_type(kinds[0])
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)  # null: all are missing
    if not any(is_one(kind) for is_one in (*texts, types.is_binary, types.is_large_binary, types.is_binary_view)):
        raise ConfigError(f"the column {column!r} of {path} holds {kinds[0]}, not text")


def _stored_type(kind: Any) -> Any:
    import pyarrow

    if isinstance(kind, pyarrow.DictionaryType):
        return _stored_type(kind.value_type)
    return _stored_type(kind.storage_type) if isinstance(kind, pyarrow.BaseExtensionType) else kind


def _leaves(field: Any) -> Iterator[str]:
    import pyarrow.types

    if not pyarrow.types.is_struct(field.type):
        yield field.name
        return
    for index in range(field.type.num_fields):
        yield from (f"{field.name}{SEPARATOR}{name}" for name in _leaves(field.type.field(index)))


def _texts(batch: Any, column: str, path: Path, first_row: int) -> Iterator[str | None]:
    import pyarrow
    import pyarrow.compute

    if column in batch.schema.names:
        values = batch.column(column)
    else:
        name, *parts = column.split(SEPARATOR)
        values = batch.column(name)
        for part in parts:
            # Null where the struct is null; `pyarrow.compute.struct_field`, which type checkers do not know.
            values = pyarrow.compute.call_function("struct_field", [values], pyarrow.compute.StructFieldOptions([part]))
    for index, value in enumerate(values):
        try:
            text = value.as_py()
            if text is not None and len(text) > MAX_DOCUMENT:
                raise too_large(f"{path}, row {first_row + index}")
            yield text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start} of the value"
            raise ConfigError(f"{path}, row {first_row + index} is not UTF-8 text: {reason}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
