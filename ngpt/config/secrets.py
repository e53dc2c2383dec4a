"""Keeps keys and passwords out of results, logs and trackers, which copy the campaign file and error messages."""

import os
import re
from collections.abc import Iterator, Mapping

from ngpt.config.base import ConfigError

HIDDEN = "***"
MIN_SECRET_LENGTH = 12  # characters; shorter values, such as `disabled`, also occur in ordinary text
ADVICE = "secrets do not belong in a file that is copied into the results; set them in the environment"

# Names of variables and settings whose values are secrets.
_SECRET_NAME = re.compile(
    r"(?i)(api|access|secret|private|auth|account|encryption)[_-]?key|token|secret|passw(or)?d|credential"
)
_NOT_SECRET = re.compile(r"(?i)(_path|_file|_dir|_url|tokenizer|tokens?_per|_tokens)$|^tokenizers_|tokens?_per_")
# Formats that providers document, and generic `name: value` pairs.
_FORMATS = {
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
_PATTERNS = {what: re.compile(pattern) for what, pattern in _FORMATS.items()}


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable with this name holds a secret: `wandb_api_key` does, `eval_tokens` does not."""
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET.search(name)


def find_secrets(text: str, environ: Mapping[str, str] = os.environ) -> Iterator[tuple[int, str]]:
    """Yields the position of each secret in `text` and what it is, such as `a GitHub token`."""
    for name, value in _secret_values(environ).items():
        start = text.find(value)
        if start >= 0:
            yield start, f"the value of ${name}"
    for what, pattern in _PATTERNS.items():
        if found := pattern.search(text):
            yield found.start(), what


def refuse_secrets(text: str, source: str) -> None:
    """Raises ConfigError if `text` has secrets. The message has their positions in `source`, not their content."""
    problems = []
    for start, what in find_secrets(text):
        line, column = text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)
        problems.append(f"{source}:{line}:{column}: {what}: {ADVICE}")
    if problems:
        raise ConfigError("\n".join(sorted(problems)))


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Returns `text` with `***` in place of environment secrets and of everything in a known secret format."""
    for value in sorted(_secret_values(environ).values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS.values():
        text = pattern.sub(HIDDEN, text)
    return text


def _secret_values(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if is_secret_name(name) and len(value) >= MIN_SECRET_LENGTH}
