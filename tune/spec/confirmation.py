"""The phase that compares the best arm of a search with the baseline again, on seeds that the search has not seen.

A search picks the luckiest of many arms, so its own estimate is too good, and its correction for many arms is strict.
Two arms on fresh seeds give an estimate without that bias. A search with `method: random` or `optuna` gets such a phase
unless it says `confirm: false`, or a later phase of the file compares its winner on other seeds anyway.
"""

from collections.abc import Iterable, Mapping
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
    )


def is_confirmed_by(phase: Phase, others: Iterable[Phase]) -> bool:
    """Whether another phase of the file uses the winner of a search phase on other seeds.

    A phase without seeds of its own that compares this winner gets others (tune/spec/inherited_seeds.py).
    """
    for other in others:
        compares = phase.name in [arm.inherit for arm in other.arms]
        is_shifted = compares and not other.has_own_seeds
        if (compares or phase.name == other.inherit) and (is_shifted or _are_unseen(other.seeds, phase.seeds)):
            return True
    return False


def _are_unseen(seeds: SeedRule, seen: SeedRule) -> bool:
    """Whether seeds are fresh, or listed and none of those that another phase lists."""
    if isinstance(seeds, FreshSeeds) or (isinstance(seeds, UntilDecided) and seeds.fresh):
        return True
    listed = set(range(1, seeds.most + 1)) if isinstance(seeds, UntilDecided) else set(seeds)
    others = set(seen) if isinstance(seen, tuple) else set(range(1, seen.most + 1))
    return not listed & others
