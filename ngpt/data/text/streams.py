"""Opens files as bytes, decompressed: gzip, zstd (with any window), bzip2 and xz, recognised by their first bytes.

A damaged or incomplete file raises `StreamError` with the reason, and never ends early in silence.
"""

import bz2
import codecs
import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from ngpt.config.base import ConfigError

BLOCK = 1 << 20  # bytes
BOM = codecs.BOM_UTF8
MAX_DOCUMENT = 1 << 26  # bytes; a small compressed file may unpack to any size, and a document is in memory at once
MAX_WINDOW_LOG = 31  # as `zstd --long=31` writes; the library's default limit is 27
ZSTD_SKIPPABLE = tuple(bytes([0x50 + index, 0x2A, 0x4D, 0x18]) for index in range(16))  # as pzstd writes
# By suffix: the first bytes of such a file.
MAGIC: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *ZSTD_SKIPPABLE),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",),
}
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)  # gzip and bz2 raise OSErrors


def base_name(path: Path) -> str:
    """The file's name in lower case, without the suffix of a compression."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in MAGIC if name.endswith(suffix)), name)


def compression_of(path: Path) -> str | None:
    """The suffix in `MAGIC` of the file's compression; None if it is not compressed.

    Raises ConfigError if its name ends in a suffix that its content does not have.
    """
    with path.open("rb") as file:
        start = file.read(8)
    found = next((suffix for suffix, magic in MAGIC.items() if start.startswith(magic)), None)
    named = next((suffix for suffix in MAGIC if path.name.lower().endswith(suffix)), None)
    if start and named is not None and found != named:
        raise ConfigError(f"{path} is not compressed as its name says: it does not start like a {named} file")
    return found


@contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading, decompressed. A damaged or incomplete file is a ConfigError."""
    compression = compression_of(path)
    with _open(path, compression) as stream:
        try:
            yield stream
        except ERRORS as error:
            if compression is None or (isinstance(error, OSError) and error.filename is not None):
                raise
            raise ConfigError(f"{path} cannot be decompressed: {' '.join(str(error).split())}") from None


def read_lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yields the lines of a stream. ConfigError for one above `MAX_DOCUMENT`, of which no more than that is read."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT + 1):
        number += 1
        if len(line) > MAX_DOCUMENT:
            raise too_large(f"{path}, line {number}")
        yield line


def too_large(where: object) -> ConfigError:
    """The error for a line, value or file that is too large to be a document."""
    return ConfigError(f"{where} is too large: a document has at most {MAX_DOCUMENT >> 20} MiB")


def read_head(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file, decompressed; fewer if it is shorter."""
    with open_stream(path) as stream:
        return stream.read(size)


def utf8_error(path: Path) -> ConfigError:
    """Says where a file stops to be UTF-8. Reads it again: a text decoder counts from the start of its buffer."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, place = 0, "after decompression" if compression_of(path) else ""
    if read_head(path, 2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return ConfigError(f"{path} is UTF-16 text; convert it to UTF-8")
    with open_stream(path) as stream:
        while True:
            block = stream.read(BLOCK)
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the block before
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = f"{error.reason} at byte {offset - pending + error.start}"
                return ConfigError(f"{path} is not UTF-8 text: {at} {place}".rstrip())
            if not block:
                return ConfigError(f"{path} has changed while it was read")
            offset += len(block)


def _open(path: Path, compression: str | None) -> IO[bytes]:
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if compression == ".bz2":
        return cast(IO[bytes], bz2.open(path))
    if compression == ".xz":
        return cast(IO[bytes], lzma.open(path))
    if compression == ".zst":
        options: Any = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
        return cast(IO[bytes], zstd.open(path, options=options))
    return path.open("rb")
