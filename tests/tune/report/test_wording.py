"""What a summary says about its parts: only what it knows, and nothing twice."""

from typing import Any

import pytest

from tune.report.wording import is_named, varied, went_wrong


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("alpha=0.2", {"model.alpha": 0.2}),
        ("optim.lr=0.1", {"optim.lr": 0.1}),
        ("optim.lr=0.1 + alpha=0.4", {"optim.lr": 0.1, "model.alpha": 0.4}),
        ("a=1, optim.betas=[0.9, 0.95]", {"model.a": 1, "optim.betas": [0.9, 0.95]}),
    ],
)
def test_a_name_that_says_all_settings_is_enough(name: str, overrides: dict[str, Any]) -> None:
    assert is_named({"arm": name, "overrides": overrides})


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("baseline", {}),
        ("winner", {"model.alpha": 0.2}),
        ("alpha=0.25", {"model.alpha": 0.2}),  # it begins like it
        ("xalpha=0.2", {"model.alpha": 0.2}),
        ("alpha=0.2", {"model.alpha": 0.2, "optim.lr": 0.1}),  # the rest is inherited
    ],
)
def test_a_name_that_leaves_something_out_is_not(name: str, overrides: dict[str, Any]) -> None:
    assert not is_named({"arm": name, "overrides": overrides})


def test_a_sweep_varies_what_the_file_says() -> None:
    assert varied({"swept": {"model.alpha": [0.05, 0.1], "tied": [True, False]}}) == {
        "model.alpha": "0.05, 0.1",
        "tied": "true, false",
    }


def test_a_search_varies_what_its_arms_cover() -> None:
    arms = [{"arm": str(i), "overrides": {"lr": i / 10, "rule": "ab"[i % 2], "steps": 5}} for i in range(1, 9)]
    phase = {"swept": {}, "arms": [{"arm": "baseline", "overrides": {}}, *arms]}
    assert varied(phase) == {"lr": "0.1 to 0.8, 8 values", "rule": "b and a"}


def test_nothing_that_varies_is_nothing() -> None:
    assert varied({}) == {} and varied({"arms": [{"arm": "baseline", "overrides": {}}]}) == {}


def test_a_trial_without_an_error_is_told_by_how_it_ended() -> None:
    assert went_wrong({"status": "failed", "error": "ValueError: \x1b[31mno"}) == "ValueError: no"
    assert "finite" in went_wrong({"status": "diverged", "error": None})
    assert went_wrong({"status": "failed", "error": None}) == "\u2013"
