"""Checkpoint folders, committed atomically and verified by SHA-256. A run keeps the last few and the best.

    checkpoints/step_0001000/   model.safetensors  state.pt  MANIFEST.json  tokenizer.model (if there is one)

Ranks that have parts of a model write these instead, into files of their own (ngpt/distributed/shards.py):

    checkpoints/step_0001000/   model/shard-*.safetensors  optimizer/shard-*.safetensors  state.pt  ...

A crash can truncate any file, and `torch.load` misses a flipped bit. So a folder is written under a temporary name,
synced and then renamed, and it is only loaded if all digests match its manifest. Of a checkpoint that no run needs to
continue from, `state.pt` and `optimizer/` can be pruned; the empty file `state.pt.pruned` then takes their place.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ngpt.config.base import Config, ConfigError, runtime_setting
from ngpt.distributed.ranks import ALONE, ProcessRanks, Ranks
from ngpt.distributed.replica import Replica
from ngpt.distributed.shards import read_whole, shard_layout, write_shards
from ngpt.system.atomic_files import commit_folder, make_folder, naming, read_regular, remove_folder

FORMAT, SHARDED_FORMAT = 1, 2
WEIGHTS = "model.safetensors"
STATE = "state.pt"  # optimizer moments and progress, from which a run continues
WEIGHT_SHARDS, MOMENT_SHARDS = "model", "optimizer"  # folders, in the sharded format
PRUNED = f"{STATE}.pruned"
log = logging.getLogger(__name__)


class Loadable(Protocol):
    """A module, or a rank's part of one, that takes the state dict of the whole module."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor], /) -> object: ...

    def parameters(self) -> Iterable[Tensor]: ...


class CheckpointConfig(Config):
    """How often a run is saved, and how many checkpoints stay on disk."""

    every: Annotated[int, Field(ge=1, le=10**9)] = runtime_setting(1000)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, Field(ge=1, le=10**9)] = runtime_setting(3)
    """Newest checkpoints to keep, besides the one with the lowest validation loss."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder whose files match their digests."""

    path: Path
    step: int
    val_loss: float | None
    identity: dict[str, Any]  # the settings that affect the results, by dotted name
    data: dict[str, Any]  # settings of the corpus and its tokenizer, for evaluation and generation
    weights_sha256: str = ""  # of `model.safetensors`, or of the digests of its shards
    is_pruned: bool = False  # without its state: no run can continue from it
    is_sharded: bool = False  # written by several ranks, each of which had a part of the model


def save_checkpoint(
    root: Path,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    step: int,
    val_loss: float | None,
    identity: Mapping[str, Any],
    keep_last: int,
    data: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    ranks: Ranks = ALONE,
    moments: Mapping[str, Tensor] | None = None,
) -> Path:
    """Commits `root/step_N`, then removes all checkpoints but the last `keep_last` and the best.

    `weights` is the state dict of the model, `state` (plain data and tensors) is for resuming; `data` and `files`, by
    name, are for evaluation and generation. If several `ranks` have parts of weights and `moments`, each calls this and
    writes its own; the first commits the folder once all have.
    Raises OSError if the disk is full or the step has been saved before; older checkpoints are then unchanged.
    """
    final = root / f"step_{step:07d}"
    temp = ranks.together(lambda: _new_folder(root) if ranks.is_first else root)[0]

    def commit(written: list[dict[str, Any]]) -> None:
        """Writes state, files and manifest beside the tensors, and gives the folder its final name."""
        digests = {name: digest for each in written for name, digest in each.items()}
        if unseen := [name for name in digests if not (temp / name).is_file()]:
            raise OSError(errno.ENOENT, "written by another rank, but not seen by the first", str(temp / unseen[0]))
        # Given a path, torch reports a full disk as a RuntimeError. The buffer joins its writes of a few kilobytes.
        with (temp / STATE).open("wb", buffering=1 << 20) as file:
            torch.save(dict(state), file)
        for name, content in (files or {}).items():
            (temp / name).write_bytes(content)
        digests |= {path.name: _digest(path) for path in temp.iterdir() if path.is_file()}
        manifest = {
            "format": FORMAT if ranks.count == 1 else SHARDED_FORMAT,
            "step": step,
            "val_loss": val_loss,
            "identity": identity,
            "data": dict(data or {}),
            "files": dict(sorted(digests.items())),
        }
        (temp / "MANIFEST.json").write_text(_manifest_text(manifest | {"sha256": _manifest_digest(manifest)}))
        commit_folder(temp, final)

    try:
        with naming(final):
            written = ranks.together(lambda: _write_tensors(temp, weights, moments or {}, ranks))
            ranks.together(lambda: commit(written) if ranks.is_first else None)
    finally:
        if ranks.is_first:
            shutil.rmtree(temp, ignore_errors=True)
    if ranks.is_first:
        _remove_old(root, keep_last)
    return final


