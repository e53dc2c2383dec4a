"""How often the verdicts of a phase are wrong, and what they find, in simulated worlds of noise."""

from collections.abc import Callable, Mapping
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tune.analysis.readings import read_noise

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.05
LIMITS = {"homogeneous": 0.05}  # of phases with a false verdict; the limits of the other worlds follow
LIMIT, LIMIT_OF_THREE_SEEDS = 0.07, 0.10
POWER_LIMITS = {(12, 3): 0.50, (12, 5): 0.88}  # share of phases with this many arms and seeds that find 3 sd
CORRELATIONS = (0.0, 0.5, 0.95)  # share of the variance that seeds explain
BATCH = 1000  # phases simulated at once

Draw = Callable[["np.random.Generator", int, int, int], "np.ndarray"]


def verdicts(phases: int = 10_000) -> dict[str, Any]:
    """The share of phases without any effect that have a verdict `better` or `worse`, in six worlds of noise.

    Phases have 12 or 4 arms and 3, 5 or 8 seeds; seeds explain 0, 50 or 95 % of the variance. `error` maps world,
    design and correlation to the share, `power` maps design and effect to the share of phases that find one arm's
    effect. `broken` lists every limit that does not hold; a share may exceed its limit by two standard errors of the
    simulation.
    """
    import numpy as np

    rng = np.random.default_rng(2026)
    error: dict[str, dict[str, dict[str, float]]] = {}
    broken = []
    for world, arms, seeds in product(WORLDS, (12, 4), (3, 5, 8)):
        shares = {f"{r:g}": _error(rng, world, (arms, seeds), r, phases) for r in CORRELATIONS}
        error.setdefault(world, {})[f"{arms}x{seeds}"] = shares
        limit = LIMITS.get(world, LIMIT_OF_THREE_SEEDS if seeds == 3 else LIMIT)
        if max(shares.values()) > limit + _slack(limit, phases):
            broken.append(f"{world}, {arms}x{seeds}: false verdicts in {max(shares.values()):.3f}, limit {limit}")
    power: dict[str, dict[str, float]] = {}
    for arms, seeds in product((12, 4), (3, 5, 8)):
        found = {f"{effect} sd": _power(rng, (arms, seeds), effect, phases) for effect in (2, 3)}
        power[f"{arms}x{seeds}"] = found
        limit = POWER_LIMITS.get((arms, seeds), 0.0)
        if found["3 sd"] < limit - _slack(limit, phases):
            broken.append(f"{arms}x{seeds}: 3 sd found in {found['3 sd']:.3f}, limit {limit}")
    return {"phases": phases, "error": error, "power": power, "limits_held": not broken, "broken": broken}


