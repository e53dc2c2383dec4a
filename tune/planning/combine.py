"""`combine: {from: [alpha, optimisation]}`: joins the arms that were better in earlier phases, greedily.

The arms that these phases found better are put in order of what they gained over their own baselines. The first arm of
the new phase is the best of them, the second adds the next best, and so on: every prefix of that order, named like
`alpha=0.28 + project_every=7`. An arm that touches a setting which a better one has settled is left out, and so is one
that cannot be joined to those before it (a width that the number of heads does not divide).

All prefixes are planned at once and measured together, on paired seeds, against the phase's baseline. So they run in
parallel, the plan is a pure function of the verdicts in the journal, and a resumed campaign has the same trials. The
verdicts pick the winner among the prefixes; those that cannot be told from it are named in the phase's `why`. An arm's
own changes are joined, not what its phase had inherited: name that phase in `from` too, or `inherit:` it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tune.spec.sweeps import ArmSpec
from tune.storage.records import BetterArm


def join_better_arms(
    found: Sequence[BetterArm], possible: Callable[[Mapping[str, Any]], bool] = lambda overrides: True
) -> list[ArmSpec]:
    """The arms of a combining phase: each adds one arm to those before it; `possible` says whether a join may be."""
    arms: list[ArmSpec] = []
    names: list[str] = []
    overrides: dict[str, Any] = {}
    for better in sorted(found, key=lambda better: (-better.gain, better.arm)):
        joined = overrides | dict(better.overrides)
        if overrides.keys().isdisjoint(better.overrides) and better.overrides and possible(joined):
            overrides = joined
            names.append(better.arm)
            arms.append(ArmSpec(" + ".join(names), dict(overrides)))
    return arms