def _new_folder(root: Path) -> Path:
    _remove_leftovers(root)
    make_folder(root)
    temp = root / f".tmp-{uuid.uuid4().hex}"
    temp.mkdir()
    return temp


def _write_tensors(
    folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Any]:
    """Writes the tensors of this rank; returns the digests of its shards."""
    if not isinstance(ranks, ProcessRanks):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
        return {}
    parts = {WEIGHT_SHARDS: weights, MOMENT_SHARDS: moments}
    paths = [path for name, tensors in parts.items() for path in write_shards(folder / name, tensors, ranks)]
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Returns the newest intact checkpoint under `root`, or None. Only the process that trains there may call this.

    Damaged checkpoints are renamed to `damaged-...`, and leftovers of killed processes are removed. Raises ConfigError
    if the newest intact checkpoint has an unknown format.
    """
    _remove_leftovers(root)
    for path in reversed(checkpoint_folders(root)):
        try:
            return verify_checkpoint(path)
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            _set_aside(path, error)
    return None


def checkpoint_folders(root: Path) -> list[Path]:
    """Returns the checkpoint folders under `root`, oldest first, without verifying them."""
    steps = {path: path.name.removeprefix("step_") for path in root.glob("step_*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def verify_checkpoint(path: Path) -> Checkpoint:
    """Checks every file against the manifest; OSError or ValueError if one is bad, ConfigError for another format."""
    manifest = read_manifest(path)
    if manifest["format"] not in (FORMAT, SHARDED_FORMAT):
        known = f"{FORMAT} and {SHARDED_FORMAT}"
        raise ConfigError(f"{path}: checkpoint format {manifest['format']!r}, this version reads {known}")
    is_pruned, files = not os.path.lexists(path / STATE) and is_regular(path / PRUNED), manifest["files"]
    for name, digest in files.items():
        if not _is_own_file(name):
            raise ValueError(f"{path}: its manifest names a file of another folder")
        if is_pruned and _is_state(name):
            continue
        if _digest(path / name) != digest:
            raise ValueError(f"{path / name}: size or SHA-256 differs from the manifest")
    for shard in shard_files(path):  # all that are there would be read
        if shard.relative_to(path).as_posix() not in files:
            raise ValueError(f"{shard}: not in the manifest")
    is_sharded = manifest["format"] == SHARDED_FORMAT
    shards = {name: digest for name, digest in files.items() if name.startswith(f"{WEIGHT_SHARDS}/")}
    weights = _manifest_digest(shards) if is_sharded else files[WEIGHTS]["sha256"]
    facts = manifest["step"], manifest["val_loss"], manifest["identity"], manifest.get("data", {})
    return Checkpoint(path, *facts, weights, is_pruned, is_sharded)


def _is_own_file(name: str) -> bool:
    parts = name.split("/")
    return Path(name).name == name or (
        len(parts) == 2 and parts[0] in (WEIGHT_SHARDS, MOMENT_SHARDS) and Path(parts[1]).name == parts[1]
    )


def _is_state(name: str) -> bool:
    """Whether a file of a checkpoint only serves to continue the run."""
    return name == STATE or name.startswith(f"{MOMENT_SHARDS}/")


def shard_files(path: Path, *folders: str) -> list[Path]:
    """The files in the folders of shards of a checkpoint; none in one that is a link."""
    folders = folders or (WEIGHT_SHARDS, MOMENT_SHARDS)
    return [shard for name in folders if not (path / name).is_symlink() for shard in sorted((path / name).glob("*"))]


def check_has_state(checkpoint: Checkpoint) -> None:
    """Raises ConfigError if the state of a checkpoint was pruned, so that no run can continue from it."""
    if checkpoint.is_pruned:
        hint = f"to train its weights further, start a new run with --init-from {checkpoint.path}"
        raise ConfigError(f"{checkpoint.path}: its optimizer state was pruned, so no run can continue from it; {hint}")


def load_checkpoint(
    checkpoint: Checkpoint, model: "Loadable", *, identity: Mapping[str, Any], leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Loads the weights into `model` and returns the saved state.

    Raises ConfigError if the saved identity differs, or if the state was pruned.
    """
    check_has_state(checkpoint)
    check_identity(checkpoint, identity, leave_out=leave_out)
    if checkpoint.is_sharded and isinstance(model, Replica):
        model.load_shards(checkpoint.path / WEIGHT_SHARDS)
    else:
        model.load_state_dict(read_weights(checkpoint))
    device = next(iter(model.parameters())).device
    return torch.load(checkpoint.path / STATE, weights_only=True, map_location=device)


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Returns the state dict of the whole model, on the CPU; ConfigError if it cannot be read."""
    try:
        if checkpoint.is_sharded:
            return read_whole(checkpoint.path / WEIGHT_SHARDS)
        return safetensors.torch.load_file(checkpoint.path / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise _unreadable(checkpoint, error) from None


def weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights, without reading them; ConfigError if that fails."""
    try:
        if checkpoint.is_sharded:
            layout = shard_layout(checkpoint.path / WEIGHT_SHARDS)
            return {name: tuple(tensor.shape) for name, tensor in layout.items()}
        with safe_open(checkpoint.path / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no dict)
    except (SafetensorError, ValueError) as error:
        raise _unreadable(checkpoint, error) from None


