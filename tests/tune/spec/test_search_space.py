"""Random search: arms lie within the space and depend only on the seed; an impossible space is reported."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from tune.campaign import load_campaign
from tune.planning.plan import preview
from tune.spec.schema import Campaign
from tune.spec.search_space import Dimension, Search, random_arms

BASE = """\
campaign: c
seeds: [1, 2]
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, steps: 10, batch_size: 16, alpha: 0.2}
search:
  trials: TRIALS
  space: SPACE
  confirm: false
"""
SPACE = "{optim.lr: {log: [1e-4, 1e-2]}, alpha: {uniform: [0.05, 0.5]}, n_layer: {choice: [4, 6]}}"


def load(folder: Path, space: str = SPACE, trials: str = "8", rest: str = "") -> Campaign:
    path = folder / "c.yaml"
    path.write_text(BASE.replace("SPACE", space).replace("TRIALS", trials) + rest)
    return load_campaign(path)


def names(campaign: Campaign) -> list[str]:
    return [arm.name for arm in campaign.phases[0].arms]


def test_random_arms_are_named_after_their_values(tmp_path: Path) -> None:
    (phase,) = preview(load(tmp_path))
    assert (len(phase.arms), len(list(phase.trials))) == (1 + 8, 2 * 9)
    for arm in phase.arms[1:]:
        assert sorted(arm.overrides) == ["model.alpha", "model.n_layer", "optim.lr"]
        written = dict(item.split("=") for item in arm.name.split(", "))
        assert float(written["alpha"]) == arm.overrides["model.alpha"]
        assert float(written["optim.lr"]) == arm.overrides["optim.lr"]
        assert 0.05 <= arm.overrides["model.alpha"] <= 0.5
        assert 1e-4 <= arm.overrides["optim.lr"] <= 1e-2
        assert arm.overrides["model.n_layer"] in (4, 6)


def test_random_arms_depend_on_neither_the_order_of_the_space_nor_their_number(tmp_path: Path) -> None:
    expected = names(load(tmp_path))
    turned = "{n_layer: {choice: [4, 6]}, alpha: {uniform: [0.05, 0.5]}, optim: {lr: {log: [1e-4, 1e-2]}}}"
    found = [set(name.replace("optim.lr", "lr").split(", ")) for name in names(load(tmp_path, turned))]
    assert found == [set(name.replace("optim.lr", "lr").split(", ")) for name in expected]
    assert names(load(tmp_path, trials="20"))[:8] == expected
    assert not set(names(load(tmp_path, rest="  seed: 1\n"))) & set(expected)


@given(
    kind=st.sampled_from(["uniform", "log"]),
    ends=st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=2, unique=True).map(sorted),
    seed=st.integers(0, 9),
)
def test_every_draw_lies_within_its_interval(kind: str, ends: list[float], seed: int) -> None:
    dimension = Dimension("lr", "optim.lr", kind, tuple(ends), ())
    for arm in random_arms(Search("random", 5, seed, 1, (dimension,))):
        assert ends[0] <= arm.overrides["optim.lr"] <= ends[1]


def test_a_log_interval_is_drawn_evenly_over_its_decades() -> None:
    dimension = Dimension("lr", "optim.lr", "log", (1e-4, 1e-1), ())
    drawn = [arm.overrides["optim.lr"] for arm in random_arms(Search("random", 3000, 0, 1, (dimension,)))]
    for decade in (1e-4, 1e-3, 1e-2):
        share = sum(decade <= value < 10 * decade for value in drawn) / len(drawn)
        assert share == pytest.approx(1 / 3, abs=4 * (2 / 9 / len(drawn)) ** 0.5)


def test_whole_numbers_are_drawn_including_both_ends() -> None:
    dimension = Dimension("n_layer", "model.n_layer", "uniform", (2, 5), ())
    drawn = {arm.overrides["model.n_layer"] for arm in random_arms(Search("random", 4, 3, 1, (dimension,)))}
    assert drawn == {2, 3, 4, 5}
    assert all(type(value) is int for value in drawn)


@pytest.mark.parametrize("ends", [(1, 2), (2, 4), (4, 64)])
def test_whole_numbers_of_a_log_interval_are_drawn_by_their_share_of_it(
    ends: tuple[int, int],
) -> None:
    dimension, n = Dimension("batch_size", "batch_size", "log", ends, ()), 100_000
    drawn = [dimension.at((i + 0.5) / n) for i in range(n)]
    whole = math.log((ends[1] + 0.5) / (ends[0] - 0.5))
    for value in range(ends[0], ends[1] + 1):
        part = math.log((value + 0.5) / (value - 0.5)) / whole
        assert drawn.count(value) / n == pytest.approx(part, abs=2 / n)
    assert sorted(drawn) == drawn and type(drawn[0]) is int


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{alpha: {uniform: [0.5, 0.1]}}", "6:19: search.space.alpha.uniform: the low end must be below the high end"),
        (
            "{alpha: {uniform: [1, 1]}}",
            "search.space.alpha.uniform: the low end must be below the high end, got [1",
        ),
        ("{lr: {log: [0, 1]}}", "search.space.lr.log: a logarithmic interval must lie above 0, got [0, 1]"),
        (
            "{lr: {log: [1e-3]}}",
            "search.space.lr.log: an interval is two numbers, the low and the high end, got [",
        ),
        ("{lr: {log: [a, b]}}", "search.space.lr.log: an interval is two numbers"),
        ("{n_layer: {choice: []}}", "search.space.n_layer.choice: the list of values is empty"),
        ("{n_layer: {choice: [4, 4]}}", "search.space.n_layer.choice[1]: 4 is listed twice"),
        ("{n_layer: {choice: [4, x]}}", "search.space.n_layer: input should be a valid integer, got 'x'"),
        (
            "{n_layer: {uniform: [0.5, 1.5]}}",
            "n_layer.uniform: model.n_layer takes whole numbers, got [0.5, 1.5]",
        ),
        ("{lr: {normal: [0, 1]}}", "search.space.lr: expected {uniform: [LOW, HIGH]}, {log: [LOW, HIGH]} or {choice:"),
        ("{lr: [0, 1]}", "search.space.lr: expected {uniform: [LOW, HIGH]}"),
        ("{lrr: {log: [1, 2]}}", "search.space.lrr: unknown setting, did you mean 'lr'?"),
        ("{}", "search.space: nothing varies: give `space:` with at least one setting"),
        ("{n_layer: {choice: [4, 6]}}", "search.trials: 8 distinct arms requested, but the search space yields only 2"),
    ],
)
def test_an_impossible_space_is_reported_with_its_place(tmp_path: Path, space: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, space, trials="2" if "x]" in space else "8")
    (line,) = str(caught.value).splitlines()
    assert message in line and "c.yaml:" in line


@pytest.mark.parametrize(
    ("trials", "rest", "message"),
    [
        ("0", "", "search.trials: `trials:` is a whole number from 1 to 2,147,483,647, got 0"),
        ("99999", "", "search: 99999 arms x 2 seeds = 199998 trials; a campaign has at most 10000"),
        ("3", "  method: optima\n", "search.method: unknown method 'optima', did you mean 'optuna'?"),
        ("3", "  sed: 1\n", "search.sed: unknown setting, did you mean 'seed'?"),
        ("3", "  seed: x\n", "search.seed: `seed:` is a whole number from 0 to 2,147,483,647, got 'x'"),
    ],
)
def test_the_settings_of_a_search_are_checked(tmp_path: Path, trials: str, rest: str, message: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, trials=trials, rest=rest)
    assert message in str(caught.value)
