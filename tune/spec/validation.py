"""Checks of phases, and of every config that the campaign may train.

What a phase inherits is known only during the run. So each arm of an earlier phase is taken for its winner in turn: a
mistake shows before anything is trained. Each problem is reported where the value to blame was written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain, islice, product
from typing import Any

from ngpt.config.base import ConfigError, Location, Problem, build, dotted_name, settings
from ngpt.data import dataset as corpora
from ngpt.data.tokens.tokenizer import tokenizer_vocab_size
from ngpt.training.config import TrainConfig, resolved
from tune import format as fmt
from tune.spec.phase_reader import PhasesInFile
from tune.spec.reading import LocatedSettings, Reading, with_absolute_paths
from tune.spec.schema import EarlyStop, Phase
from tune.spec.sweeps import BASELINE, ArmSpec

MOST_COMBINATIONS = 10_000  # of arms that inherit and ways in which earlier phases may end; a second at most
MOST_JOINED = 100  # arms of a combining phase that another one joins

Phases = Mapping[str, Phase]  # by name, or by path in another results directory


class ConfigChecker:
    """Builds configs on top of one base: `given` in the file, and the command line's `options`, which beat it.

    A value is blamed once, even if it makes a hundred arms impossible, and a corpus is looked up once.
    """

    def __init__(self, given: LocatedSettings, options: LocatedSettings) -> None:
        self._given, self._options = given, options
        self._blamed: set[Location] = set()
        self._looked_up: set[str] = set()

    def check(
        self, changes: LocatedSettings | None = None, *, start: LocatedSettings | None = None, note: str = ""
    ) -> Reading[TrainConfig | None]:
        """Checks the base or, given `changes`, the base with `start`, if any, and then them; returns a sound config.

        What is possible without the changes and impossible with them is blamed on the changes. What is wrong with the
        base itself is a problem of the base only. `note` is added to messages.
        """
        base = {**self._given, **self._options}
        below, above = (self._given, self._options) if changes is None else (base, {**(start or {}), **changes})
        given, own = {**below, **above}, self._options if changes is None else changes
        config = None
        try:
            config = build(TrainConfig, _values(given))
        except ConfigError as error:
            culprit = _culprit(below, above)
            for problem in error.problems:
                name, rest = _split(problem.location)
                if name not in own and culprit:
                    name, rest = culprit, ()
                if changes is None or culprit or name in own:
                    yield from self._blame_setting(given, name, rest, problem.message + note)
        fits = yield from self._check_data({**base, **(start or {})}, changes or {}, note)
        return config if fits else None

    def _blame_setting(self, given: LocatedSettings, name: str, rest: Location, message: str) -> Reading[None]:
        """Blames the value of a setting, or the item of it that `rest` leads to."""
        value, location = given.get(name, (None, ("base",)))
        if len(rest) == 1 and isinstance(value, list) and rest[0] in range(len(value)):
            value, location = value[int(rest[0])], (*location, *rest)
        elif rest and message.startswith("field required"):
            message = message.replace("field required", f"value {int(rest[0]) + 1} is missing", 1)
        yield from self._blame(location, message + _advice(message, value))

    def _blame(self, location: Location, message: str) -> Reading[None]:
        if location not in self._blamed:
            self._blamed.add(location)
            yield Problem(location, message)

    def _check_data(self, base: LocatedSettings, changes: LocatedSettings, note: str) -> Reading[bool]:
        """Whether corpus and tokenizer exist and fit the model; each combination is looked up once."""
        given = {name: entry for name, entry in {**base, **changes}.items() if name in DATA_SETTINGS}
        key = repr(sorted((name, value) for name, (value, _) in given.items()))
        if key in self._looked_up or not _is_possible(given):
            return True
        self._looked_up.add(key)
        config = build(TrainConfig, _values(given))
        for name, look_up in DATA_CHECKS.items():
            try:
                look_up(config)
            except (ConfigError, OSError) as error:  # OSError: a path that is too long or not readable
                # Blame the setting itself or else the nearest one that corpus and tokenizer depend on.
                written = [layer[key] for layer in (changes, base) for key in (name, *DATA_CHECKS) if key in layer]
                yield from self._blame(written[0][1] if written else ("base",), f"{error}{note}")
                return False
        return True


def _vocab_size(config: TrainConfig) -> int:
    if not config.data.corpus.strip():  # as a path, it would be the whole working directory
        raise ConfigError(f"a corpus is a name, a file or a folder, got {config.data.corpus!r}")
    return corpora.vocab_size(config.data)


# The setting to blame, and what to look up for it; a later check needs what the earlier ones look up.
DATA_CHECKS: dict[str, Callable[[TrainConfig], object]] = {
    "data.tokenizer": lambda config: tokenizer_vocab_size(config.data.tokenizer),
    "data.corpus": _vocab_size,
    "data.shards": lambda config: corpora.check_shards(config.data),
    "data.path": lambda config: corpora.fingerprint(config.data),
    "model.vocab_size": resolved,
}
DATA_SETTINGS = (*DATA_CHECKS, "data.val_fraction")


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


def check_early_stop(rule: EarlyStop, phases: Iterable[Phase], *, base: TrainConfig, hold: str) -> Reading[None]:
    """Checks that the rule can stop a trial, at the steps that it names, in each phase that searches."""
    at, searching = ("early_stop",), [phase for phase in phases if phase.stops_early]
    if not searching:
        yield Problem(at, "only phases with `search:` can stop trials early, and this campaign has none")
    for phase in searching:
        settled = {"steps": base.steps, "eval_every": base.eval_every} | dict(phase.pinned)
        steps, every, first = settled["steps"], settled["eval_every"], (*at, "first")
        if (phase.hold or hold) == "seconds":
            text = f"phase {phase.name} holds seconds, so that its arms have no steps in common to compare at"
            yield Problem(at, f"{text}; hold tokens or steps there")
        elif rule.first >= steps:
            yield Problem(first, f"{rule.first} is not before the end: phase {phase.name} trains {steps} steps")
        elif rule.first % every:
            text = f"phase {phase.name} evaluates every {every} steps, so not at step {rule.first}"
            yield Problem(first, f"{text}; use a multiple of {every}, or another eval_every")


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


def _values(given: LocatedSettings) -> dict[str, Any]:
    return with_absolute_paths({name: value for name, (value, _) in given.items()})


def _culprit(base: LocatedSettings, changes: LocatedSettings) -> str | None:
    """The first of the changes that makes a config impossible which is possible without them."""
    given = dict(base)
    for name in (None, *changes):  # None: without any
        given |= {name: changes[name]} if name else {}
        if not _is_possible(given):
            return name
    return None


def _is_possible(given: LocatedSettings) -> bool:
    try:
        build(TrainConfig, _values(given))
    except ConfigError:
        return False
    return True


def _split(location: Location) -> tuple[str, Location]:
    """The setting in a location that `build` reports, and the place inside its value."""
    for end in range(len(location), 0, -1):
        if (name := dotted_name(location[:end])) in settings(TrainConfig):
            return name, location[end:]
    return dotted_name(location), ()


def _advice(message: str, value: Any) -> str:
    whole = message.startswith("input should be a valid integer") and isinstance(value, float) and value.is_integer()
    return f"; write {int(value)}" if whole else ""
