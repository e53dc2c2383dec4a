"""Which phases start from which winners, and the check of every config that this can lead to.

What a phase inherits is known only during the run. So each arm of an earlier phase is taken for its winner in turn: a
mistake shows before anything is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain, islice, product
from typing import Any

from ngpt.config.base import Location, Problem
from tune import format as fmt
from tune.spec.phase_reader import PhasesInFile
from tune.spec.reading import LocatedSettings, Reading
from tune.spec.schema import Phase
from tune.spec.sweeps import BASELINE, ArmSpec
from tune.spec.validation import ConfigChecker

MOST_COMBINATIONS = 10_000  # of arms that inherit and ways in which earlier phases may end; a second at most
MOST_JOINED = 100  # arms of a combining phase that another one joins

Phases = Mapping[str, Phase]  # by name, or by path in another results directory


def check_circles(file: PhasesInFile) -> Reading[None]:
    """Phases that inherit from each other."""
    graph = {phase.name: sorted(phase.needs) for phase in file.phases}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][:0:-1]  # each phase inherits from the next one, the last from the first
        first = min(range(len(circle)), key=lambda i: list(graph).index(circle[i]))
        circle = [*circle[first:], *circle[: first + 1]]
        yield Problem(file.references[circle[0], circle[1]], f"phases inherit in a circle: {' -> '.join(circle)}")


def order_by_need(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Phases without circles, each after those it needs, otherwise as written."""
    done: dict[str, Phase] = {}
    while len(done) < len(phases):
        phase = next(phase for phase in phases if phase.name not in done and phase.needs <= done.keys())
        done[phase.name] = phase
    return tuple(done.values())


def check_configs(checker: ConfigChecker, file: PhasesInFile, *, inherited: bool) -> Reading[None]:
    """Builds every config that the campaign may train; without `inherited`, only those on top of the plain base."""
    for phase in file.phases:
        for arm in _arms(phase):
            yield from checker.check(_located(phase) | _located(arm))
    if not inherited:
        return
    phases = {phase.name: phase for phase in file.phases}
    for path, (winner, at) in file.winners.items():  # as the only arm of a phase
        arm = ArmSpec("winner", winner.overrides, origins=dict.fromkeys(winner.overrides, at))
        phases[path] = Phase(path, None, {}, (arm,), (), {})
    for phase in file.phases:
        inheriting = ((arm, start) for arm in _arms(phase) for start in _starts(phase, arm, phases) if start)
        for arm, start in islice(inheriting, MOST_COMBINATIONS // len(file.phases)):
            values = fmt.settings({name: value for name, (value, _) in start.items()})
            changes = _located(phase) | _located(arm)
            yield from checker.check(changes, start=start, note=f" (after {values} has won)")


def _arms(phase: Phase) -> Iterator[ArmSpec]:
    """The arms of a phase; for arms that a search will propose, the ends of its space."""
    yield from (BASELINE, *phase.arms)
    yield from phase.search.probes() if phase.search else ()


def _located(part: Phase | ArmSpec) -> dict[str, tuple[Any, Location]]:
    """What an arm or `set:` changes, with the place of each setting."""
    changes = part.pinned if isinstance(part, Phase) else part.overrides
    return {name: (value, part.origins.get(name, ())) for name, value in changes.items()}


def _starts(phase: Phase, arm: ArmSpec, phases: Phases) -> Iterator[LocatedSettings]:
    """What an arm may start from: each possible winner of the phases that its phase and the arm itself inherit from."""
    for outer in _winners(phase.inherit, phases):
        for inner in _winners(arm.inherit, phases):
            yield {**outer, **inner}


def _winners(name: str | None, phases: Phases) -> Iterator[LocatedSettings]:
    """What each arm of a phase would hand on if it won; without a phase, nothing."""
    if name is None:
        yield {}
        return
    phase = phases[name]
    for arm in chain(_arms(phase), _joined(phase, phases, {})):  # lazily: the joined arms may be too many to list
        for start in _starts(phase, arm, phases):
            kept = {setting: value for setting, value in start.items() if setting not in phase.pinned}
            yield kept | _located(arm)


def _joined(phase: Phase, phases: Phases, known: dict[str, tuple[ArmSpec, ...]]) -> Iterator[ArmSpec]:
    """Arms that a combining phase may get: at most one of each phase that it joins.

    A joined phase that combines others itself contributes MOST_JOINED arms, kept in `known`.
    """
    for name in phase.combine:
        if name not in known:
            known[name] = tuple(islice(_joined(phases[name], phases, known), MOST_JOINED))
    sources = [(BASELINE, *phases[name].arms, *known[name]) for name in phase.combine]
    for chosen in product(*sources) if sources else ():
        overrides = {name: value for arm in chosen for name, value in arm.overrides.items()}
        origins = {name: at for arm in chosen for name, at in arm.origins.items()}
        yield ArmSpec(" + ".join(arm.name for arm in chosen), overrides, None, origins)