def verdict_table(metrics: Mapping[str, Any]) -> str:
    """Formats what `verdicts` returns: a row for each design, with the mean over the correlations."""
    worlds = metrics["error"]
    rows: list[tuple[str, ...]] = [("arms x seeds", *worlds, "finds 2 sd", "finds 3 sd")]
    for design, found in metrics["power"].items():
        shares = [fmean(by_correlation[design].values()) for by_correlation in worlds.values()] + [*found.values()]
        rows.append((design, *(f"{share:.3f}" for share in shares)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    held = "all limits hold" if metrics["limits_held"] else "LIMITS BROKEN\n" + "\n".join(metrics["broken"])
    n = len(CORRELATIONS) * metrics["phases"]
    title = f"share of {n:,} phases without an effect that have a verdict better or worse, by world"
    return "\n".join([title, *lines, held])


# ---- worlds: values (phases, arms, seeds) without effects --------------------------------------------------------


def homogeneous(rng: "np.random.Generator", n: int, arms: int, seeds: int) -> "np.ndarray":
    """Normal noise with standard deviation 1 in all arms."""
    return rng.normal(size=(n, arms, seeds))


def one_noisy_arm(rng: "np.random.Generator", n: int, arms: int, seeds: int) -> "np.ndarray":
    """One arm has five times the noise of the others."""
    y = homogeneous(rng, n, arms, seeds)
    y[:, arms // 2] *= 5
    return y


def noisy_baseline(rng: "np.random.Generator", n: int, arms: int, seeds: int) -> "np.ndarray":
    """The baseline has three times the noise of the others."""
    y = homogeneous(rng, n, arms, seeds)
    y[:, 0] *= 3
    return y


def random_slope(rng: "np.random.Generator", n: int, arms: int, seeds: int) -> "np.ndarray":
    """Seeds act along the sweep: each tilts the arms by a slope of its own, 3 sd from the first to the last arm."""
    import numpy as np

    slope = rng.normal(0, 3, (n, 1, seeds))
    return homogeneous(rng, n, arms, seeds) + np.linspace(0, 1, arms)[:, None] * slope


def heavy_tails(rng: "np.random.Generator", n: int, arms: int, seeds: int) -> "np.ndarray":
    """Noise of Student's t with 3 degrees of freedom, scaled to standard deviation 1."""
    return rng.standard_t(3, (n, arms, seeds)) / 3**0.5


def one_arm_diverging(rng: "np.random.Generator", n: int, arms: int, seeds: int) -> "np.ndarray":
    """One arm explodes to finite values, log-normal around e^3 sd, with one or more of its seeds."""
    import numpy as np

    y = homogeneous(rng, n, arms, seeds)
    exploded = np.arange(seeds) < rng.integers(1, seeds + 1, (n, 1))
    y[:, arms // 2] += exploded * np.exp(rng.normal(3, 2, (n, seeds)))
    return y


WORLDS: dict[str, Draw] = {
    "homogeneous": homogeneous,
    "one arm 5 x": one_noisy_arm,
    "baseline 3 x": noisy_baseline,
    "random slope": random_slope,
    "t3 noise": heavy_tails,
    "one arm diverging": one_arm_diverging,  # its own verdict is not counted: it is worse
}


# ---- counting ----------------------------------------------------------------------------------------------------


def _error(rng: "np.random.Generator", world: str, design: tuple[int, int], correlation: float, phases: int) -> float:
    """The share of phases of a world with a false verdict, if seeds explain `correlation` of the variance."""
    wrong = 0
    shared = (correlation / (1 - correlation)) ** 0.5
    for n in _batches(phases):
        y = WORLDS[world](rng, n, *design) + shared * rng.normal(size=(n, 1, design[1]))
        wrong += int(_any_verdict(_p(y), design[0] // 2 if world == "one arm diverging" else None).sum())
    return wrong / phases


def _power(rng: "np.random.Generator", design: tuple[int, int], effect: float, phases: int) -> float:
    """The share of phases whose first step of Holm's method finds an effect of one arm."""
    found = 0
    for n in _batches(phases):
        y = homogeneous(rng, n, *design)
        y[:, 1] -= effect
        found += int((_p(y)[:, 1] * (design[0] - 1) < ALPHA).sum())
    return found / phases


def _p(y: "np.ndarray") -> "np.ndarray":
    """The p-values (phases, arms) of the product's rule; NaN for the baseline."""
    import numpy as np

    p = np.nanmax(read_noise(y, np.ones(y.shape[1:], dtype=bool), 0).p(), axis=0)
    p[:, 0] = np.nan
    return p


def _any_verdict(p: "np.ndarray", ignored: int | None) -> "np.ndarray":
    """Whether Holm's method rejects any arm but `ignored`, (phases,)."""
    import numpy as np

    comparisons = np.full(len(p), p.shape[1] - 1)
    if ignored is not None:
        comparisons -= p[:, ignored] * comparisons < ALPHA  # Holm's next step, if the first rejects this arm
        p = np.delete(p, ignored, axis=1)
    return np.nanmin(p, axis=1) * comparisons < ALPHA


def _batches(phases: int) -> list[int]:
    return [BATCH] * (phases // BATCH) + [phases % BATCH] * bool(phases % BATCH)


def _slack(limit: float, phases: int) -> float:
    """Two standard errors of a simulated share."""
    return 2 * (limit * (1 - limit) / phases) ** 0.5
