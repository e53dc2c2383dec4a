"""The private folder of a private Ray: its sockets, logs, resources and token, where only this user can enter.

Ray itself makes its folders writable by everybody, so that several users can share a cluster. Whoever can write there
can swap the sockets that Ray's processes trust. The folder belongs to the process that starts Ray and outlives Ray.
"""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

from ngpt.config.base import ConfigError, UserError
from ngpt.system.cli import EXIT_IO
from ngpt.system.permissions import PrivateFolder, insecure_part, is_secret, remove_abandoned
from tune.machine.ray_limits import ray_folder_problem, ray_limit_problem, ray_root

TEMPORARY = "r"  # below the private folder: Ray's own folder, which it makes writable by everybody
TOKEN_FILE = "auth_token"  # in the private folder
TOKEN_VARIABLE, TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


class NoRoomForRay(UserError):
    """The temporary folder is full, or cannot be written."""

    exit_code = EXIT_IO


class RayFolder(PrivateFolder):
    """The folder of one private Ray. `token_command` prints the token that the dashboard asks for."""

    def __init__(self, *, report: Callable[[str], object]) -> None:
        """Creates the folder and removes those of killed runs; `report` gets a line if a token has changed.

        Raises:
            ConfigError: others could replace it, or RAY_AUTH_TOKEN_PATH names a file that cannot be read.
            NoRoomForRay: there is no place for it.
        """
        root = safe_root()
        remove_abandoned(root)
        super().__init__(root)
        try:
            self.token_command = provide_token(self.path / TOKEN_FILE, report)
        except BaseException:
            self.remove()
            raise


def safe_root() -> Path:
    """Returns the folder in which Ray's folder is made; raises the errors of `RayFolder` if it is not fit for it."""
    root = ray_root()
    if problem := ray_folder_problem(root):
        raise (ConfigError if insecure_part(root) else NoRoomForRay)(f"Ray's files: {problem}")
    return root


def check_machine(workers: int) -> None:
    """Raises an error, with advice, if a private Ray with `workers` workers cannot start on this machine."""
    safe_root()
    if problem := ray_limit_problem(workers):
        raise ConfigError(problem)


def provide_token(copy: Path, report: Callable[[str], object]) -> str:
    """Writes the token of a private Ray to `copy`; returns the command that prints it.

    It is the user's own, unless others could have read that: then the user gets a new one, or this Ray uses one of its
    own if the user's file cannot be replaced safely. Ray's processes read the copy, so a token that changes later
    leaves a running Ray as it is.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get(TOKEN_VARIABLE):
        write_secret(copy, token)
        return "ray get-auth-token"
    path = _token_path()
    if path and _is_usable(path, report):
        with contextlib.suppress(FileNotFoundError):
            if token := path.read_text().strip():
                write_secret(copy, token)
                return "ray get-auth-token"
    write_secret(copy, secrets.token_hex(32))
    return f"cat {copy}"


def write_secret(path: Path, text: str) -> None:
    """Replaces the content of `path` so that only this user can read it; a link is replaced, not followed."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _token_path() -> Path | None:
    """The file of the user's token; None without a home directory."""
    if given := os.environ.get(TOKEN_PATH_VARIABLE):
        path = Path(given).absolute()
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{TOKEN_PATH_VARIABLE}={given}: {error.strerror}") from None
        return path
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".ray" / TOKEN_FILE
    return None


def _is_usable(path: Path, report: Callable[[str], object]) -> bool:
    """Whether only this user knows the token at `path`, after replacing one that others could have read."""
    own, reason = "this Ray uses a token of its own", ""
    try:
        if path.exists() and path.read_text().strip():
            if is_secret(path):
                return True
            mode = path.stat().st_mode & 0o7777
            reason = insecure_part(path) or f"{path} could be read by other users (mode {mode:04o})"
        else:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        if unsafe := insecure_part(path.parent):
            report(f"{unsafe}: {own} instead of {path}")
            return False
        write_secret(path, secrets.token_hex(32))
    except (OSError, UnicodeError) as error:  # without a token yet, the user is told how to see that of this Ray
        if reason:
            report(f"{reason} and cannot be replaced ({error}): {own}")
        return False
    if reason:
        report(f"{reason}: it has a new token now; restart Ray clusters of yours that use the old one")
    return True
