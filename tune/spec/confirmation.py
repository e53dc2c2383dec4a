"""The phase that compares the best arm of a search with the baseline again, on seeds that the search has not seen.

A search picks the luckiest of many arms, so its own estimate is too good, and its correction for many arms is strict.
Two arms on fresh seeds give an estimate without that bias. A search with `method: random` or `optuna` gets such a phase
unless it says `confirm: false`, or another phase of the file compares its best arm on other seeds anyway.

Phases that inherit the search start from the arm with the better mean of its confirmation, whatever the verdict: to go
on with one of the two is a choice, not a claim. docs/statistics-seeds.md has what other rules cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ngpt.config.base import Location, Problem
from tune.spec.reading import Reading
from tune.spec.schema import FreshSeeds, Phase, SeedRule, UntilDecided
from tune.spec.seeds import read_seed_rule

SUFFIX = "-confirm"  # of the phase's name
DEFAULT_SEEDS = FreshSeeds()  # as many as find the effect of the winner again


def read_confirm(search: Any, at: Location, seeds: SeedRule) -> Reading[SeedRule | None]:
    """Reads `confirm:` of a search on `seeds`: the seeds of its confirmation, or None if it gets none."""
    value, where = search.get("confirm", True) if isinstance(search, Mapping) else False, (*at, "confirm")
    if isinstance(value, bool):
        return DEFAULT_SEEDS if value else None
    rule = yield from read_seed_rule(value, where)
    if rule != () and not _are_unseen(rule, seeds):
        yield Problem(where, "a confirmation needs seeds that the search has not seen, such as `fresh 5`")
    return rule


def confirmation_of(phase: Phase, seeds: SeedRule) -> Phase:
    """The phase that confirms the best arm of a search phase."""
    return Phase(
        phase.name + SUFFIX,
        phase.inherit,
        phase.pinned,
        (),
        seeds,
        {},
        hold=phase.hold,
        origins=phase.origins,
        has_own_seeds=True,
        confirms=phase.name,
        hands_on_best=True,
    )


def is_confirmed_by(phase: Phase, others: Sequence[Phase]) -> bool:
    """Whether other phases of the file compare the best arm of a search phase on other seeds, and none starts from it.

    A phase without seeds of its own that compares this arm gets others (tune/spec/inherited_seeds.py).
    """
    comparing = [other for other in others if phase.name in [arm.inherit for arm in other.arms]]
    is_compared = any(not other.has_own_seeds or _are_unseen(other.seeds, phase.seeds) for other in comparing)
    return is_compared and phase.name not in [other.inherit for other in others]


def start_from(phase: Phase, confirmations: Mapping[str, str]) -> Phase:
    """The phase, with the confirmation of each search that it or one of its arms inherits in place of the search."""
    arms = (replace(arm, inherit=confirmations.get(arm.inherit or "", arm.inherit)) for arm in phase.arms)
    return replace(phase, inherit=confirmations.get(phase.inherit or "", phase.inherit), arms=tuple(arms))


def _are_unseen(seeds: SeedRule, seen: SeedRule) -> bool:
    """Whether seeds are fresh, or listed and none of those that another phase lists."""
    if isinstance(seeds, FreshSeeds) or (isinstance(seeds, UntilDecided) and seeds.fresh):
        return True
    listed = set(range(1, seeds.most + 1)) if isinstance(seeds, UntilDecided) else set(seeds)
    others = set(seen) if isinstance(seen, tuple) else set(range(1, seen.most + 1))
    return not listed & others
