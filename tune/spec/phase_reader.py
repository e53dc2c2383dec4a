"""Reads the phases of a campaign file: their names, seeds and arms, and the phases whose winners they inherit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, Problem, is_identity, unknown_message
from ngpt.config.overrides import named_settings
from ngpt.training.config import TrainConfig, with_absolute_paths
from tune import format as fmt
from tune.spec.confirmation import confirmation_of, is_confirmed_by, read_confirm, start_from
from tune.spec.reading import (
    LocatedSettings,
    Reading,
    check_name,
    collect,
    comparable,
    repeated,
    short,
)
from tune.spec.schema import HOLDS, MAX_TRIALS, Phase, SeedRule, UntilDecided, count_seeds, kinds
from tune.spec.search_space import Search, random_arms, read_search
from tune.spec.seeds import read_seed_rule
from tune.spec.sweeps import BASELINE, ArmSpec, Axis, build_arms, count
from tune.storage.names import RESERVED
from tune.storage.winners import InheritedWinner, is_path, read_inherited_winner

PHASE_KEYS = ("name", "inherit", "set", "seeds", "hold")  # besides its kind
WINNER = "winner"  # the usual name of an arm that is the winner of another phase
MAX_PHASES = 100  # bounds the recursion through phases that inherit from each other

Sweep = tuple[list[ArmSpec], dict[str, tuple[Any, ...]]]  # the arms, and the values of each swept setting by name
FoundSearch = tuple[list[ArmSpec], Search | None, Mapping[str, Any] | None]


@dataclass(frozen=True)
class PhasesInFile:
    """The phases of a file that could be read, and their references to other phases and results directories."""

    phases: Sequence[Phase]
    references: Mapping[tuple[str, str], Location]  # where a phase first refers to another, by both names
    winners: Mapping[str, tuple[InheritedWinner, Location]]  # of other results directories, by path


def read_phases(data: Mapping[str, Any], seeds: SeedRule, folder: Path) -> Reading[PhasesInFile]:
    """Reads the phases of a campaign file in `folder`; a phase without `seeds:` gets `seeds`."""
    raw_phases = yield from _raw_phases(data)
    names = [str(raw["name"]) for raw, _ in raw_phases if isinstance(raw, dict) and "name" in raw]
    reader = _PhaseReader(names, seeds, folder)
    phases: list[Phase] = []
    for raw, at in raw_phases:
        phase = yield from reader.read(raw, at)
        phases += [phase] if phase else []
    return PhasesInFile((yield from reader.with_confirmations(phases)), reader.references, reader.winners)


def _raw_phases(data: Mapping[str, Any]) -> Reading[list[tuple[Any, Location]]]:
    """The unparsed phases with their locations; a file without `phases:` has a single phase named main."""
    short = {key: data[key] for key in kinds() if key in data}
    if "phases" not in data:
        if not short:
            yield Problem((), f"nothing varies: give `phases:`, or one of {', '.join(kinds())}")
        return [({"name": "main"} | short, ())] if short else []
    for key in short:
        yield Problem((key,), f"`{key}:` at the top is for files without `phases:`; move it into a phase")
    phases = data["phases"]
    if not isinstance(phases, list) or not phases:
        yield Problem(("phases",), f"expected a list of phases, got {phases!r}")
    elif len(phases) > MAX_PHASES:
        yield Problem(("phases",), f"{len(phases)} phases; a campaign has at most {MAX_PHASES}")
    else:
        return [(raw, ("phases", i)) for i, raw in enumerate(phases)]
    return []


@dataclass
class _PhaseReader:
    """Reads the phases one by one and collects their references, names and total number of trials."""

    names: Sequence[str]  # of all phases of the file
    seeds: SeedRule
    folder: Path
    references: dict[tuple[str, str], Location] = field(default_factory=dict)
    winners: dict[str, tuple[InheritedWinner, Location]] = field(default_factory=dict)
    _confirm: dict[str, tuple[SeedRule, Location]] = field(default_factory=dict)  # seeds of confirmations, by search
    _n_trials: int = 0
    _used_names: set[str] = field(default_factory=set)

    def read(self, raw: Any, at: Location) -> Reading[Phase | None]:
        """Reads one phase; after a problem, the phase may lack its faulty parts, or be None."""
        if not isinstance(raw, dict):
            yield Problem(at, f"a phase is a mapping, got {raw!r}")
            return None
        for key in raw:
            if key not in (allowed := (*PHASE_KEYS, *kinds())):
                yield Problem((*at, key), unknown_message("setting", key, allowed))
        name = yield from self._name(raw, at)
        seeds = yield from self._seeds(raw, at)
        pinned = yield from self._settings(raw.get("set", {}), (*at, "set"))
        inherit = yield from self._inherit(name, raw, at)
        hold = raw.get("hold")
        if hold is not None and (not isinstance(hold, str) or hold not in HOLDS):
            yield Problem((*at, "hold"), unknown_message("quantity to hold", hold, HOLDS))
        found = [kind for kind in kinds() if kind in raw]
        if len(found) != 1:
            given = f"got {' and '.join(found)}" if found else "got none"
            where = (*at, found[1]) if found else at
            yield Problem(where, f"a phase has exactly one of {', '.join(kinds())}; {given}")
            return None
        kind, where = found[0], (*at, found[0])
        n_seeds = count_seeds(seeds)
        arms, swept, combine, search, question = list[ArmSpec](), {}, (), None, None
        if kind == "combine":
            combine = yield from self._combine(name, raw[kind], where)
        elif kind == "search":
            arms, search, question = yield from self._search(raw[kind], where, n_seeds)
            if confirm := (yield from read_confirm(raw[kind], where, seeds)):
                self._confirm[name] = confirm, where
        else:
            listed, problems = collect(self._listed_arms(name, kind, raw[kind], where, n_seeds))
            arms, swept = listed or ([], {})
            yield from problems or _check_distinct(arms)
        arms = tuple(replace(arm, overrides=with_absolute_paths(arm.overrides)) for arm in arms)
        pinned_values = with_absolute_paths({name: value for name, (value, _) in pinned.items()})
        origins = {name: location for name, (_, location) in pinned.items()}
        if search and isinstance(seeds, UntilDecided):
            text = "optuna proposes arms by their results on all seeds, so `until: decided` cannot be combined with it"
            yield Problem((*where, "method"), f"{text}; use `method: random`, or a list of seeds")
        return Phase(
            name,
            inherit,
            pinned_values,
            arms,
            seeds,
            swept,
            combine=combine,
            search=search,
            hold=hold,
            stops_early=kind == "search",  # random or optuna; `search` is set only for optuna
            origins=origins,
            question=question,
            has_own_seeds="seeds" in raw,
        )

    def with_confirmations(self, phases: Sequence[Phase]) -> Reading[list[Phase]]:
        """Adds the confirmation of each search after its phase, unless other phases confirm it.

        Phases that inherit a search with a confirmation then inherit the confirmation.
        """
        all_phases: list[Phase] = []
        confirmations: dict[str, str] = {}
        for phase in phases:
            rule, at = self._confirm.get(phase.name, ((), ()))
            is_searched = bool(rule) and phase.question is not None
            is_confirmed = is_searched and is_confirmed_by(phase, phases)
            all_phases.append(replace(phase, hands_on_best=is_confirmed))
            if not is_searched or is_confirmed:
                continue
            added = confirmation_of(phase, rule)
            if added.name.lower() in self._used_names:
                text = f"its confirmation would be named {added.name!r} like another phase"
                yield Problem(at, f"{text}; rename that phase, or write `confirm: false` here")
            if (yield from self._count("2", 2, count_seeds(rule), at)):
                all_phases.append(added)
                confirmations[phase.name] = added.name
                self.references |= {(added.name, source): at for source in added.needs}
        for (name, source), where in list(self.references.items()):
            if source in confirmations and name != confirmations[source]:
                self.references[name, confirmations[source]] = where
        return [start_from(phase, confirmations) for phase in all_phases]

    def _name(self, raw: Mapping[str, Any], at: Location) -> Reading[str]:
        if "name" not in raw:
            yield Problem(at, "`name:` is missing: give the phase a name")
            return ""
        name, where = raw["name"], (*at, "name")
        if (yield from check_name(name, where, "phase")):
            if RESERVED.fullmatch(name):
                yield Problem(where, f"{name!r} is reserved: the results directory uses this name itself")
            if name.lower() in self._used_names:  # some file systems ignore case
                yield Problem(where, f"two phases are named {name!r}")
            self._used_names.add(name.lower())
        return str(name)

    def _seeds(self, raw: Mapping[str, Any], at: Location) -> Reading[SeedRule]:
        return (yield from read_seed_rule(raw["seeds"], (*at, "seeds"))) if "seeds" in raw else self.seeds

    def _inherit(self, name: str, raw: Mapping[str, Any], at: Location) -> Reading[str | None]:
        inherit, where = raw.get("inherit"), (*at, "inherit")
        if inherit is None:
            return None
        if is_path(inherit):
            try:
                self.winners.setdefault(inherit, (read_inherited_winner(inherit), where))
            except ConfigError as error:
                yield Problem(where, str(error))
                return None
        elif isinstance(inherit, str) and inherit in self.names:
            self.references.setdefault((name, inherit), where)
        else:
            yield Problem(where, unknown_message("phase", inherit, self.names))
            return None
        return inherit

    def _settings(self, data: Any, at: Location) -> Reading[LocatedSettings]:
        """Reads settings that may vary between arms or phases, by full dotted name."""
        located, wrong = named_settings(TrainConfig, data, at, folder=self.folder)
        yield from wrong
        for name, (_, location) in located.items():
            if name == "seed":
                yield Problem(location, "seeds are not swept: every arm runs all of `seeds:`")
            elif not is_identity(TrainConfig, name):
                yield Problem(location, f"{name} does not change what is computed: set it in `base:`")
        return located

    def _count(self, size: str, n_arms: int, n_seeds: int, at: Location) -> Reading[bool]:
        """Adds the trials of a phase to the total; reports a problem and returns False if they exceed MAX_TRIALS."""
        n = n_arms * n_seeds
        if self._n_trials + n <= MAX_TRIALS:
            self._n_trials += n
            return True
        before = f" after {self._n_trials} in other phases" if self._n_trials else ""
        text = f"{size} arms x {n_seeds} seeds = {n if n < 10**6 else format(n, '.3g')} trials{before}"
        yield Problem(at, f"{text}; a campaign has at most {MAX_TRIALS}")
        return False

    def _listed_arms(self, phase: str, kind: str, data: Any, at: Location, n_seeds: int) -> Reading[Sweep]:
        if kind == "runs":
            arms = yield from self._runs(phase, data, at)
            yield from self._count(str(len(arms)), len(arms), n_seeds, at)
            return arms, {}
        axes, arms = (yield from self._axes(kind, data, at)), list[ArmSpec]()
        try:
            if axes and (yield from self._count(_size(kind, axes), count(kind, axes), n_seeds, at)):
                arms = build_arms(kind, axes)
        except ConfigError as error:
            yield Problem(at, str(error))
        return arms, {axis.setting: axis.values for axis in axes}

    def _axes(self, kind: str, data: Any, at: Location) -> Reading[list[Axis]]:
        if not isinstance(data, dict) or not data:
            yield Problem(at, "nothing varies: give at least one setting with a list of values")
            return []
        axes: list[Axis] = []
        swept = yield from self._settings(data, at)
        for setting, (values, location) in swept.items():
            if not isinstance(values, list):
                yield Problem(location, f"expected a list of values, got {values!r}")
            elif not values:
                yield Problem(location, "the list of values is empty")
            else:
                written = str(location[-1])
                label = written if "." in written else short(setting)  # in full if it is ambiguous, as `name` is
                axes.append(Axis(label, setting, tuple(values), location))
                for i in repeated(values) if kind != "zip" else ():
                    yield Problem((*location, i), f"{fmt.value(values[i])} is listed twice")
        if kind == "zip" and len({len(axis.values) for axis in axes}) > 1:
            sizes = ", ".join(f"{axis.label} has {len(axis.values)}" for axis in axes)
            yield Problem(at, f"zip needs lists of equal length; {sizes}")
            return []
        return axes

    def _runs(self, phase: str, data: Any, at: Location) -> Reading[list[ArmSpec]]:
        if not isinstance(data, list) or not data:
            yield Problem(at, "`runs:` is a list of arms, such as `- {arm: baseline}`")
            return []
        arms: list[ArmSpec] = []
        for i, raw in enumerate(data):
            arm = yield from self._run(phase, raw, (*at, i))
            arms += [arm] if arm else []
        names = [" ".join(arm.name.split()) for arm in arms]  # `wide` and `wide ` look the same in every table
        for i in repeated(names):
            yield Problem((*arms[i].origins["arm"], "arm"), f"two arms are named {names[i]!r}")
        return arms

    def _run(self, phase: str, raw: Any, at: Location) -> Reading[ArmSpec | None]:
        if not isinstance(raw, dict) or "arm" not in raw:
            yield Problem(at, "a run is a mapping with `arm:`, its name, and the settings it changes")
            return None
        is_valid_name = yield from check_name(raw["arm"], (*at, "arm"), "arm")
        changes = yield from self._settings({key: raw[key] for key in raw if key not in ("arm", "inherit")}, at)
        inherit = yield from self._inherit(phase, raw, at)
        if raw["arm"] == BASELINE.name and (changes or inherit):
            text = "the arm `baseline` is the unchanged base of the phase; give a changed arm another name"
            yield Problem((*at, "arm"), text)
        if raw["arm"] == WINNER and len(raw) == 1:
            earlier = [name for name in self.names if name != phase]
            text = f"`{{arm: winner, inherit: {earlier[-1] if earlier else 'PHASE'}}}`"
            yield Problem((*at, "arm"), f"this arm changes nothing: name the phase that it is the winner of, {text}")
        origins = {name: location for name, (_, location) in changes.items()} | {"arm": at}
        overrides = {name: value for name, (value, _) in changes.items()}
        return ArmSpec(raw["arm"], overrides, inherit, origins) if is_valid_name else None

    def _search(self, data: Any, at: Location, n_seeds: int) -> Reading[FoundSearch]:
        """Reads a search. A random search becomes a list of arms at once; optuna proposes its arms during the run.

        Returns the arms of a random search, the search if it is optuna's, and its question.
        """
        search = yield from read_search(data, at, self._settings)
        if search is None or not (yield from self._count(str(search.trials), search.trials, n_seeds, at)):
            return [], None, None
        if search.method == "optuna":
            if find_spec("optuna"):
                return [], search, search.question
            yield Problem((*at, "method"), "the package optuna is not installed: pip install 'ngpt-campaign[search]'")
            return [], None, None
        arms = random_arms(search)
        if len(arms) < search.trials:
            message = f"{search.trials} distinct arms requested, but the search space yields only {len(arms)}"
            yield Problem((*at, "trials"), message)
        return arms, None, search.question

    def _combine(self, name: str, data: Any, at: Location) -> Reading[tuple[str, ...]]:
        sources = data.get("from") if isinstance(data, dict) and set(data) == {"from"} else None
        if not isinstance(sources, list) or not sources:
            yield Problem(at, f"expected `{{from: [PHASE, ...]}}`, the phases to join, got {data!r}")
            return ()
        names: list[str] = []
        for i, source in enumerate(sources):
            where = (*at, "from", i)
            if not isinstance(source, str) or source not in self.names:
                yield Problem(where, unknown_message("phase", source, self.names))
            elif source in names:
                yield Problem(where, f"phase {source!r} is listed twice")
            else:
                names.append(source)
                self.references.setdefault((name, source), where)
        return tuple(names)


def _check_distinct(arms: Sequence[ArmSpec]) -> Reading[None]:
    first: dict[Any, ArmSpec] = {}
    for arm in arms:
        twin = first.setdefault(comparable([arm.inherit, *sorted(arm.overrides.items())]), arm)
        if twin is not arm:
            where = arm.origins.get("arm") or next(iter(arm.origins.values()))
            yield Problem(where, f"the arm {arm.name!r} changes the same settings in the same way as {twin.name!r}")


def _size(kind: str, axes: Sequence[Axis]) -> str:
    """The number of arms as text, such as `(30 x 50)` for a grid."""
    sign = {"grid": " x ", "vary": " + "}.get(kind)
    return f"({sign.join(str(len(axis.values)) for axis in axes)})" if sign and axes[1:] else str(count(kind, axes))
