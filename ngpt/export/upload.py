"""Uploads an exported folder to the Hugging Face hub, as one commit of exactly the files that were shown before."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, printable
from ngpt.config.secrets import redact

NEEDED = ("config.json", "README.md")  # what every exported folder has, besides weights
WEIGHTS = ".safetensors"
MAIN, MESSAGE = "main", "Upload the model"  # the branch and the message of a commit that names none
MAX_REASON_LENGTH = 300  # characters
LOGIN = "sign in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Upload:
    """Files with their sizes in bytes, the repository of models and its branch that they go to, and the commit."""

    folder: Path
    repository: str
    private: bool
    files: dict[str, int]
    revision: str
    message: str

    @property
    def size(self) -> int:
        return sum(self.files.values())


def plan_upload(
    folder: Path, repository: str, *, private: bool, revision: str = MAIN, message: str = MESSAGE
) -> Upload:
    """Returns what an upload would send; asks nobody.

    Raises ConfigError if it is no exported folder, or no name of a repository.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if strange := next((path for path in found if path.is_symlink() or not path.is_file()), None):
        raise ConfigError(f"{strange} is not a regular file, so this is not a folder that ngpt.export has written")
    files = {path.name: path.stat().st_size for path in found}
    missing = [name for name in NEEDED if name not in files]
    if missing or not any(name.endswith(WEIGHTS) for name in files):
        lacking = ", ".join(missing) or f"weights (*{WEIGHTS})"
        raise ConfigError(f"{folder} is not a folder that ngpt.export has written: it has no {lacking}")
    hub = import_hub()
    try:
        hub.utils.validate_repo_id(repository)
        is_whole = repository.count("/") == 1
    except hub.errors.HFValidationError:
        is_whole = False
    if not is_whole:
        raise ConfigError(f"{printable(repr(repository))} is not the name of a repository: write OWNER/NAME")
    if not re.fullmatch(r"[\w./-]+", revision):
        raise ConfigError(f"{printable(repr(revision))} is not the name of a branch")
    if not message.strip():
        raise ConfigError("the message of the commit is empty")
    return Upload(folder, repository, private, files, revision, message)


def upload(plan: Upload) -> str:
    """Creates the repository and the branch if they do not exist, uploads the files in one commit; returns its address.

    Raises ConfigError in one line if there is no token, or the hub refuses it or cannot be reached.
    """
    hub = import_hub()
    if hub.get_token() is None:
        raise ConfigError(f"there is no token for the hub: {LOGIN}")
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    with _errors_of(plan.repository):
        address = api.create_repo(plan.repository, private=plan.private, exist_ok=True)
        if plan.revision != MAIN and not plan.revision.startswith("refs/"):
            api.create_branch(plan.repository, branch=plan.revision, exist_ok=True)
        operations = [hub.CommitOperationAdd(name, str(plan.folder / name)) for name in plan.files]
        api.create_commit(plan.repository, operations, commit_message=plan.message, revision=plan.revision)
    return str(address) if plan.revision == MAIN else f"{address}/tree/{plan.revision}"


def import_hub() -> Any:
    """Returns the module `huggingface_hub`; ConfigError if it is missing."""
    # Before the import, unless the user has decided: telemetry would ask the hub for a list of AI agents first.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ModuleNotFoundError:
        raise ConfigError("the upload needs huggingface_hub: pip install 'ngpt-campaign[hf]'") from None
    return huggingface_hub


@contextmanager
def _errors_of(repository: str) -> Iterator[None]:
    """Converts the errors of the library and its HTTP client to a one-line ConfigError."""
    try:
        yield
    except Exception as error:  # the library and its HTTP client have no common base class
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise ConfigError(f"the hub does not accept the token: {LOGIN}") from error
        if status == 403:
            owner = repository.partition("/")[0]
            raise ConfigError(f"the token may not write to repositories of {owner}: {LOGIN}") from error
        texts = (str(each) for each in (error, error.__cause__) if each is not None)
        reason = redact(" ".join(" ".join(texts).split())) or type(error).__name__
        raise ConfigError(f"cannot upload to {repository}: {printable(reason, MAX_REASON_LENGTH)}") from error
