"""Pruning: removes from a checkpoint what only serves to continue its run. The weights stay."""

import os
from pathlib import Path

from ngpt.system.atomic_files import sync
from ngpt.training.checkpoint import (
    MOMENT_SHARDS,
    PRUNED,
    STATE,
    WEIGHT_SHARDS,
    WEIGHTS,
    is_regular,
    read_manifest,
    shard_files,
)


def prunable_bytes(path: Path) -> int:
    """Returns the bytes that `prune_state` would free; 0 if there is no state any more.

    Follows no link. Raises OSError or ValueError if the checkpoint may not be pruned: it is a link or has one in the
    place of a file, its manifest is damaged, or its weights are not as long as the manifest says.
    """
    if path.is_symlink():
        raise ValueError("it is a link")
    moments = shard_files(path, MOMENT_SHARDS)
    if not os.path.lexists(path / STATE) and not moments:
        return 0
    if os.path.lexists(path / PRUNED) and not is_regular(path / PRUNED):
        raise ValueError(f"{PRUNED} is not a regular file")
    is_half_pruned = not os.path.lexists(path / STATE) and is_regular(path / PRUNED)
    _check_regular(path, *([] if is_half_pruned else [STATE]), "MANIFEST.json")
    try:
        files = read_manifest(path)["files"]
        sizes = {name: files[name]["bytes"] for name in files if name.startswith(f"{WEIGHT_SHARDS}/")}
        sizes = sizes or {WEIGHTS: files[WEIGHTS]["bytes"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError("its manifest is damaged") from None
    for name in (WEIGHT_SHARDS, MOMENT_SHARDS):
        if (path / name).is_symlink():
            raise ValueError(f"{name} is a link")
    _check_regular(path, *sizes, *(shard.relative_to(path).as_posix() for shard in moments))
    for name, size in sizes.items():
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} is not as long as its manifest says")
    state = [] if is_half_pruned else [path / STATE]
    return sum(file.stat().st_size for file in (*state, *moments))


def _check_regular(path: Path, *names: str) -> None:
    for name in names:
        if not is_regular(path / name):
            raise ValueError(f"{name} is not a regular file" if os.path.lexists(path / name) else f"{name} is missing")


def prune_state(path: Path) -> None:
    """Removes the optimizer state of a checkpoint that `prunable_bytes` accepts.

    A kill at any moment leaves the whole checkpoint or the pruned one, of which the next call removes the rest. The
    mark is an empty file, which a full disk still takes; the manifest stays as it is.
    """
    (path / PRUNED).touch()
    sync(path / PRUNED)
    sync(path)
    (path / STATE).unlink(missing_ok=True)
    sync(path)
    for shard in shard_files(path, MOMENT_SHARDS):
        shard.unlink()
        sync(path / MOMENT_SHARDS)
