"""Loads a model, its settings and its tokenizer from a checkpoint folder, which is self-contained."""

import argparse
import contextlib
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, build, override
from ngpt.config.yaml_reader import parse_assignment
from ngpt.data.tokens.tokenizer import MODEL_FILE, MODEL_FILES, Tokenizer, load_tokenizer, parse_spec, with_path
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.plugins.records import remember_plugins
from ngpt.system.cli import add_plugin_option, add_set_option
from ngpt.system.device import DEVICES, DTYPES, pick_device
from ngpt.training.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    read_weights,
    verify_checkpoint,
    weight_shapes,
)

log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model in evaluation mode, its tokenizer (None if the checkpoint has none) and the checkpoint."""

    model: GPT
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint


def load_model(
    path: str | Path, *, best: bool = False, tokenizer: str | None = None, device: str = "cpu", **changes: Any
) -> LoadedModel:
    """Loads a model from safetensors, without unpickling anything.

    Raises ConfigError if there is no intact checkpoint, if a setting is unknown or does not fit the weights, or if the
    tokenizer is not available or not the one that the model was trained with.

    Args:
        path: a checkpoint (`step_...`), or the folder of a run or trial, which means its newest intact checkpoint.
        best: use the checkpoint with the lowest validation loss instead.
        tokenizer: spec of a tokenizer to use instead of the checkpoint's own.
        changes: model settings to change, such as `rope_scaling="yarn", rope_factor=4.0, block_size=512`.
    """
    checkpoint = find_checkpoint(Path(path), best=best)
    model = build_model(checkpoint, device=device, **changes)
    return LoadedModel(model, checkpoint_tokenizer(checkpoint, tokenizer), checkpoint)


def find_checkpoint(path: Path, *, best: bool = False) -> Checkpoint:
    """Finds the checkpoint at `path`, or the newest (or best) intact one under it, without changing any file."""
    if not path.is_dir():
        raise ConfigError(f"{path}: {'a file, give the folder that it is in' if path.exists() else 'no such folder'}")
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    is_checkpoint = (path / "MANIFEST.json").is_file() or path in checkpoint_folders(path.parent)
    folders = [path] if is_checkpoint else checkpoint_folders(root)
    if not folders:
        trials = sorted((path / "trials").glob("*"))
        which = "its trial" if len(trials) == 1 else f"one of its {len(trials)} trials, such as"
        hint = f"; give {which} {trials[0]}" if trials else ""
        raise ConfigError(f"{path} has no checkpoints{hint}")
    intact: list[Checkpoint] = []
    errors: list[Exception] = []
    for folder in reversed(folders):
        try:
            intact.append(verify_checkpoint(folder))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            errors.append(error)
        if intact and not best:
            break
    if not intact:
        raise ConfigError(f"{path} has no intact checkpoint: {errors[0]}")
    if errors:
        log.warning("skipped a damaged checkpoint: %s", errors[0])
    scored = [(checkpoint.val_loss, checkpoint) for checkpoint in intact if checkpoint.val_loss is not None]
    if best and not scored:
        raise ConfigError(f"{path} has no checkpoint with a validation loss")
    found = min(scored, key=lambda pair: pair[0])[1] if best else intact[0]
    remember_plugins(found.data.get("plugins"), path)
    return found


def build_model(checkpoint: Checkpoint, *, device: str = "cpu", **changes: Any) -> GPT:
    """Builds the model of a checkpoint, in evaluation mode. Arguments and errors are as in `load_model`."""
    identity = checkpoint.identity
    settings = {name.removeprefix("model."): value for name, value in identity.items() if name.startswith("model.")}
    if "vocab_size" not in settings:
        raise ConfigError(f"{checkpoint.path} does not hold the settings of its model")
    changed = {name.removeprefix("model."): value for name, value in changes.items()}
    model = GPT(override(build(ModelConfig, settings), changed))
    _check_shapes(model, weight_shapes(checkpoint), checkpoint.path, changes)
    model.load_state_dict(read_weights(checkpoint))
    # Scheduled values are those of the last training step. A converted model has not been trained here.
    model.prepare_step(max(0, checkpoint.step - 1), identity.get("steps", 1), seed=identity.get("seed", 0))
    return model.to(pick_device(device)).eval()


@functools.cache
def weights_digest(path: str) -> str:
    """Returns the SHA-256 of the weights that `init_from` means now. A process looks once, so that they stay the same.

    Raises ConfigError if there is no intact checkpoint.
    """
    return find_checkpoint(Path(path).expanduser()).weights_sha256


def check_initial_weights(config: ModelConfig, path: str, sha256: str | None) -> None:
    """Raises ConfigError if the weights at `path`, see `load_initial_weights`, do not exist or fit a model."""
    checkpoint = _find_weights(Path(path).expanduser(), sha256)
    with torch.device("meta"):  # shapes only
        model = GPT(config)
    _check_shapes(model, weight_shapes(checkpoint), checkpoint.path, {})


def load_initial_weights(model: GPT, path: str, sha256: str | None, tokenizer: Mapping[str, Any]) -> None:
    """Loads the weights at `path` into the model of a new run: the newest ones, or those with this digest.

    Raises ConfigError if they do not exist, do not fit the model, or belong to another tokenizer (a manifest's entry).
    """
    checkpoint = _find_weights(Path(path).expanduser(), sha256)
    hashes = {tokenizer_origin(checkpoint).sha256, tokenizer["sha256"]} - {None}
    if len(hashes) > 1:
        text = f"was trained with another {tokenizer_origin(checkpoint).spec} than the {tokenizer['spec']} of the data"
        raise ConfigError(f"init_from: {checkpoint.path} {text}")
    weights = read_weights(checkpoint)
    _check_shapes(model, _shapes(weights), checkpoint.path, {})
    model.load_state_dict(weights)


def _find_weights(path: Path, sha256: str | None) -> Checkpoint:
    """Finds the newest checkpoint at `path`, or the one whose weights have this digest: a run may have gone on."""
    newest = find_checkpoint(path)
    if sha256 in (None, newest.weights_sha256):
        return newest
    for folder in reversed(checkpoint_folders(newest.path.parent)):
        with contextlib.suppress(OSError, ValueError):  # damaged
            if (checkpoint := verify_checkpoint(folder)).weights_sha256 == sha256:
                return checkpoint
    raise ConfigError(f"init_from: {path} has no weights with SHA-256 {sha256}")


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _check_shapes(model: GPT, saved: Mapping[str, tuple[int, ...]], path: Path, changes: Mapping[str, object]) -> None:
    """Raises a ConfigError that names the first weight whose shape differs."""
    expected = _shapes(model.state_dict())
    for name in sorted(expected.keys() | saved.keys()):
        if expected.get(name) != saved.get(name):
            cause = ", ".join(f"{setting}={value}" for setting, value in changes.items()) or "the model"
            shapes = f"{expected.get(name, 'missing')}, in the checkpoint it is {saved.get(name, 'missing')}"
            raise ConfigError(f"{cause} does not fit {path}: {name} would be {shapes}")


class TokenizerOrigin(NamedTuple):
    """Spec and hash of the tokenizer that a model was trained with; None where unknown."""

    spec: str | None
    sha256: str | None


def tokenizer_origin(checkpoint: Checkpoint) -> TokenizerOrigin:
    """Reads the origin of the tokenizer from a checkpoint. Converted checkpoints record the spec only."""
    if (record := checkpoint.data.get("tokenizer")) is None:
        return TokenizerOrigin(checkpoint.identity.get("data.tokenizer"), None)
    # Without a hash, the run trained on shards whose tokenizer is unknown, and the spec is an unused default.
    return TokenizerOrigin(record["spec"] if record["sha256"] else None, record["sha256"])


def saved_tokenizer(checkpoint: Checkpoint) -> str | None:
    """The spec of the tokenizer file in a checkpoint; None if it has none."""
    spec = tokenizer_origin(checkpoint).spec
    kind = parse_spec(spec)[0] if spec else "sentencepiece"
    path = checkpoint.path / MODEL_FILES.get(kind, "")
    if spec is None or not path.is_file():
        return None
    return str(path) if kind == "sentencepiece" else with_path(spec, lambda _: path)


def checkpoint_tokenizer(checkpoint: Checkpoint, spec: str | None = None) -> Tokenizer | None:
    """Loads the tokenizer that `spec` names, or the checkpoint's own; None if the run trained on tokens only."""
    origin, vocab_size = tokenizer_origin(checkpoint), checkpoint.identity["model.vocab_size"]
    if spec is not None:
        tokenizer = load_tokenizer(spec, None)
    else:
        is_missing = (origin.spec or "").startswith("sentencepiece:") and not (checkpoint.path / MODEL_FILE).is_file()
        if origin.spec is None or is_missing:
            return None
        tokenizer = load_tokenizer(origin.spec, checkpoint.path)
    if origin.sha256 not in (None, tokenizer.sha256):
        raise ConfigError(f"{tokenizer.name} is not the tokenizer that {checkpoint.path} was trained with")
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{tokenizer.name} has {tokenizer.vocab_size} tokens, {checkpoint.path} has {vocab_size}")
    return tokenizer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select a model. `parse_model_changes` parses the values of --set."""
    folder = "folder of a checkpoint, or of a run or trial, which means its newest intact checkpoint"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=folder)
    parser.add_argument("--best", action="store_true", help="use the checkpoint with the lowest validation loss")
    add_plugin_option(parser)
    add_set_option(parser, help="change settings of the model, such as rope_scaling=yarn rope_factor=4 block_size=512")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="of matrix products; default: as in training")


def parse_model_changes(assignments: list[str]) -> dict[str, Any]:
    """Parses --set into the `changes` of `load_model`, prefixed with `model.` to avoid clashes with its parameters."""
    settings = dict(map(parse_assignment, assignments))
    return {f"model.{name.removeprefix('model.')}": value for name, value in settings.items()}
