"""Checkpoints of this program, such as those that several ranks have written, as one file of safetensors."""

from pathlib import Path

from ngpt.data.tokens.tokenizer import MODEL_FILES
from ngpt.runs.pruning import prune_state
from ngpt.training.checkpoint import read_weights, save_checkpoint
from ngpt.training.load_model import find_checkpoint


def is_own(path: Path) -> bool:
    """Whether there is a checkpoint of this program at `path`, or a run or trial with some."""
    return (path / "MANIFEST.json").is_file() or (path / "checkpoints").is_dir()


def copy_weights(path: Path, root: Path) -> Path:
    """Writes the newest checkpoint at `path` to `root`, as one device would, and returns its folder.

    Weights, settings and tokenizer are kept, but not the optimizer state. Raises ConfigError if there is no intact
    checkpoint.
    """
    checkpoint = find_checkpoint(path)
    names = [name for name in MODEL_FILES.values() if (checkpoint.path / name).is_file()]
    folder = save_checkpoint(
        root,
        weights=read_weights(checkpoint),
        state={},
        step=checkpoint.step,
        val_loss=checkpoint.val_loss,
        identity=checkpoint.identity,
        keep_last=1,
        data=checkpoint.data,
        files={name: (checkpoint.path / name).read_bytes() for name in names},
    )
    prune_state(folder)
    return folder
