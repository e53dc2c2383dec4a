"""The cache folder for everything that runs share: corpora, downloads, compiled code, measured speeds."""

import atexit
import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import describe_os_error
from ngpt.system.permissions import PrivateFolder, insecure_content, insecure_part

CACHE_VARIABLE = "NGPT_CACHE"
ADVICE = f"set {CACHE_VARIABLE} to a folder that only you can write"
CODE_FOLDERS = ("compiled", "native")  # filled by ngpt/kernels/compile.py and build.py; never emptied
DEFAULT = "~/.cache/ngpt"
log = logging.getLogger(__name__)
_warned = set[str]()


def cache_folder() -> Path:
    """Returns `$NGPT_CACHE`, or ~/.cache/ngpt if it is not set.

    Raises:
        ConfigError: neither exists, since this user has no home directory.
    """
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(f"there is no home directory for the cache: {ADVICE}") from None


@contextlib.contextmanager
def optional_cache(what: str) -> Iterator[None]:
    """Goes on without a part of the cache that only saves time, if it cannot be read or written; warns once.

    Args:
        what: the content, a plural such as `measured speeds`, for the warning.
    """
    try:
        yield
    except OSError as error:
        warn_once(f"the cache of {what} is not used", f"{describe_os_error(error, cache_folder())}; {ADVICE}")


def warn_once(text: str, details: object) -> None:
    """Logs `text: details` as a warning, if this process has not logged `text` before."""
    if text not in _warned:
        _warned.add(text)
        log.warning("%s: %s", text, details)


def cache_advice(path: str | bytes | os.PathLike[str]) -> str:
    """What to do about a file that cannot be written, for its message: empty unless it belongs to the cache."""
    with contextlib.suppress(ConfigError):
        cache, failed = cache_folder(), Path(os.fsdecode(path)).absolute()
        created = (
            [cache] if os.environ.get(CACHE_VARIABLE) else [cache, cache.parent, cache.parent.parent]
        )  # up to home
        if failed in created or failed.is_relative_to(cache):
            return f"; the cache is {cache}: {ADVICE}"
    return ""


def code_folder(name: str) -> Path:
    """Returns the folder `name` of the cache, for code that this user's processes write, load and run.

    Whoever can write there can run code as this user. So if anybody else can, or this process cannot, the reason is
    logged and a temporary folder for this process alone is returned instead.
    """
    return _code_folder(cache_folder() / name)


def code_folder_problem(folder: Path) -> str | None:
    """Says why code in `folder` of the cache cannot be trusted or written; None if it can. Writes nothing."""
    try:
        if reason := insecure_part(folder, with_contents=True) or insecure_content(folder):
            return reason
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable"


@functools.cache
def _code_folder(folder: Path) -> Path:
    reason = code_folder_problem(folder)
    if reason is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            reason = code_folder_problem(folder)  # somebody else may have made it meanwhile
        except OSError as error:
            reason = f"{error.filename or folder}: {error.strerror}"
    if reason is None:
        return folder
    temporary = PrivateFolder(Path(tempfile.gettempdir()))
    atexit.register(temporary.remove)
    log.warning("%s: compiled code is not kept; %s", reason, ADVICE)
    return temporary.path
