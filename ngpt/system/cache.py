"""The folder for everything that is kept between runs: corpora, downloads, compiled code, measured speeds."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$NGPT_CACHE`, by default ~/.cache/ngpt."""
    return Path(os.environ.get("NGPT_CACHE") or "~/.cache/ngpt").expanduser().absolute()
