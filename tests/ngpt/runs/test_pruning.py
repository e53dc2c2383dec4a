"""What a pruned checkpoint keeps, and what a kill in the middle leaves."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ngpt.config.base import ConfigError
from ngpt.runs.pruning import prunable_bytes, prune_state
from ngpt.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, verify_checkpoint

IDENTITY = {"seed": 3}


def test_a_pruned_checkpoint_keeps_its_weights_and_no_run_continues_from_it(tmp_path: Path) -> None:
    layer = nn.Linear(5, 3)
    facts = {"step": 1, "val_loss": None, "identity": IDENTITY, "keep_last": 1}
    path = save_checkpoint(tmp_path, weights=layer.state_dict(), state={"moments": torch.ones(4)}, **facts)
    size = (path / "state.pt").stat().st_size
    assert prunable_bytes(path) == size and not verify_checkpoint(path).is_pruned
    prune_state(path)
    assert prunable_bytes(path) == 0
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.is_pruned and found.path == path
    with pytest.raises(ConfigError, match=f"{path}: its optimizer state was pruned.* --init-from {path}"):
        load_checkpoint(found, layer, identity=IDENTITY)
    (path / "state.pt.pruned").unlink()
    with pytest.raises(FileNotFoundError):  # lost, not pruned
        verify_checkpoint(path)
