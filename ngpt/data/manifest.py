"""Reads the folder of a prepared corpus: its manifest, and what the manifest says about files, which is checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.config.base import ConfigError
from ngpt.data.prepare import TOKEN_BYTES_FILE
from ngpt.data.tokens.checksums import shard_crc
from ngpt.data.tokens.formats import KNOWN_WITHOUT_RECORD
from ngpt.data.tokens.shards import CorruptShardError, read_shard, token_crc

FORMAT = 1  # of the prepared folder; increase it when the same corpus gives other tokens
MANIFEST = "manifest.json"


def is_prepared(path: Path) -> bool:
    """Whether a folder holds a prepared corpus."""
    return (path / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a prepared folder; ConfigError if this version cannot read it."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "splits" not in manifest:
        raise ConfigError(f"{path} is not the manifest of a corpus that this version prepared")
    return manifest


def open_shard(path: Path, entry: dict[str, Any], folder: Path, *, bare_dtype: str | None, recheck: bool) -> np.ndarray:
    """Checks a shard against the manifest and returns the part of its tokens that is in the split."""
    shard = read_shard(path, bare_dtype)
    same_format = shard.format == entry["format"] if "format" in entry else shard.format in KNOWN_WITHOUT_RECORD
    same_size = same_format and path.stat().st_size == entry["size"]
    if not same_size or shard_crc(path, bare_dtype=bare_dtype, recheck=recheck) != entry["crc32"]:
        raise CorruptShardError(path, f"differs from the manifest; remove {folder} to prepare it again")
    return np.asarray(shard.tokens)[entry["first"] : entry["first"] + entry["tokens"]]


def open_token_bytes(folder: Path, manifest: dict[str, Any]) -> np.ndarray | None:
    """Returns the bytes of each token, (V,) int64; None where they are unknown. CorruptShardError if they changed."""
    if manifest["token_bytes_crc32"] is None:
        return None
    path = folder / TOKEN_BYTES_FILE
    sizes = np.load(path)
    if token_crc(sizes) != manifest["token_bytes_crc32"]:
        raise CorruptShardError(path, f"differs from the manifest; remove {folder} to prepare it again")
    return sizes.astype(np.int64)
