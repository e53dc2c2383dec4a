"""Objects under one address of pyarrow's file systems: each is read and replaced as a whole."""

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.fs

from ngpt.config.base import ConfigError, printable
from ngpt.config.secrets import redact
from tune.remote.uri import Uri

PROBE = ".probe"  # starts the keys of objects that are written to try a store
BLOCK = 1 << 20  # bytes per read of a large file
ATOMIC = ("s3", "gcs")  # kinds of file systems where an object appears only once it is complete
REASONS = {
    "NETWORK_CONNECTION": "the server cannot be reached",
    "NO_SUCH_BUCKET": "there is no such bucket",
    "ACCESS_DENIED": "access is denied to these credentials",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown there",
    "INVALID_CLIENT_TOKEN_ID": "the access key is unknown there",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong",
}
TRANSIENT = ("NETWORK_CONNECTION", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "REQUEST_TIMEOUT")


class StoreError(OSError):
    """The store does not do what it is asked; `code` is its own name of the reason, if it gives one."""

    def __init__(self, uri: str, error: Exception) -> None:
        found = re.search(r"AWS Error ([A-Z_]+)", str(error))
        self.code = found[1] if found else ""
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.reason = REASONS.get(self.code) or printable(redact(first), 200)
        super().__init__(f"{uri}: {self.reason}")


class ObjectStore:
    """The objects under `base` of a file system; keys are relative to it. All methods raise StoreError.

    Args:
        uri: names the store in messages; without credentials.
    """

    def __init__(self, filesystem: Any, base: str, uri: str) -> None:
        self._files, self._base, self.uri = filesystem, base.rstrip("/"), uri
        self._is_atomic = filesystem.type_name in ATOMIC

    def read(self, key: str) -> bytes | None:
        """The content of an object; None if there is none."""
        with self._errors():
            try:
                with self._files.open_input_stream(self._path(key)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def write(self, key: str, content: bytes) -> None:
        """Replaces an object."""
        with self._errors(), self._replacing(key) as stream:
            stream.write(content)

    def upload(self, key: str, path: Path) -> None:
        """Replaces an object with the content of a local file; raises FileNotFoundError if the file has gone."""
        with path.open("rb") as file, self._errors(), self._replacing(key) as stream:
            shutil.copyfileobj(file, stream, BLOCK)

    def download(self, key: str, path: Path) -> str | None:
        """Writes an object to a local file and waits until it is on disk; returns its SHA-256, or None without one."""
        with self._errors():
            try:
                stream = self._files.open_input_stream(self._path(key))
            except FileNotFoundError:
                return None
        digest = hashlib.sha256()
        with stream, path.open("wb") as file:
            while block := self._next_block(stream):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def delete(self, key: str) -> None:
        """Removes an object, if it is there."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._files.delete_file(self._path(key))

    def folders(self, key: str) -> list[str]:
        """The names of the folders in a folder."""
        selector = pyarrow.fs.FileSelector(self._path(key), allow_not_found=True)
        with self._errors():
            found = self._files.get_file_info(selector)
        return sorted(info.base_name for info in found if info.type == pyarrow.fs.FileType.Directory)

    def modified(self, key: str) -> datetime | None:
        """When an object was replaced, by the clock of the server; None if there is none."""
        with self._errors():
            return self._files.get_file_info(self._path(key)).mtime

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    def _next_block(self, stream: Any) -> bytes:
        with self._errors():
            return stream.read(BLOCK)

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator[Any]:
        path = self._path(key)
        if self._is_atomic:
            with self._files.open_output_stream(path) as stream:
                yield stream
            return
        self._files.create_dir(path.rpartition("/")[0], recursive=True)
        temp = f"{path}.{uuid.uuid4().hex}.tmp"
        with self._files.open_output_stream(temp) as stream:
            yield stream
        try:
            self._files.move(temp, path)
        except OSError:  # HDFS does not rename onto a file
            self._files.delete_file(path)
            self._files.move(temp, path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except (OSError, pyarrow.ArrowException) as error:
            raise StoreError(self.uri, error) from error


def open_store(uri: Uri) -> ObjectStore:
    """Opens the store at an address; the first object is written by the caller.

    Raises:
        ConfigError: pyarrow cannot read the address, or the bucket does not exist.
        StoreError: the server cannot be reached.
    """
    try:
        filesystem, base = pyarrow.fs.FileSystem.from_uri(uri.text)
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        reason = redact(str(error).replace(uri.text, str(uri)).strip().splitlines()[0])
        raise ConfigError(f"{uri}: {printable(reason, 200)}") from None
    store = ObjectStore(filesystem, base, str(uri))
    bucket = base.partition("/")[0]
    if filesystem.type_name in ATOMIC:
        with store._errors():
            if filesystem.get_file_info(bucket).type == pyarrow.fs.FileType.NotFound:
                raise ConfigError(f"{uri}: there is no bucket {printable(bucket)}: create it, or correct the address")
    return store


def write_problem(store: ObjectStore) -> str | None:
    """Why objects cannot be written to a store, read back and deleted; None if they can. Raises StoreError."""
    key = f"{PROBE}-{uuid.uuid4().hex}"
    store.write(key, key.encode())
    is_back = store.read(key) == key.encode()
    store.delete(key)
    return None if is_back else f"{store.uri} does not give back what was written to it"


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turns what waiting does not mend, such as wrong credentials, into a ConfigError."""
    try:
        yield
    except StoreError as error:
        if error.code and error.code not in TRANSIENT:
            raise ConfigError(str(error)) from None
        raise
