"""A phase that starts from a winner does not use the seeds that chose this winner."""

from collections.abc import Callable
from dataclasses import replace

from tune.spec.inherited_seeds import keep_shift, shift_inherited_seeds
from tune.spec.schema import Campaign
from tune.storage.winners import InheritedWinner

CHAIN = """\
campaign: c
base: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 8, steps: 10}
phases:
  - {name: a, vary: {alpha: [0.5]}}
  - {name: b, inherit: a, vary: {lr: [1]}}
  - {name: twin, inherit: a, vary: {lr: [2]}}
  - {name: joined, combine: {from: [b, twin]}}
  - {name: listed, inherit: a, seeds: [3, 4], vary: {lr: [1]}}
  - {name: after, inherit: listed, vary: {lr: [3]}}
  - {name: race, inherit: a, seeds: {until: decided, most: 5}, vary: {lr: [1]}}
  - {name: apart, vary: {lr: [4]}}
"""

Load = Callable[[str], Campaign]


def seeds_of(campaign: Campaign) -> dict[str, tuple[int, ...] | None]:
    return {phase.name: phase.known_seeds for phase in campaign.phases}


def test_each_phase_that_uses_another_gets_seeds_that_chose_none_of_its_winners(load: Load) -> None:
    seeds = seeds_of(load(CHAIN))
    assert seeds["a"] == seeds["apart"] == (1, 2, 3)
    assert seeds["b"] == seeds["twin"] == (1001, 1002, 1003)
    assert seeds["joined"] == (2001, 2002, 2003)
    assert seeds["race"] == (1001, 1002, 1003, 1004, 1005)


def test_seeds_that_a_phase_lists_mean_what_they_say(load: Load) -> None:
    seeds = seeds_of(load(CHAIN))
    assert seeds["listed"] == (3, 4)
    assert seeds["after"] == (1001, 1002, 1003)  # neither those of `a` nor those of `listed`


def test_other_seeds_than_those_of_the_winner_stay(load: Load) -> None:
    text = CHAIN.replace("{name: a,", "{name: a, seeds: [7, 8],").replace("[3, 4]", "[9]")
    assert seeds_of(load(text))["b"] == (1, 2, 3)


def test_shifted_seeds_stay_in_the_range_of_seeds(load: Load) -> None:
    seeds = seeds_of(load(CHAIN.replace("base:", "seeds: [2147483647]\nbase:", 1)))
    assert seeds["b"] == (999,)


def test_seeds_of_a_winner_of_another_results_directory_count_too(load: Load) -> None:
    (phase,) = load(CHAIN[: CHAIN.index("  - {name: b")]).phases
    winner = InheritedWinner("other", "x", "alpha=0.5", {"model.alpha": 0.5}, "2026-01-01", seeds=(1, 1002))
    (shifted,) = shift_inherited_seeds([replace(phase, inherit="results/other/x")], {"results/other/x": winner})
    assert shifted.known_seeds == (2001, 2002, 2003)


def test_a_directory_that_was_begun_with_the_same_seeds_keeps_them(load: Load) -> None:
    phases = {phase.name: phase for phase in load(CHAIN).phases}
    assert keep_shift(phases["b"], [1, 2, 3]).known_seeds == (1, 2, 3)
    assert keep_shift(phases["b"], [1, 2]).known_seeds == (1, 2, 3)
    assert keep_shift(phases["b"], [2001, 2002]).known_seeds == (2001, 2002, 2003)
    assert keep_shift(phases["b"], []).known_seeds == (1001, 1002, 1003)
    assert keep_shift(phases["listed"], [1, 2, 3]).known_seeds == (3, 4)