def _unreadable(checkpoint: Checkpoint, error: Exception) -> ConfigError:
    return ConfigError(f"{checkpoint.path}: cannot read {WEIGHT_SHARDS if checkpoint.is_sharded else WEIGHTS}: {error}")


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any], *, leave_out: Collection[str] = ()) -> None:
    """Raises ConfigError if the saved identity differs in anything but the names to leave out."""
    expected = json.loads(json.dumps(identity))
    for name in [*expected, *(checkpoint.identity.keys() - expected.keys())]:
        if name not in leave_out:
            check_setting(checkpoint, name, expected.get(name))


def check_setting(checkpoint: Checkpoint, name: str, value: Any) -> None:
    """Raises ConfigError if a run has another value of a setting than the run that saved the checkpoint."""
    if (saved := checkpoint.identity.get(name)) != value:
        hint = "to train its weights with other settings, start a new run with --init-from"
        raise ConfigError(f"{checkpoint.path} was made with {name} = {saved!r}, this run has {value!r}; {hint}")


def is_regular(path: Path) -> bool:
    """Whether there is a regular file at `path` itself; a link is none."""
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _digest(path: Path) -> dict[str, Any]:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, and a device be read without end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint; OSError or ValueError if it is not there as it was written."""
    text = read_regular(path / "MANIFEST.json").decode()
    try:
        manifest = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path / 'MANIFEST.json'}: nested too deeply") from None
    # The text is compared too: a flipped bit can change the notation of a number but not its value.
    is_unchanged = (
        isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and text == _manifest_text(manifest)
    )
    if not is_unchanged or manifest.pop("sha256", None) != _manifest_digest(manifest):
        raise ValueError(f"{path / 'MANIFEST.json'}: not as it was written")
    return manifest


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, allow_nan=False)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The digest of the manifest itself, since a flipped bit could turn step 300 into step 100."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:6]}")
    path.rename(aside)
    log.warning("checkpoint %s is damaged (%s); set aside as %s", path, error, aside.name)


def _remove_leftovers(root: Path) -> None:
    """Removes the files of a process that was killed while it saved or removed a checkpoint."""
    for stale in root.glob(".tmp-*"):
        try:
            shutil.rmtree(stale)
        except OSError as error:  # the next save tries again
            log.warning("%s cannot be removed: %s", stale, error)


def _remove_old(root: Path, keep_last: int) -> None:
    losses: dict[Path, float | None] = {}
    for path in checkpoint_folders(root):
        try:
            losses[path] = read_manifest(path)["val_loss"]
        except (OSError, ValueError) as error:
            _set_aside(path, error)
    to_keep = set(list(losses)[-keep_last:])
    if scored := [(loss, path) for path, loss in losses.items() if loss is not None]:
        to_keep.add(min(scored)[1])
    for path in losses:
        if path not in to_keep:
            try:
                # The folder is renamed first: under its own name, with some files missing, it would look damaged.
                remove_folder(path, aside_name=f".tmp-{uuid.uuid4().hex}")
            except OSError as error:  # the new checkpoint is saved; the next save tries again
                log.warning("the old checkpoint %s cannot be removed: %s", path, error)
                _remove_leftovers(root)
