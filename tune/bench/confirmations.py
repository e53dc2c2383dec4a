"""Simulates what happens after a phase: confirmations that are repeated, and winners that the next phase inherits.

Values are a seed effect (standard deviation 2) plus noise of standard deviation 1. Phases are judged by the readings of
tune/analysis/noise.py with Holm's correction; confirmations compare a winner with its baseline on fresh seeds.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import fdtri, stdtr, stdtrit

from tune.analysis.power import POWER, Design, power
from tune.analysis.readings import read_noise
from tune.analysis.selection import shrunken_effect
from tune.analysis.variances import GROSS
from tune.planning.seeds import level_of_look
from tune.session.fresh_seeds import BORROWED_WEIGHT
from tune.spec.schema import FEWEST_FRESH, MOST_FRESH

ALPHA = 0.05
SEEDS, ARMS = 3, 12  # of a sweep, with its baseline
CONFIRM_SEEDS = 4
SEED_SD = 2.0
EDITS = (1, 5, 10, 20)  # after which false confirmations are counted
WORLDS = {"same": (1, 1), "winner_3x": (3, 1), "winner_5x": (5, 1), "baseline_3x": (1, 3)}  # sd of winner, baseline
EQUAL_ARMS = 8  # of a chained phase, besides the baseline
DRAWS = {  # mean and sd of the true differences of a search's draws from its baseline; negative is better
    **{"no_difference": (0, 0), "like_the_base": (0, 1), "wide": (2, 2)},
    **{"worse": (1, 1), "much_worse": (2, 0.5)},
}


class Judged(NamedTuple):
    """R phases of A arms and a baseline: differences, their errors and degrees of freedom, and Holm's p."""

    difference: np.ndarray  # (R, A)
    error: np.ndarray
    df: np.ndarray
    p_holm: np.ndarray

    def winners(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest arm of each phase, and whether it is better."""
        best = self.difference.argmin(1)
        rows = np.arange(len(best))
        return best, (self.p_holm[rows, best] < ALPHA) & (self.difference[rows, best] < 0)


def confirmations(*, rounds: int = 2000) -> dict[str, Any]:
    """False confirmations, false `worse` and biased winners of chained phases, power, and what searches hand on."""
    rng = np.random.default_rng(7)
    return {
        **edit_and_confirm(rounds, rng),
        **inherited_luck(rounds, rng),
        **winners_estimates(rounds, rng),
        **confirmation_of_worlds(10 * rounds, rng),
        **default_seeds(rounds, rng),
        **handed_on(rounds, np.random.default_rng(8)),
    }


# ---- editing and confirming again ----------------------------------------------------------------------------------


def edit_and_confirm(rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Share of researchers with a false confirmation after so many edits, without any true effect.

    Each edit sweeps other arms and confirms the best of them against the same baseline, whatever its verdict.
    """
    edits = max(EDITS)
    fixed = np.zeros((rounds, edits), dtype=bool)
    fresh, spent, borrowed = fixed.copy(), fixed.copy(), fixed.copy()
    baseline = rng.normal(size=(rounds, CONFIRM_SEEDS))  # on the seeds that follow from the name of the phase
    for look in range(edits):
        sweep = judge_phases(_values(rng, np.zeros((rounds, ARMS))))
        best, _ = sweep.winners()
        prior = prior_of_winner(sweep, best, SEEDS)
        arm, other = rng.normal(size=(2, rounds, CONFIRM_SEEDS))
        level = level_of_look(ALPHA, look + 1)
        fixed[:, look] = is_confirmed(arm - baseline, ALPHA)
        fresh[:, look] = is_confirmed(arm - other, ALPHA)
        spent[:, look] = is_confirmed(arm - other, level)
        borrowed[:, look] = is_confirmed(arm - other, level, prior)
    rules = {"same_seeds": fixed, "fresh_seeds": fresh, "fresh_and_counted": spent, "with_borrowed_noise": borrowed}
    return {
        f"false_confirmation_{name}_{n}_edits": float(found[:, :n].any(1).mean())
        for name, found in rules.items()
        for n in EDITS
    }


def is_confirmed(
    difference: np.ndarray, level: float, prior: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Whether paired differences (R, n) are below 0 at the two-sided `level`; as `compare_arms` judges two arms."""
    n = difference.shape[1]
    variance, df = difference.var(1, ddof=1), np.full(len(difference), n - 1.0)
    if prior is not None:
        prior_df, prior_variance = prior
        gross = variance > fdtri(n - 1, prior_df, GROSS) * prior_variance
        moderated = (prior_df * prior_variance + (n - 1) * variance) / (prior_df + n - 1)
        variance, df = np.where(gross, variance, moderated), np.where(gross, df, df + prior_df)
    t = difference.mean(1) / np.sqrt(variance / n)
    return stdtr(df, t) < level / 2


def prior_of_winner(sweep: Judged, best: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What a confirmation borrows: df and variance of the winner's difference, by its most cautious reading."""
    rows = np.arange(len(best))
    return BORROWED_WEIGHT * sweep.df[rows, best], sweep.error[rows, best] ** 2 * n


# ---- chained phases ------------------------------------------------------------------------------------------------


def inherited_luck(rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Share of second phases with a false `worse`, if its baseline is the best of eight equal good arms.

    The arms of the second phase are as good as its baseline. The baseline has the trials with which it won, or it is
    trained again with all arms on other seeds.
    """
    shared = SEED_SD * rng.normal(size=(rounds, 1, SEEDS))
    means = np.tile([0.0] + [-3.0] * EQUAL_ARMS, (rounds, 1))
    first = means[:, :, None] + shared + rng.normal(size=(rounds, 1 + EQUAL_ARMS, SEEDS))
    best, is_better = judge_phases(first).winners()
    rows = np.flatnonzero(is_better)
    shares = {}
    for name in ("same_trials", "other_seeds"):
        second = shared[rows] - 3.0 + rng.normal(size=(len(rows), 1 + EQUAL_ARMS, SEEDS))
        if name == "same_trials":
            second[:, 0] = first[rows, 1 + best[rows]]
        judged = judge_phases(second)
        significant = judged.p_holm < ALPHA
        shares[f"false_worse_{name}"] = float((significant & (judged.difference > 0)).any(1).mean())
        shares[f"false_better_{name}"] = float((significant & (judged.difference < 0)).any(1).mean())
    return shares


def winners_estimates(rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean error of the winner's difference in three chained phases of eight equal arms, in standard deviations.

    Each arm is better than its baseline by `effect`; negative errors are too good. Phases after the first train their
    baseline on other seeds, so each is a phase of its own.
    """
    errors = {}
    for effect in (2.0, 3.0):
        for phase in (1, 2, 3):
            judged = judge_phases(_values(rng, np.tile([0.0] + [-effect] * EQUAL_ARMS, (rounds, 1))))
            best, is_better = judged.winners()
            rows = np.flatnonzero(is_better)
            naive = judged.difference[rows, best[rows]]
            shrunken = np.array([-_shrunken(judged, int(row), int(best[row])) for row in rows])
            for name, estimate in {"observed": naive, "shrunken": shrunken}.items():
                errors[f"error_of_winner_{effect:g}sd_phase{phase}_{name}"] = float((estimate + effect).mean())
    return errors


def _shrunken(judged: Judged, row: int, best: int) -> float:
    names = [str(i) for i in range(judged.difference.shape[1])]
    effects = dict(zip(names, (-judged.difference[row]).tolist(), strict=True))
    errors = dict(zip(names, judged.error[row].tolist(), strict=True))
    quantile = float(stdtrit(judged.df[row, best], 1 - ALPHA / 2 / len(names)))
    threshold = errors[str(best)] * quantile
    return shrunken_effect(effects, str(best), standard_errors=errors, threshold=threshold)


# ---- power ---------------------------------------------------------------------------------------------------------


def confirmation_of_worlds(rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """False confirmation and power of four seeds, with and without the noise of the phase that found the winner."""
    shares = {}
    for world, (winner_sd, baseline_sd) in WORLDS.items():
        sd = np.ones(ARMS)
        sd[0], sd[1] = baseline_sd, winner_sd
        sweep = judge_phases(_values(rng, np.zeros((rounds, ARMS)), sd))
        prior = prior_of_winner(sweep, np.zeros(rounds, dtype=int), SEEDS)  # arm 1 wins in all of them
        noise = rng.normal(size=(rounds, CONFIRM_SEEDS)) * float(np.hypot(winner_sd, baseline_sd))
        for effect in (0, 2, 3) if world == "same" else (0,):
            name = f"{'false' if not effect else f'power_{effect}sd'}_confirmation_4_seeds_{world}"
            shares[f"{name}_own_noise"] = float(is_confirmed(noise - effect, ALPHA).mean())
            shares[f"{name}_borrowed_noise"] = float(is_confirmed(noise - effect, ALPHA, prior).mean())
    return shares


def default_seeds(rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Number of seeds that `seeds: fresh` chooses for a winner with this true effect, and the share confirmed."""
    shares = {}
    for effect in (1.5, 2.0, 3.0):
        sweep = judge_phases(_values(rng, np.tile([0.0, -effect] + [0.0] * (ARMS - 2), (rounds, 1))))
        best, is_better = sweep.winners()
        rows = np.flatnonzero(is_better & (best == 0))[: min(rounds, 500)]
        df, variance = prior_of_winner(sweep, best, SEEDS)
        numbers, found = [], []
        for row in rows:
            shown = _shrunken(sweep, int(row), int(best[row]))
            design = Design(2, (float(variance[row]) / 2) ** 0.5, "paired", 1 - ALPHA, 0.0, float(df[row]))
            sizes = range(FEWEST_FRESH, MOST_FRESH)
            n = next((n for n in sizes if power(shown, n, design) >= POWER), MOST_FRESH)
            difference = rng.normal(size=(1, n)) * 2**0.5 - effect
            numbers.append(n)
            found.append(is_confirmed(difference, ALPHA, (df[row : row + 1], variance[row : row + 1]))[0])
        shares[f"default_seeds_{effect:g}sd_median"] = float(np.median(numbers))
        shares[f"default_seeds_{effect:g}sd_confirmed"] = float(np.mean(found))
    return shares


def handed_on(rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean true difference from the baseline of what a search hands on to later phases, by three rules.

    `better`: the best arm if its verdict is `better`. `best_mean`: the best arm if its mean is below that of the
    baseline. `confirmed`: this arm if its mean on fresh seeds is below that of the baseline again. `oracle` is the best
    of the true differences. In each case the baseline is handed on otherwise.
    """
    found = {}
    for world, (mean, sd) in DRAWS.items():
        true = mean + sd * rng.normal(size=(rounds, ARMS))
        judged = judge_phases(_values(rng, np.hstack([np.zeros((rounds, 1)), true])))
        best, is_better = judged.winners()
        rows = np.arange(rounds)
        chosen, is_lower = true[rows, best], judged.difference[rows, best] < 0
        again = chosen + rng.normal(size=rounds) * (2 / CONFIRM_SEEDS) ** 0.5
        rules = {"better": is_better, "best_mean": is_lower, "confirmed": is_lower & (again < 0)}
        shares = {name: float(np.where(is_chosen, chosen, 0.0).mean()) for name, is_chosen in rules.items()}
        shares["oracle"] = float(np.minimum(true.min(1), 0.0).mean())
        found |= {f"handed_on_{world}_{name}": value for name, value in shares.items()}
    return found


# ---- phases --------------------------------------------------------------------------------------------------------


def judge_phases(values: np.ndarray) -> Judged:
    """Judges R phases (R, 1 + A, S), baseline first, by the largest p of all readings."""
    readings = read_noise(values, np.ones(values.shape[1:], dtype=bool), 0)
    p = np.nan_to_num(readings.p()[:, :, 1:], nan=-1.0)
    chosen = p.argmax(0)[None]
    error, df = (np.take_along_axis(x[:, :, 1:], chosen, 0)[0] for x in (readings.standard_error, readings.df))
    return Judged(readings.difference[:, 1:], error, df, holm(np.take_along_axis(p, chosen, 0)[0]))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction of p-values (R, A) within each row."""
    order = p.argsort(1)
    scaled = np.take_along_axis(p, order, 1) * (p.shape[1] - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(scaled, 1), 1.0), 1)
    return adjusted


def _values(rng: np.random.Generator, means: np.ndarray, sd: np.ndarray | float = 1.0) -> np.ndarray:
    """Values (R, 1 + A, S) of phases whose arms have these true means (R, 1 + A)."""
    spread = np.broadcast_to(np.asarray(sd, dtype=float), means.shape[1:])[:, None]
    shared = SEED_SD * rng.normal(size=(len(means), 1, SEEDS))
    return means[:, :, None] + shared + spread * rng.normal(size=(*means.shape, SEEDS))
