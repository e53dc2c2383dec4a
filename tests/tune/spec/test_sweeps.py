"""Sweeps: how many arms an axis gives, which ones, and their names."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.spec.sweeps import BASELINE, SWEEPS, ArmSpec, Axis, count


def axis(setting: str, *values: Any) -> Axis:
    return Axis(setting.rpartition(".")[2], setting, values, ("vary", setting))


LR, ALPHA, KIND = axis("optim.lr", 0.1, 0.2), axis("model.alpha", 1, 2, 3), axis("model.mlp", "relu2")


def test_vary_changes_one_setting_at_a_time() -> None:
    arms = SWEEPS["vary"]([LR, ALPHA])
    assert [arm.overrides for arm in arms] == [
        {"optim.lr": 0.1},
        {"optim.lr": 0.2},
        {"model.alpha": 1},
        {"model.alpha": 2},
        {"model.alpha": 3},
    ]
    assert [arm.name for arm in arms] == ["lr=0.1", "lr=0.2", "alpha=1", "alpha=2", "alpha=3"]


def test_grid_has_every_combination() -> None:
    arms = SWEEPS["grid"]([LR, ALPHA, KIND])
    points = list(itertools.product((0.1, 0.2), (1, 2, 3), ("relu2",)))
    assert [tuple(arm.overrides.values()) for arm in arms] == points
    assert arms[0].name == "lr=0.1, alpha=1, mlp=relu2"


def test_zip_combines_values_side_by_side() -> None:
    arms = SWEEPS["zip"]([LR, axis("steps", 10, 20)])
    assert [arm.overrides for arm in arms] == [{"optim.lr": 0.1, "steps": 10}, {"optim.lr": 0.2, "steps": 20}]
    assert [arm.name for arm in arms] == ["lr=0.1, steps=10", "lr=0.2, steps=20"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(["vary", "grid"]))
def test_the_count_of_arms_is_the_number_that_a_sweep_builds(sizes: list[int], kind: str) -> None:
    axes = [axis(f"s{i}", *range(size)) for i, size in enumerate(sizes)]
    assert count(kind, axes) == len(SWEEPS[kind](axes))


def test_a_grid_is_counted_without_building_it() -> None:
    million = axis("steps", *range(1000))
    assert count("grid", [million] * 4) == 10**12
    assert count("vary", [million] * 4) == 4000
    assert count("zip", [million] * 4) == 1000


def test_each_override_knows_its_item_in_the_file() -> None:
    origins = [arm.origins for arm in SWEEPS["zip"]([LR, axis("steps", 10, 20)])]
    assert origins[1] == {"optim.lr": ("vary", "optim.lr", 1), "steps": ("vary", "steps", 1)}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        (1e-05, "1e-05"),
        (0.1 + 0.2, "0.3"),
        ([0.9, 0.95], "[0.9, 0.95]"),
        ("a b", "a b"),
    ],
)
def test_an_arm_is_named_with_the_value_as_yaml_writes_it(value: Any, text: str) -> None:
    assert axis("x", value, "other").names[0] == f"x={text}"


@given(st.lists(st.floats(0, 1) | st.integers(0, 3), unique=True, min_size=1, max_size=8))
def test_different_values_have_different_names(values: list[float]) -> None:
    names = [arm.name for arm in SWEEPS["vary"]([axis("model.alpha", *values)])]
    assert len(set(names)) == len(values)


def test_values_that_look_alike_are_named_with_all_digits() -> None:
    assert axis("x", 0.1, 0.10000001, 0.2).names == ["x=0.1", "x=0.10000001", "x=0.2"]


def test_arms_are_equal_wherever_they_were_written() -> None:
    assert ArmSpec("a", {"steps": 1}, origins={"steps": ("x",)}) == ArmSpec(
        "a", {"steps": 1}, origins={"steps": ("y",)}
    )
    assert ArmSpec("baseline") == BASELINE
