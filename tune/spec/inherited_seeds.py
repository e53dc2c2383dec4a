"""Gives a phase that starts from the winner of another phase seeds that did not choose this winner.

A winner is partly lucky on the seeds of its phase. If it were the baseline of the next phase with the same trials, its
luck would be in every difference: with eight equal good arms, 7 % of such phases have a false `worse`
(docs/statistics-seeds.md). So a phase without `seeds:` that uses another phase adds a multiple of `SHIFT` to the seeds
of the campaign. Seeds that a phase lists itself are used as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tune.spec.schema import Phase
from tune.storage.winners import InheritedWinner

SHIFT = 1000


def shift_inherited_seeds(phases: Sequence[Phase], winners: Mapping[str, InheritedWinner]) -> tuple[Phase, ...]:
    """Shifts the seeds of phases that share them with a phase they depend on; `phases` are in dependency order.

    `winners` are those of other results directories, by path.
    """
    shifted: dict[str, Phase] = {}
    used: dict[str, set[int]] = {path: set(winner.seeds) for path, winner in winners.items()}  # ancestors included
    for phase in phases:
        earlier = set[int]().union(*(used[name] for name in phase.sources))
        while _may_shift(phase) and earlier & set(phase.known_seeds or ()):
            phase = replace(phase, seed_shift=phase.seed_shift + SHIFT)
        used[phase.name], shifted[phase.name] = earlier | set(phase.known_seeds or ()), phase
    return tuple(shifted.values())


def _may_shift(phase: Phase) -> bool:
    """Whether the phase itself lists no seeds."""
    return not (phase.has_own_seeds and isinstance(phase.seeds, tuple))


def keep_shift(phase: Phase, before: Sequence[int]) -> Phase:
    """The phase with the shift that a results directory gave it, perhaps none, when it planned it with `before`."""
    known = replace(phase, seed_shift=0).known_seeds
    if _may_shift(phase) and known and before:
        offsets = (min(before) - seed for seed in known)
        kept = (offset for offset in offsets if offset >= 0 and offset % SHIFT == 0)
        return replace(phase, seed_shift=next(kept, phase.seed_shift))
    return phase
