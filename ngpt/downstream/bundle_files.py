"""The files of nanochat's bundle for CORE: in a folder, in a .zip, or downloaded once into the cache.

Nothing is unpacked. A file is read from below the bundle only, and up to `MAX_FILE_BYTES`.
"""

import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ngpt.config.base import ConfigError, printable
from ngpt.data.text.documents import read_file
from ngpt.data.text.hub import download, find_file
from ngpt.data.text.progress import Log
from ngpt.system.cache import cache_folder

DOWNLOAD = "download"  # in place of the path of a bundle
SOURCE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # where nanochat downloads it
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"  # of that file
ADVICE = "give a local copy of the bundle, a folder or a .zip, with --bundle PATH (in a campaign `core: PATH`)"
TASKS = "core.yaml"
MAX_FILE_BYTES = 1 << 28  # of one file, unpacked


def downloaded_bundle() -> Path:
    """Where a downloaded bundle is, or would be."""
    return cache_folder() / "downloads" / "core" / SHA256[:12] / SOURCE.rpartition("/")[2]


def fetch_bundle(log: Log) -> Path:
    """Downloads the bundle, unless the cache has it, and returns its path.

    Raises:
        ConfigError: the server cannot be reached, or sends another file than the known one.
    """
    path = downloaded_bundle()
    if not path.exists():
        found = find_file(SOURCE, sha256=SHA256, hint=ADVICE)
        download([found], path.parent, name="bundle of CORE", log=log, hint=ADVICE)
    return path


class BundleFiles:
    """The files of a bundle, by their paths inside it.

    Raises:
        ConfigError: there is nothing at `path`, or neither a folder nor a .zip; later, a file is missing, too large,
            damaged, or not text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive: zipfile.ZipFile | None = None
        self._prefix = ""
        if not path.exists():
            raise ConfigError(f"no such bundle: {path}; `{DOWNLOAD}` in place of a path downloads nanochat's")
        if path.is_file():
            try:
                self._archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile:
                raise ConfigError(f"{path} is neither a folder nor a .zip") from None
            found = [name for name in self._archive.namelist() if name.rpartition("/")[2] == TASKS]
            self._prefix = min(found, key=len).removesuffix(TASKS) if found else ""
        elif not (path / TASKS).is_file() and (path / "eval_bundle" / TASKS).is_file():
            self._path = path / "eval_bundle"

    def name(self, file: str) -> str:
        """What a message calls a file."""
        return f"{self._path}/{self._prefix}{file}"

    def read(self, file: str) -> str:
        """Returns the text of a file."""
        inside = PurePosixPath(file)
        if inside.is_absolute() or ".." in inside.parts:
            raise ConfigError(f"{self.name(TASKS)} names {printable(file)}, which is not inside the bundle")
        try:
            if self._archive is not None:
                return self._unpacked(self._archive, f"{self._prefix}{file}").decode()
            if not (self._path / file).is_file():
                raise KeyError(file)
            return read_file(self._path / file, max_bytes=MAX_FILE_BYTES).decode()
        except KeyError:
            raise ConfigError(f"{self.name(file)} is missing, so this is no bundle of CORE") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.name(file)} is not UTF-8 text: {error.reason}") from None

    def _unpacked(self, archive: zipfile.ZipFile, name: str) -> bytes:
        """A file of the archive, which gives no more bytes than its directory says."""
        member = archive.getinfo(name)
        if member.file_size > MAX_FILE_BYTES:
            size = f"{member.file_size} bytes, at most {MAX_FILE_BYTES} are read"
            raise ConfigError(f"{self._path}/{name} is too large: {size}")
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # damaged, encrypted, unknown method
            reason = printable(str(error), 200) or type(error).__name__
            raise ConfigError(f"{self._path}/{name} cannot be unpacked: {reason}") from None
