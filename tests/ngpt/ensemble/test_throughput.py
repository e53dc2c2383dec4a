"""The speed of runs trained together counts the tokens of all of them."""

import pytest

from ngpt.config.base import ConfigError, override
from ngpt.ensemble.throughput import measure_step_together
from ngpt.training.config import TrainConfig


def test_a_step_counts_the_tokens_of_every_run(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr("ngpt.ensemble.throughput.time_call", lambda work, device: (work(), next(seconds))[1])
    tokens = 3 * tiny.batch_size * tiny.model.block_size
    assert measure_step_together(tiny, 3, warmup=1, steps=3) == tokens / 3.0


def test_runs_that_cannot_be_trained_together_are_not_measured(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="compile is on"):
        measure_step_together(override(tiny, {"compile": True}), 3)
