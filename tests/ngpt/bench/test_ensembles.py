"""The benchmark of runs trained together: its figures agree with each other."""

import pytest

from ngpt.bench.ensembles import RUN_COUNTS, vectorised
from ngpt.config.base import ConfigError, override
from ngpt.training.config import TrainConfig


def test_each_number_of_runs_is_compared_with_as_many_single_steps(tiny: TrainConfig) -> None:
    figures = vectorised(tiny, seconds=0)
    measured = figures["at_once"]
    assert list(measured) == [str(count) for count in RUN_COUNTS]
    assert figures["ratio"] == max(measured[str(count)]["ratio"] for count in RUN_COUNTS[1:])
    assert figures["ratio"] == measured[str(figures["best"])]["ratio"] and figures["best"] > 1
    assert figures["worth_it"] is (figures["ratio"] > 1.1)
    for count, each in measured.items():
        tokens = int(count) * tiny.batch_size * tiny.model.block_size
        assert each["tokens_per_second"] * each["ms"] == pytest.approx(tokens * 1000)
        assert each["reference_tokens_per_second"] * each["reference_ms"] == pytest.approx(tokens * 1000)
        assert 0.8 < each["kept_bytes"] / each["reference_kept_bytes"] / int(count) < 1.5


def test_runs_that_cannot_be_trained_together_are_not_measured(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="compile is on"):
        vectorised(override(tiny, {"compile": True}), seconds=0)
