"""Runs at once stand beside as many steps one after another."""

import pytest

from ngpt.config.base import ConfigError, override
from ngpt.ensemble.throughput import AT_ONCE, step_together, vectorised
from ngpt.training.config import TrainConfig


def test_every_number_of_runs_is_compared_with_as_many_single_steps(tiny: TrainConfig) -> None:
    figures = vectorised(tiny, seconds=0)
    found = figures["at_once"]
    assert list(found) == [str(count) for count in AT_ONCE]
    assert figures["ratio"] == max(found[str(count)]["ratio"] for count in AT_ONCE[1:])
    assert figures["ratio"] == found[str(figures["best"])]["ratio"] and figures["best"] > 1
    assert figures["worth_it"] is (figures["ratio"] > 1.1)
    for count, each in found.items():
        tokens = int(count) * tiny.batch_size * tiny.model.block_size
        assert each["tokens_per_second"] * each["ms"] == pytest.approx(tokens * 1000)
        assert each["reference_tokens_per_second"] * each["reference_ms"] == pytest.approx(tokens * 1000)
        assert 0.8 < each["kept_bytes"] / each["reference_kept_bytes"] / int(count) < 1.5


def test_what_cannot_be_trained_at_once_is_not_measured(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="compile is on"):
        vectorised(override(tiny, {"compile": True}), seconds=0)


def test_a_step_of_several_makes_tokens_for_each_of_them(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr("ngpt.ensemble.throughput.timed", lambda work, device: (work(), next(seconds))[1])
    tokens = 3 * tiny.batch_size * tiny.model.block_size
    assert step_together(tiny, 3, warmup=1, steps=3) == tokens / 3.0
    with pytest.raises(ConfigError, match="compile is on"):
        step_together(override(tiny, {"compile": True}), 3)
