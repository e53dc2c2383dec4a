"""The folder that keeps what is worth keeping between runs: corpora, downloads, compiled code, measured speeds."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where prepared corpora, downloads and measured speeds are kept."""
    return Path(os.environ.get("NGPT_CACHE") or "~/.cache/ngpt").expanduser().absolute()
