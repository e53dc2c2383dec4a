"""Learning-rate schedules at their corners, and against NumPy in between."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError, build
from ngpt.optim.schedule import SCHEDULES, ScheduleConfig, is_due, lr_multiplier


def curve(total: int, **settings: object) -> list[float]:
    cfg = build(ScheduleConfig, settings)
    return [lr_multiplier(step, total, cfg) for step in range(total)]


def test_constant_schedule_is_always_one() -> None:
    assert curve(5, name="constant", final_ratio=0.3) == [1.0] * 5


def test_cosine_schedule_matches_a_half_wave_in_numpy() -> None:
    steps = np.arange(40)
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * steps / 40)) / 2
    np.testing.assert_allclose(curve(40, name="cosine", final_ratio=0.1), expected, rtol=1e-12)


def test_trapezoid_is_one_and_then_falls_linearly() -> None:
    actual = curve(10, name="trapezoid", decay_fraction=0.5, final_ratio=0.0)
    np.testing.assert_allclose(actual, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-12)
    actual = curve(4, name="trapezoid", decay_fraction=1.0, final_ratio=0.5)
    np.testing.assert_allclose(actual, [1, 0.875, 0.75, 0.625], rtol=1e-12)


def test_trapezoid_without_decay_stays_at_one() -> None:
    assert curve(6, name="trapezoid", decay_fraction=0.0) == [1.0] * 6
    assert curve(6, name="trapezoid", decay_fraction=0) == [1.0] * 6


def test_logarithmic_schedule_matches_log10_in_numpy() -> None:
    actual = curve(40, name="logarithmic", log_steepness=9.0, final_ratio=0.1)
    np.testing.assert_allclose(actual, 0.1 + 0.9 * (1 - np.log10(1 + 9 * np.arange(40) / 40)), rtol=1e-12)


def test_logarithmic_schedule_is_linear_at_low_steepness_and_below_that_line_when_steep() -> None:
    line = 1 - np.arange(20) / 20
    np.testing.assert_allclose(curve(20, name="logarithmic", log_steepness=1e-9), line, rtol=1e-6)
    for steepness in (1.0, 9.0, 1e4):
        actual = curve(20, name="logarithmic", log_steepness=steepness)
        assert (np.array(actual[1:]) < line[1:]).all()
        assert (np.diff(actual, n=2) > 0).all()  # convex: it falls more and more slowly


def test_steepness_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"log_steepness.*greater than 0"):
        curve(3, name="logarithmic", log_steepness=0.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_and_the_schedule_starts_after_it(name: str) -> None:
    warm = curve(24, name=name, warmup_steps=4, final_ratio=0.2)
    assert warm[:4] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(warm[4:], curve(20, name=name, final_ratio=0.2), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "end"), [("constant", 1.0), ("cosine", 0.1), ("trapezoid", 0.1), ("logarithmic", 0.1)]
)
def test_schedule_reaches_the_final_ratio_one_step_after_the_end(name: str, end: float) -> None:
    cfg = ScheduleConfig(name=name, warmup_steps=3, final_ratio=0.1)
    assert lr_multiplier(30, 30, cfg) == pytest.approx(end)
    assert lr_multiplier(31, 30, cfg) == pytest.approx(end)
    assert lr_multiplier(29, 30, cfg) >= end


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(0, 12),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 30),
    st.floats(1e-12, 1e12),
)
def test_multiplier_rises_once_then_never_rises_and_stays_within_bounds(
    name: str, warmup: int, final: float, decay: float, total: int, steepness: float
) -> None:
    shape = {"final_ratio": final, "decay_fraction": decay, "log_steepness": steepness}
    values = curve(total, name=name, warmup_steps=warmup, **shape)
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    after = np.diff(values[max(0, warmup - 1) :])
    assert (after <= 1e-12).all()
    assert all(value >= final - 1e-12 for value in values[warmup:])


def test_run_can_consist_of_warmup_only() -> None:
    assert curve(3, warmup_steps=10) == [0.1, 0.2, 0.3]


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown schedule 'cosin', did you mean 'cosine'"):
        curve(3, name="cosin")


def test_is_due_at_every_interval_and_at_the_last_step() -> None:
    assert [step for step in range(10) if is_due(step, 4, last=step == 9)] == [0, 4, 8, 9]
