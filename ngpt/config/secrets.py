"""Keeps keys and passwords out of results, logs and trackers, which copy the campaign file and error messages."""

import os
import re
from collections.abc import Iterator, Mapping

from ngpt.config.base import ConfigError

HIDDEN = "***"
MIN_SECRET_LENGTH = 12  # characters; shorter values, such as `disabled`, would match everywhere
ADVICE = "secrets do not belong into a file that is copied into the results; set them in the environment"

# Names of variables and settings whose values are secrets.
_NAME = re.compile(
    r"(?i)(api|access|secret|private|auth|account|encryption)[_-]?key|token|secret|passw(or)?d|credential"
)
_NOT = re.compile(r"(?i)(_path|_file|_dir|_url|tokenizer|tokens?_per|_tokens)$|^tokenizers_|tokens?_per_")
# Formats that providers document, and generic `name: value` pairs.
_SHAPES = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}\b",
    "a W&B key": r"\bwandb_v1_[A-Za-z0-9_]{20,}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/\s:@]+:[^/\s@]+@",
    "a secret by its name": r"(?i)(?:(?:api|access|secret|auth)[_-]?key|auth[_-]?token|hf_token|secret|passw(?:or)?d)"
    r"[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9_/+.-]{12,}",
}
_KNOWN = {what: re.compile(shape) for what, shape in _SHAPES.items()}


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name would hold a secret: `wandb_api_key`, not `eval_tokens`."""
    return bool(_NAME.search(name)) and not _NOT.search(name)


def find_secrets(text: str, environ: Mapping[str, str] = os.environ) -> Iterator[tuple[int, str]]:
    """The positions of secrets in `text`, each with what it is: the value of a variable, or a known format."""
    for name, value in _values(environ).items():
        start = text.find(value)
        if start >= 0:
            yield start, f"the value of ${name}"
    for what, shape in _KNOWN.items():
        if found := shape.search(text):
            yield found.start(), what


def refuse_secrets(text: str, source: str) -> None:
    """Raises ConfigError with the position of each secret in `text`, not its content; `source` is its name there."""
    problems = []
    for start, what in find_secrets(text):
        line, column = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
        problems.append(f"{source}:{line}:{column}: {what}: {ADVICE}")
    if problems:
        raise ConfigError("\n".join(sorted(problems)))


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without the secrets of the environment and everything in the format of a secret."""
    for value in sorted(_values(environ).values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for shape in _KNOWN.values():
        text = shape.sub(HIDDEN, text)
    return text


def _values(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if is_secret_name(name) and len(value) >= MIN_SECRET_LENGTH}
