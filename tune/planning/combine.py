"""`combine: {from: [alpha, optimisation]}`: joins the arms that were better in earlier phases, greedily.

The better arms are sorted by their gain over their own baselines. Each prefix of that order is an arm, named like
`alpha=0.28 + project_every=7`. An arm is skipped if it changes a setting that a better arm has changed, or cannot be
joined to those before it (for example a width that the number of heads does not divide).

All prefixes are planned at once, so they run in parallel, and the plan is a pure function of the verdicts in the
journal. Only an arm's own changes are joined, not what its phase inherited.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tune.spec.sweeps import ArmSpec
from tune.storage.records import BetterArm


def join_better_arms(
    better_arms: Sequence[BetterArm], is_valid: Callable[[Mapping[str, Any]], bool] = lambda overrides: True
) -> list[ArmSpec]:
    """The arms of a combining phase: each adds an arm to those before it. Joins that are not `is_valid` are skipped."""
    arms: list[ArmSpec] = []
    names: list[str] = []
    overrides: dict[str, Any] = {}
    for better in sorted(better_arms, key=lambda better: (-better.gain, better.arm)):
        joined = overrides | dict(better.overrides)
        if overrides.keys().isdisjoint(better.overrides) and better.overrides and is_valid(joined):
            overrides = joined
            names.append(better.arm)
            arms.append(ArmSpec(" + ".join(names), dict(overrides)))
    return arms
