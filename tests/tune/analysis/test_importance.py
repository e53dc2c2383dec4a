"""Axis importance, compared with textbook sums of squares and with chance."""

import itertools
import random
from typing import Any

import numpy as np
import pytest

from tune.analysis.importance import axis_importance, sweep_axes
from tune.storage.summaries import ArmSummary, PhaseSummary, Spread

Point = tuple[dict[str, Any], float | None]


def phase(points: list[Point]) -> PhaseSummary:
    arms = [ArmSummary(str(i), overrides=own, score=Spread(score)) for i, (own, score) in enumerate(points)]
    return PhaseSummary(arms=(ArmSummary("baseline", score=Spread(9.0)), *arms))


def test_a_complete_grid_is_divided_into_its_axes_and_their_interaction() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3, 4))
    points: list[Point] = [({"a": i, "b": f"w{j}"}, float(table[i, j])) for i in range(3) for j in range(4)]
    found = axis_importance(phase(points))
    assert found is not None
    rows, columns = table.mean(1), table.mean(0)  # the two-way layout, balanced
    assert found.shares["a"] == pytest.approx(rows.var() / table.var())
    assert found.shares["b"] == pytest.approx(columns.var() / table.var())
    interaction = table - rows[:, None] - columns + table.mean()
    assert found.rest == pytest.approx(interaction.var() / table.var())
    assert "functional ANOVA" in found.method and found.arms == 12
    assert list(found.shares) == sorted(found.shares, key=lambda name: -found.shares[name])


def test_an_axis_that_explains_everything_has_share_one() -> None:
    points: list[Point] = [({"a": a, "b": b}, float(a)) for a, b in itertools.product((1, 2), (True, False))]
    found = axis_importance(phase(points))
    assert found is not None
    assert (found.shares["a"], found.shares["b"], found.rest) == pytest.approx((1, 0, 0))


def test_in_a_search_an_axis_without_effect_gets_almost_no_share() -> None:
    rng = random.Random(1)
    points: list[Point] = []
    for _ in range(200):
        own = {"lr": 10 ** rng.uniform(-4, -1), "useless": rng.random(), "kind": rng.choice("xyz")}
        points.append((own, own["lr"] * 30 + (own["kind"] == "x") * 0.6 + 0.05 * rng.gauss(0, 1)))
    found = axis_importance(phase(points))
    assert found is not None
    assert next(iter(found.shares)) == "lr" and found.shares["useless"] < 0.05 < found.shares["kind"]
    assert found.rest is None and "corrected for chance" in found.method


def test_a_grid_without_one_arm_is_not_treated_as_complete() -> None:
    points: list[Point] = [({"a": a, "b": b}, a + 0.1 * b) for a, b in itertools.product(range(3), range(3))]
    points[4] = (points[4][0], None)
    found = axis_importance(phase(points))
    assert found is not None and found.rest is None and found.arms == 8


@pytest.mark.parametrize(
    "points",
    [
        [],
        [({"a": i}, float(i)) for i in range(6)],  # one axis
        [({"a": 1} if i % 2 else {"b": i}, float(i)) for i in range(6)],  # one variable at a time
        [({"a": i, "b": -i}, float(i)) for i in range(6)],  # side by side: each arm is a level of its own
        [({"a": a, "b": b}, 4.0) for a in (1, 2) for b in (1, 2)],  # all equal
    ],
)
def test_there_are_no_shares_without_two_axes_and_a_spread(points: list[Point]) -> None:
    assert axis_importance(phase(points)) is None


def test_axes_are_the_settings_that_all_arms_set_and_that_vary() -> None:
    points: list[Point] = [({"a": a, "b": True, "c": 1.0 * a}, 1.0) for a in (1, 2)]
    assert sweep_axes(phase(points)) == ["a", "c"]
