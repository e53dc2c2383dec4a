"""A search is followed by a phase that compares its best arm with the baseline on fresh seeds, unless another does."""

from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from tests.helpers import ROOT
from tune.campaign import load_campaign
from tune.spec.schema import Campaign, FreshSeeds, UntilDecided

BASE = """\
campaign: c
seeds: [1, 2, 3]
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, steps: 10, alpha: 0.2}
phases:
  - name: tune
    set: {batch_size: 4}
    hold: steps
    search: {trials: 4, space: {alpha: {uniform: [0.1, 0.5]}}MORE}
  - name: after
    AFTER
"""
OTHER = "vary: {project_every: [2]}"


def load(folder: Path, more: str = "", after: str = OTHER) -> Campaign:
    path = folder / "c.yaml"
    path.write_text(BASE.replace("MORE", more).replace("AFTER", after))
    return load_campaign(path)


def test_by_default_it_has_fresh_seeds_and_the_base_of_the_search(tmp_path: Path) -> None:
    campaign = load(tmp_path)
    assert [phase.name for phase in campaign.phases] == ["tune", "tune-confirm", "after"]
    search, confirmation, _ = campaign.phases
    assert (confirmation.confirms, confirmation.seeds, confirmation.needs) == ("tune", FreshSeeds(), {"tune"})
    shared = [(phase.inherit, phase.pinned, phase.hold) for phase in (search, confirmation)]
    assert shared[0] == shared[1]
    assert not confirmation.stops_early


@pytest.mark.parametrize(
    ("confirm", "seeds"),
    [
        ("fresh 4", FreshSeeds(4)),
        ("[7, 8]", (7, 8)),
        ("{until: decided, fresh: true}", UntilDecided(fresh=True)),
        ("true", FreshSeeds()),
    ],
)
def test_its_seeds_can_be_named(tmp_path: Path, confirm: str, seeds: object) -> None:
    assert load(tmp_path, f", confirm: {confirm}").phases[1].seeds == seeds


@pytest.mark.parametrize(
    ("confirm", "message"),
    [
        ("[3, 4]", "a confirmation needs seeds that the search has not seen, such as `fresh 5`"),
        ("{until: decided}", "a confirmation needs seeds that the search has not seen, such as `fresh 5`"),
        ("stale 4", "expected `fresh`, `fresh N` with N from 1 to 9999, or a list, got 'stale 4'"),
    ],
)
def test_seeds_that_confirm_nothing_are_refused(tmp_path: Path, confirm: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f", confirm: {confirm}")
    assert str(caught.value).endswith(f":8:64: phases[0].search.confirm: {message}")


@pytest.mark.parametrize(
    ("more", "after"),
    [
        (", confirm: false", OTHER),
        ("", "runs: [{arm: baseline}, {arm: x, inherit: tune}]\n    seeds: fresh 3"),
        ("", "runs: [{arm: baseline}, {arm: x, inherit: tune}]"),  # gets other seeds by itself
    ],
)
def test_there_is_none_if_it_is_off_or_another_phase_does_the_same(tmp_path: Path, more: str, after: str) -> None:
    assert [phase.name for phase in load(tmp_path, more, after).phases] == ["tune", "after"]


def test_a_phase_on_the_same_seeds_confirms_nothing(tmp_path: Path) -> None:
    after = "runs: [{arm: baseline}, {arm: x, inherit: tune}]\n    seeds: [1, 2, 3]"
    assert [phase.name for phase in load(tmp_path, "", after).phases] == ["tune", "tune-confirm", "after"]


@pytest.mark.parametrize("seeds", ["[4, 5]", "fresh 3"])
def test_a_phase_that_starts_from_the_search_compares_nothing_and_waits_for_the_confirmation(
    tmp_path: Path, seeds: str
) -> None:
    after = f"inherit: tune\n    seeds: {seeds}\n    vary: {{project_every: [2]}}"
    *names, last = load(tmp_path, "", after).phases
    assert [phase.name for phase in names] == ["tune", "tune-confirm"]
    assert (last.inherit, last.needs) == ("tune-confirm", {"tune-confirm"})
    compared = f"{after}\n  - name: final\n    runs: [{{arm: x, inherit: tune}}]\n    seeds: fresh 3"
    _, _, _, final = load(tmp_path, "", compared).phases
    assert [arm.inherit for arm in final.arms] == ["tune-confirm"]


def test_a_search_that_starts_from_another_is_confirmed_on_the_base_that_it_searched(tmp_path: Path) -> None:
    second = "inherit: tune\n    search: {trials: 4, space: {alpha: {uniform: [0.1, 0.5]}}}"
    phases = {phase.name: phase for phase in load(tmp_path, "", second).phases}
    assert list(phases) == ["tune", "tune-confirm", "after", "after-confirm"]
    assert (phases["after"].inherit, phases["after-confirm"].inherit) == ("tune-confirm", "tune-confirm")


def test_a_cycle_through_a_confirmation_has_its_place(tmp_path: Path) -> None:
    text = BASE.replace("set: {batch_size: 4}", "inherit: after").replace("MORE", "")
    (tmp_path / "c.yaml").write_text(text.replace("AFTER", f"inherit: tune\n    {OTHER}"))
    with pytest.raises(ConfigError, match=r"c\.yaml:6:5: phases\[0\]\.inherit: phases inherit from each other"):
        load_campaign(tmp_path / "c.yaml")


def test_what_a_phase_may_start_from_is_checked_before_anything_trains(tmp_path: Path) -> None:
    """The winner of a confirmation is an arm of its search."""
    search = "search: {trials: 1, space: {n_embd: {choice: [24]}}}"
    text = BASE.replace("search: {trials: 4, space: {alpha: {uniform: [0.1, 0.5]}}MORE}", search)
    (tmp_path / "c.yaml").write_text(text.replace("AFTER", "inherit: tune\n    vary: {n_head: [8]}"))
    with pytest.raises(ConfigError, match=r"if model\.n_embd=24 wins the earlier phase"):
        load_campaign(tmp_path / "c.yaml")


def test_its_name_must_be_free(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its confirmation would be named 'tune-confirm' like another phase"):
        load(tmp_path, "", f"{OTHER}\n  - name: tune-confirm\n    {OTHER}")


def test_the_shipped_searches_have_their_confirmation_already() -> None:
    for path in (ROOT / "experiments").glob("*.yaml"):
        assert not [phase.name for phase in load_campaign(path).phases if phase.confirms], path
