"""Checkpoints: folders that appear whole or not at all, with a digest per file; the last few and the best are kept.

    checkpoints/step_0001000/   model.safetensors  state.pt  MANIFEST.json

`torch.load` does not notice a flipped bit inside a tensor, and a crash can leave any prefix of a file. So a folder is
written under another name, synced and renamed, and nothing is loaded whose digests do not match its manifest.
"""

import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field
from torch import nn

from ngpt.config import Config, ConfigError
from ngpt.durable import commit_folder

FORMAT = 1
log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    every: Annotated[int, Field(ge=1)] = 1000  # steps; the last step is always saved
    keep_last: Annotated[int, Field(ge=1)] = 3  # besides the best by validation loss


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder whose files match their digests."""

    path: Path
    step: int
    val_loss: float | None
    identity: dict[str, Any]  # the settings that decide what was computed, by dotted name


def save_checkpoint(
    root: Path,
    *,
    model: nn.Module,
    state: Mapping[str, Any],
    step: int,
    val_loss: float | None,
    identity: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Commits `root/step_N`, then removes what is neither among the last `keep_last` nor the best.

    `state` is plain data and tensors (what `torch.load(weights_only=True)` accepts).
    """
    final = root / f"step_{step:07d}"
    temp = root / f".tmp-{uuid.uuid4().hex}"
    temp.mkdir(parents=True)
    try:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        (temp / "model.safetensors").write_bytes(safetensors.torch.save(weights))
        # An open file, not a path: only then does a full disk show as OSError.
        with (temp / "state.pt").open("wb") as file:
            torch.save(dict(state), file)
        files = {path.name: _digest(path) for path in sorted(temp.iterdir())}
        manifest = {
            "format": FORMAT,
            "step": step,
            "val_loss": val_loss,
            "identity": identity,
            "files": files,
        }
        (temp / "MANIFEST.json").write_text(json.dumps(manifest, indent=1, allow_nan=False))
        if final.exists():  # a resumed run may come past the same step again
            shutil.rmtree(final)
        commit_folder(temp, final)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    _retain(root, keep_last)
    return final


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root` that verifies. A damaged one is renamed to `damaged-...` and passed over."""
    for path in sorted(root.glob("step_*"), reverse=True):
        try:
            return verify_checkpoint(path)
        except (OSError, ValueError) as error:
            aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:6]}")
            path.rename(aside)
            log.warning("checkpoint %s is damaged (%s); set aside as %s", path, error, aside.name)
    return None


def verify_checkpoint(path: Path) -> Checkpoint:
    """Checks every file against the manifest.

    Raises:
        OSError, ValueError: a file is missing, of another size, has another digest, or is of an unknown format.
    """
    manifest = json.loads((path / "MANIFEST.json").read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}")
    for name, digest in manifest["files"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{path / name}: size or SHA-256 differs from the manifest")
    return Checkpoint(path, manifest["step"], manifest["val_loss"], manifest["identity"])


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, *, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Loads the weights into `model` and returns the state that was saved with them.

    Raises:
        ConfigError: the checkpoint was made with other settings; names the first that differs.
    """
    for name, value in json.loads(json.dumps(identity)).items():
        if checkpoint.identity.get(name) != value:
            saved = checkpoint.identity.get(name)
            raise ConfigError(f"{checkpoint.path} was made with {name} = {saved!r}, this run has {value!r}")
    model.load_state_dict(safetensors.torch.load_file(checkpoint.path / "model.safetensors"))
    device = next(model.parameters()).device
    return torch.load(checkpoint.path / "state.pt", weights_only=True, map_location=device)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _retain(root: Path, keep_last: int) -> None:
    found = []
    for path in sorted(root.glob("step_*")):
        found.append((path, json.loads((path / "MANIFEST.json").read_text())["val_loss"]))
    scored = [(loss, path) for path, loss in found if loss is not None]
    kept = {path for path, _ in found[-keep_last:]} | ({min(scored)[1]} if scored else set())
    for path, _ in found:
        if path not in kept:
            shutil.rmtree(path)
