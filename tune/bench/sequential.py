"""Simulates phases with `seeds: {until: decided}`: their cost, their power, and how often they give a false verdict."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune.analysis.noise import compare_arms
from tune.analysis.sequential import SequentialRule, last_looks, replay_looks
from tune.analysis.verdicts import holm
from tune.bench.campaigns import Metrics
from tune.storage.records import TrialOutcome

if TYPE_CHECKING:
    import numpy as np

GOOD_ARM = 5  # index of the arm with a true effect
WORLDS = {
    "none": ("same", 0.0),
    "1 sd": ("same", 1.0),
    "2 sd": ("same", 2.0),
    "3 sd": ("same", 3.0),
    "none, one arm 5 x": ("one", 0.0),
    "none, baseline 3 x": ("baseline", 0.0),
    "none, slope": ("slope", 0.0),
    "2 sd, one arm 5 x": ("one", 2.0),
}


@dataclass(frozen=True)
class Design:
    """The size of a simulated phase."""

    arms: int
    start: int
    most: int

    @property
    def rule(self) -> SequentialRule:
        """The rule of `until: decided`; every effect matters."""
        return SequentialRule(self.start, self.most, min_effect=0.0)


def sequential(*, trials: int = 500, arms: int = 12, start: int = 3, most: int = 30) -> Metrics:
    """Simulates phases with `seeds: {until: decided}`, in which one arm differs from the baseline or none does.

    trials: number of simulated phases per world. arms, start, most: size of the phase. Worlds: true effects in standard
    deviations of one trial, then worlds whose noise differs between arms, or acts along the sweep (slope). Returns for
    each world the mean number of trials (`trials`), the 90 % quantile (`trials_90`), the share of phases in which the
    good arm is better (`power`), in which any other arm is (`false_better`) or has any verdict (`any_false`), and by
    how much its effect is overestimated, in standard deviations (`optimism`). `fixed` has the power of phases with a
    fixed number of seeds for 2 sd, by number of trials.
    """
    design = Design(arms, start, most)
    worlds = {name: simulate(*world, design=design, phases=trials) for name, world in WORLDS.items()}
    fixed = {str(n * arms): fixed_power(2.0, n, design, phases=trials) for n in (start, 8, 10, 12, 14, 16, 20)}
    return worlds | {"fixed": fixed}


def simulate(world: str, effect: float, *, design: Design, phases: int, seed: int = 1) -> Metrics:
    """Runs `phases` phases in a world; see `sequential`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    names = [f"arm {i}" for i in range(design.arms)]
    cost, found, false_better, any_false, excess = [], 0, 0, 0, []
    for _ in range(phases):
        y = values(rng, world, effect, design)
        outcomes = {(arm, s): TrialOutcome("finished", x) for arm, row in zip(names, y, strict=True) for s, x in row}
        ids = {arm: [(arm, s) for s in range(design.most)] for arm in names}
        looks, n_seeds = replay_looks(ids, range(design.most), names[0], design.rule, outcomes.__getitem__)
        cost.append(sum(n_seeds.values()))
        rows = last_looks(looks)
        good = rows.pop(names[GOOD_ARM]) if effect else None
        if good is not None and good.decision == "better":
            found += 1
            excess.append(-(good.delta or 0.0) - effect)
        false_better += any(row.decision == "better" for row in rows.values())
        any_false += any(row.decision in ("better", "worse") for row in rows.values())
    return {
        "trials": float(np.mean(cost)),
        "trials_90": float(np.quantile(cost, 0.9)),
        "power": found / phases if effect else None,
        "false_better": false_better / phases,
        "any_false": any_false / phases,
        "optimism": float(np.mean(excess)) if excess else None,
    }


def values(rng: "np.random.Generator", world: str, effect: float, design: Design) -> list[list[tuple[int, float]]]:
    """Values of one phase by arm, each with its seed; seeds shift all arms alike by two standard deviations."""
    import numpy as np

    sd = np.ones(design.arms)
    if world == "one":
        sd[design.arms // 2] = 5.0
    if world == "baseline":
        sd[0] = 3.0
    y = 2 * rng.normal(size=design.most) + sd[:, None] * rng.normal(size=(design.arms, design.most))
    if world == "slope":
        y += np.linspace(0, 1, design.arms)[:, None] * 3 * rng.normal(size=design.most)
    y[GOOD_ARM] -= effect
    return [list(enumerate(row)) for row in y.tolist()]


def fixed_power(effect: float, n_seeds: int, design: Design, *, phases: int, seed: int = 1) -> float:
    """The power of phases in which every arm gets `n_seeds` seeds."""
    import numpy as np

    rng, found = np.random.default_rng(seed), 0
    for _ in range(phases):
        rows = values(rng, "same", effect, design)
        known = {f"arm {i}": dict(row[:n_seeds]) for i, row in enumerate(rows)}
        contrasts = compare_arms(known, "arm 0").contrasts
        corrected = dict(zip(contrasts, holm([contrast.p for contrast in contrasts.values()]), strict=True))
        found += corrected[f"arm {GOOD_ARM}"] < 0.05 and contrasts[f"arm {GOOD_ARM}"].difference < 0
    return found / phases
