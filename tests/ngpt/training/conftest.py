"""A run whose steps, checkpoints and evaluations fall at different intervals."""

import pytest

from ngpt.config.base import override
from ngpt.training.config import TrainConfig


@pytest.fixture
def watched(tiny: TrainConfig) -> TrainConfig:
    return override(tiny, {"checkpoint.every": 2, "tracker.log_every": 1, "project_every": 3, "eval_every": 4})
