"""`combine: {from: [alpha, optimisation]}`: greedily joins the arms that were better in earlier phases.

The better arms are sorted by their gain over their own baselines. Each prefix of that order becomes an arm, named like
`alpha=0.28 + project_every=7`. An arm is skipped if it changes a setting that an arm before it has changed, or if the
joined config is invalid (for example a width that the number of heads does not divide).

All prefixes are planned at once, so they can run in parallel, and the plan depends only on the verdicts in the journal.
Only an arm's own overrides are joined, not those that its phase inherited.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tune.spec.sweeps import ArmSpec
from tune.storage.records import BetterArm


def join_better_arms(
    better_arms: Sequence[BetterArm], is_valid: Callable[[Mapping[str, Any]], bool] = lambda overrides: True
) -> list[ArmSpec]:
    """The arms of a combining phase, each adding one better arm to the previous ones if the result `is_valid`."""
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
