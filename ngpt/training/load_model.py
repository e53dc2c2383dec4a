"""From a checkpoint back to a model that reads and writes text: its weights, its settings, its tokenizer.

A checkpoint folder is all that is needed, wherever it lies. Settings that leave the weights as they are can be changed
on the way, so that a model reads a longer context than it was trained with.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from ngpt.config.base import ConfigError, build, override
from ngpt.config.yaml_reader import parse_assignment
from ngpt.data.tokens.tokenizer import MODEL_FILE, Tokenizer, load_tokenizer
from ngpt.model.gpt import GPT, ModelConfig
from ngpt.system.device import DEVICES, DTYPES, pick_device
from ngpt.training.checkpoint import Checkpoint, checkpoint_folders, verify_checkpoint

log = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model in evaluation mode, its tokenizer (None where the checkpoint has none) and where they come from."""

    model: GPT
    tokenizer: Tokenizer | None
    checkpoint: Checkpoint


def load_model(
    path: Path, *, best: bool = False, tokenizer: str | None = None, device: str = "cpu", **changes: Any
) -> LoadedModel:
    """The model of a checkpoint. Weights are read as safetensors, nothing is unpickled.

    Args:
        path: a checkpoint (`step_...`), or the folder of a run or trial: then its newest intact checkpoint.
        best: the one with the lowest validation loss instead.
        tokenizer: spec of a tokenizer to use instead of the checkpoint's own.
        device: as in `pick_device`.
        changes: settings of the model to change, such as `rope_scaling="yarn", rope_factor=4.0, block_size=512`.

    Raises:
        ConfigError: no intact checkpoint there; unknown settings, or such that the weights do not fit; no tokenizer of
            that spec, or not the one that the model was trained with.
    """
    checkpoint = find_checkpoint(path, best=best)
    model = build_model(checkpoint, device=device, **changes)
    return LoadedModel(model, checkpoint_tokenizer(checkpoint, tokenizer), checkpoint)


def find_checkpoint(path: Path, *, best: bool = False) -> Checkpoint:
    """The checkpoint at `path` or, of those under it, the newest intact one; nothing is renamed or removed.

    Raises:
        ConfigError: there is none, or its format is unknown.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: {'a file, give the folder that it is in' if path.exists() else 'no such folder'}")
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    is_one = (path / "MANIFEST.json").is_file() or path in checkpoint_folders(path.parent)
    folders = [path] if is_one else checkpoint_folders(root)
    if not folders:
        trials = sorted((path / "trials").glob("*"))
        which = "its trial" if len(trials) == 1 else f"one of its {len(trials)} trials, such as"
        hint = f"; give {which} {trials[0]}" if trials else ""
        raise ConfigError(f"{path} has no checkpoints{hint}")
    found: list[Checkpoint] = []
    damage: list[Exception] = []
    for folder in reversed(folders):
        try:
            found.append(verify_checkpoint(folder))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            damage.append(error)
            continue
        if not best:
            break
    if not found:
        raise ConfigError(f"{path} has no intact checkpoint: {damage[0]}")
    if damage:
        log.warning("passed over a damaged checkpoint: %s", damage[0])
    scored = [checkpoint for checkpoint in found if checkpoint.val_loss is not None]
    if best and not scored:
        raise ConfigError(f"{path} has no checkpoint with a validation loss")
    return min(scored, key=lambda one: one.val_loss or 0.0) if best else found[0]


def build_model(checkpoint: Checkpoint, *, device: str = "cpu", **changes: Any) -> GPT:
    """The model of a checkpoint in evaluation mode; arguments and errors as in `load_model`."""
    identity = checkpoint.identity
    settings = {name.removeprefix("model."): value for name, value in identity.items() if name.startswith("model.")}
    if "vocab_size" not in settings:
        raise ConfigError(f"{checkpoint.path} does not say of what model it is")
    cfg = override(build(ModelConfig, settings), {name.removeprefix("model."): to for name, to in changes.items()})
    model = GPT(cfg)
    try:
        weights = safetensors.torch.load_file(checkpoint.path / "model.safetensors")
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{checkpoint.path}: model.safetensors is not what it should be: {error}") from None
    _check_shapes(model, weights, checkpoint.path, changes)
    model.load_state_dict(weights)
    # As in its last step; a converted model has none behind it.
    model.prepare_step(max(0, checkpoint.step - 1), identity.get("steps", 1), seed=identity.get("seed", 0))
    return model.to(pick_device(device)).eval()


def _check_shapes(model: GPT, weights: Mapping[str, Tensor], path: Path, changes: Mapping[str, object]) -> None:
    """Raises a ConfigError that names the first weight that is not as the model needs it."""
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(needed.keys() | there.keys()):
        if needed.get(name) != there.get(name):
            given = ", ".join(f"{setting}={value}" for setting, value in changes.items()) or "this version's model"
            one, other = needed.get(name, "not there"), there.get(name, "not there")
            raise ConfigError(f"{given} does not fit {path}: {name} would be {one}, in the checkpoint it is {other}")


class TokenizerOrigin(NamedTuple):
    """The tokenizer of the tokens that a model was trained on, as far as it is known."""

    spec: str | None
    sha256: str | None


def tokenizer_origin(checkpoint: Checkpoint) -> TokenizerOrigin:
    """What a checkpoint says of its tokenizer: one of ours its hash too, a converted one the spec alone."""
    if (described := checkpoint.data.get("tokenizer")) is None:
        return TokenizerOrigin(checkpoint.identity.get("data.tokenizer"), None)
    # Shards can be trained on without their tokenizer; the spec is then a default that nobody has looked at.
    return TokenizerOrigin(described["spec"] if described["sha256"] else None, described["sha256"])


def checkpoint_tokenizer(checkpoint: Checkpoint, spec: str | None = None) -> Tokenizer | None:
    """The tokenizer that `spec` names, or else the checkpoint's own; None if only the tokens were at hand in training.

    Raises:
        ConfigError: it cannot be had, or is not the one that the model was trained with.
    """
    made, vocab_size = tokenizer_origin(checkpoint), checkpoint.identity["model.vocab_size"]
    if spec is not None:
        tokenizer = load_tokenizer(spec, None)
    elif made.spec is None or (made.spec.startswith("sentencepiece:") and not (checkpoint.path / MODEL_FILE).is_file()):
        return None
    else:
        tokenizer = load_tokenizer(made.spec, checkpoint.path)
    if made.sha256 not in (None, tokenizer.sha256):
        raise ConfigError(f"{tokenizer.name} is not the tokenizer that {checkpoint.path} was trained with")
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{tokenizer.name} has {tokenizer.vocab_size} tokens, {checkpoint.path} has {vocab_size}")
    return tokenizer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments with which a command line names a model; `parse_model_changes` reads those of --set."""
    what = "folder of a checkpoint, or of a run or trial: then its newest intact checkpoint"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=what)
    parser.add_argument("--best", action="store_true", help="instead the checkpoint with the lowest validation loss")
    changes = "change settings of the model, such as rope_scaling=yarn rope_factor=4 block_size=512"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=changes)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="of matrix products; default: as in training")


def parse_model_changes(assignments: list[str]) -> dict[str, Any]:
    """`--set` as the changes of `load_model`, each with the prefix `model.`: none can be taken for another argument.

    Raises:
        ConfigError: one is not NAME=VALUE.
    """
    given = dict(map(parse_assignment, assignments))
    return {f"model.{name.removeprefix('model.')}": value for name, value in given.items()}
