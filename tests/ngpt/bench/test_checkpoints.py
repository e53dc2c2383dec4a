"""The benchmark of checkpoints measures real ones, and its figures agree with each other."""

import pytest

from ngpt.bench.checkpoints import checkpoint
from ngpt.config.base import override
from ngpt.training.config import TrainConfig


def test_a_checkpoint_is_compared_with_a_plain_save_and_with_the_steps_between_two(tiny: TrainConfig) -> None:
    figures = checkpoint(override(tiny, {"checkpoint.every": 50}), seconds=0)
    assert figures["share"] == pytest.approx(figures["ms"] / (50 * figures["step_ms"]))
    assert figures["best_ms"] <= figures["ms"] and figures["ratio"] > 0
    weights = 4 * 2 * 400 * 16  # embedding and head alone, float32
    assert figures["saved_bytes"] > 3 * weights  # with Adam's two moments
