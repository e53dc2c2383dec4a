"""Importance of settings: the share of a sweep's variance that each setting explains.

On a complete grid this is the functional ANOVA decomposition of Hutter, Hoos and Leyton-Brown (ICML 2014): the variance
of a setting's marginal means divided by the total variance; the remainder is interactions and noise. In other sweeps
(a search, a grid with missing arms) each setting gets a one-way ANOVA of its own, and its share is corrected for the
variance that chance would explain (Kelley's epsilon squared, 1935).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

from tune.storage.summaries import PhaseSummary

if TYPE_CHECKING:
    import numpy as np

MAX_LEVELS = 6  # a numeric setting with more values is binned at its quartiles


@dataclass(frozen=True)
class Importance:
    """The share of the variance that each setting explains."""

    shares: dict[str, float]  # by setting, largest first
    rest: float | None  # share that no single setting explains; None if the shares overlap
    method: str
    arms: int  # number of arms used


def sweep_axes(phase: PhaseSummary) -> list[str]:
    """The settings that every swept arm sets and that vary; fewer than two for `vary` and lists of runs."""
    swept = [arm.overrides for arm in phase.arms if arm.overrides]
    common = [name for name in (swept[0] if swept else {}) if all(name in overrides for overrides in swept)]
    return [name for name in common if len({repr(overrides[name]) for overrides in swept}) > 1]


def axis_importance(phase: PhaseSummary) -> Importance | None:
    """Decomposes the variance of the arms' mean scores; None if there are too few settings or arms, or no variance."""
    import numpy as np

    axes = sweep_axes(phase)
    arms = [arm for arm in phase.arms if arm.overrides and arm.score.mean is not None]
    if len(axes) < 2 or len(arms) < 4:
        return None
    scores = np.array([arm.score.mean for arm in arms], dtype=float)
    total = float(((scores - scores.mean()) ** 2).sum())
    columns = [[arm.overrides[name] for arm in arms] for name in axes]
    codes = [_codes(column) for column in columns]
    is_grid = len(arms) == prod(len(set(column)) for column in codes) == len(set(zip(*codes, strict=True)))
    levels = codes if is_grid else [_levels(column) for column in columns]
    if total <= (1e-12 * float(np.abs(scores).max())) ** 2 or any(len(set(column)) >= len(arms) for column in levels):
        return None
    shares = [_share(scores, total, column, corrected=not is_grid) for column in levels]
    ranked = sorted(zip(axes, shares, strict=True), key=lambda pair: -pair[1])
    method = "functional ANOVA of the complete grid" if is_grid else "one-way decomposition, corrected for chance"
    return Importance(dict(ranked), max(0.0, 1 - sum(shares)) if is_grid else None, method, len(arms))


def _share(scores: "np.ndarray", total: float, codes: Sequence[int], *, corrected: bool) -> float:
    """The variance between the levels of a setting divided by the total variance."""
    import numpy as np

    codes_array = np.array(codes)
    groups = [scores[codes_array == code] for code in sorted(set(codes))]
    between = float(sum(len(group) * (group.mean() - scores.mean()) ** 2 for group in groups))
    if corrected:
        df = len(groups) - 1
        between -= df * (total - between) / (len(scores) - len(groups))
    return min(1.0, max(0.0, between / total))


def _levels(column: Sequence[Any]) -> list[int]:
    """The level of each arm, as an integer code; more than `MAX_LEVELS` distinct numbers are binned at quartiles."""
    import numpy as np

    codes = _codes(column)
    if len(set(codes)) <= MAX_LEVELS or not all(is_number(value) for value in column):
        return codes
    edges = np.quantile(column, [0.25, 0.5, 0.75])
    return np.searchsorted(edges, column, side="left").tolist()


def _codes(column: Sequence[Any]) -> list[int]:
    keys = [repr(value) for value in column]
    distinct = list(dict.fromkeys(keys))
    return [distinct.index(key) for key in keys]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
