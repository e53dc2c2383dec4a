"""The cache folder for everything that runs share: corpora, downloads, compiled code, measured speeds."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns `$NGPT_CACHE`, or ~/.cache/ngpt if it is not set."""
    return Path(os.environ.get("NGPT_CACHE") or "~/.cache/ngpt").expanduser().absolute()
