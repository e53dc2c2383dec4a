"""Checkpoint folders, committed atomically and verified by SHA-256. A run keeps the last few and the best.

    checkpoints/step_0001000/   model.safetensors  state.pt  MANIFEST.json  tokenizer.model (if there is one)

A crash can truncate any file, and `torch.load` misses a flipped bit. So a folder is written under a temporary name,
synced and then renamed, and it is only loaded if all digests match its manifest.
"""

import errno
import hashlib
import json
import logging
import shutil
import stat
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field
from torch import nn

from ngpt.config.base import Config, ConfigError, runtime_setting
from ngpt.system.atomic_files import commit_folder, make_folder, naming, read_regular, remove_folder

FORMAT = 1
WEIGHTS = "model.safetensors"
log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    """How often a run is saved, and how many checkpoints stay on disk."""

    every: Annotated[int, Field(ge=1, le=10**9)] = runtime_setting(1000)  # steps; the last step is always saved
    keep_last: Annotated[int, Field(ge=1, le=10**9)] = runtime_setting(3)  # and the one with the lowest validation loss


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder whose files match their digests."""

    path: Path
    step: int
    val_loss: float | None
    identity: dict[str, Any]  # the settings that affect the results, by dotted name
    data: dict[str, Any]  # settings of the corpus and its tokenizer, for evaluation and generation
    weights_sha256: str = ""  # of `model.safetensors`


def save_checkpoint(
    root: Path,
    *,
    model: nn.Module,
    state: Mapping[str, Any],
    step: int,
    val_loss: float | None,
    identity: Mapping[str, Any],
    keep_last: int,
    data: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Commits `root/step_N`, then removes all checkpoints but the last `keep_last` and the best.

    `state` (plain data and tensors) is for resuming; `data` and `files`, by name, are for evaluation and generation.
    Raises OSError if the disk is full or the step has been saved before; older checkpoints are then unchanged.
    """
    _remove_leftovers(root)
    final, temp = root / f"step_{step:07d}", root / f".tmp-{uuid.uuid4().hex}"
    make_folder(root)
    temp.mkdir()
    try:
        with naming(final):
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            (temp / WEIGHTS).write_bytes(safetensors.torch.save(weights))
            # Given a path, torch reports a full disk as a RuntimeError. The buffer joins its writes of a few kilobytes.
            with (temp / "state.pt").open("wb", buffering=1 << 20) as file:
                torch.save(dict(state), file)
            for name, content in (files or {}).items():
                (temp / name).write_bytes(content)
            manifest = {
                "format": FORMAT,
                "step": step,
                "val_loss": val_loss,
                "identity": identity,
                "data": dict(data or {}),
                "files": {path.name: _digest(path) for path in sorted(temp.iterdir())},
            }
            (temp / "MANIFEST.json").write_text(_manifest_text(manifest | {"sha256": _manifest_digest(manifest)}))
            commit_folder(temp, final)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    _remove_old(root, keep_last)
    return final


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
    manifest = _read_manifest(path)
    if manifest["format"] != FORMAT:
        raise ConfigError(f"{path}: checkpoint format {manifest['format']!r}, this version reads {FORMAT}")
    for name, digest in manifest["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{path}: its manifest names a file of another folder")
        if _digest(path / name) != digest:
            raise ValueError(f"{path / name}: size or SHA-256 differs from the manifest")
    weights, facts = manifest["files"][WEIGHTS]["sha256"], (manifest["step"], manifest["val_loss"])
    return Checkpoint(path, *facts, manifest["identity"], manifest.get("data", {}), weights)


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, *, identity: Mapping[str, Any], leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Loads the weights into `model` and returns the saved state; raises ConfigError if the saved identity differs."""
    check_identity(checkpoint, identity, leave_out=leave_out)
    model.load_state_dict(safetensors.torch.load_file(checkpoint.path / WEIGHTS))
    device = next(model.parameters()).device
    return torch.load(checkpoint.path / "state.pt", weights_only=True, map_location=device)


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


def _digest(path: Path) -> dict[str, Any]:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, and a device be read without end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
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
            losses[path] = _read_manifest(path)["val_loss"]
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
