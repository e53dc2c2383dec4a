"""One phase of a campaign file: its name, what varies, its arms and seeds, all checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, is_identity, settings, unknown
from ngpt.config.overrides import named_settings
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.spec.schema import HOLDS, KINDS, MOST_TRIALS, FreshSeeds, Phase
from tune.spec.search_space import Search, check_optuna, random_arms, read_search
from tune.spec.sweeps import BASELINE, SWEEPS, ArmSpec, Axis, count
from tune.spec.validation import Given, Problems, given_in, with_absolute_paths, written_alike
from tune.storage.winners import InheritedWinner, is_path, read_inherited_winner

PHASE_KEYS = ("name", "inherit", "set", "seeds", "hold", *KINDS)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._=,:+-]{0,79}")
# What a results directory holds besides a folder for each phase.
RESERVED = re.compile(r"(?i)trials|(campaign|manifest|journal|summary|report)\.\w+")
MOST_SEEDS = 9999


@dataclass(frozen=True)
class PhaseInFile:
    """A phase and where it was written."""

    phase: Phase
    at: Location
    pinned: Given


@dataclass
class PhaseReader:
    """What a phase may refer to, and what the phases before it have used up."""

    problems: Problems
    names: Sequence[str]  # of all phases of the file
    seeds: tuple[int, ...]  # the campaign's, for phases without their own
    folder: Path  # of the campaign file
    inherits: dict[tuple[str, str], Location] = field(default_factory=dict)  # where one phase names another
    chained: dict[str, InheritedWinner] = field(default_factory=dict)  # winners of other results directories, by path
    chained_at: dict[str, Location] = field(default_factory=dict)
    trials: int = 0  # so far
    _seen: set[str] = field(default_factory=set)

    def read(self, raw: Any, at: Location) -> PhaseInFile | None:
        """The phase; with problems in it, as much of it as makes sense, or None."""
        if not isinstance(raw, dict):
            self.problems.add(at, f"a phase is a mapping, got {raw!r}")
            return None
        for key in raw:
            if key not in PHASE_KEYS:
                self.problems.add((*at, key), unknown("setting", key, PHASE_KEYS))
        name = self._name(raw, at)
        seeds = self._seeds(raw, at)
        pinned = self._settings(raw.get("set", {}), (*at, "set"))
        inherit = self._inherit(name, raw, at)
        hold = raw.get("hold")
        if hold is not None and (not isinstance(hold, str) or hold not in HOLDS):
            self.problems.add((*at, "hold"), unknown("quantity to hold", hold, HOLDS))
        kinds = [kind for kind in KINDS if kind in raw]
        if len(kinds) != 1:
            found = f"got {' and '.join(kinds)}" if kinds else "got none"
            where = (*at, kinds[1]) if kinds else at
            self.problems.add(where, f"a phase has exactly one of {', '.join(KINDS)}; {found}")
            return None
        arms, swept = self._arms(name, raw, kinds[0], at, seeds.n if isinstance(seeds, FreshSeeds) else len(seeds))
        combine = self._combine(name, raw["combine"], (*at, "combine")) if kinds == ["combine"] else ()
        where, n_seeds = (*at, "search"), seeds.n if isinstance(seeds, FreshSeeds) else len(seeds)
        search = self._search(raw["search"], where, n_seeds) if kinds == ["search"] else None
        if search and search.method == "random":
            arms, search = self._drawn(search, where), None
        settled = with_absolute_paths({name: value for name, (value, _) in pinned.items()})
        return PhaseInFile(Phase(name, inherit, settled, arms, seeds, swept, combine, search, hold), at, pinned)

    # ---- what all arms share ---------------------------------------------------------------------------------------

    def _name(self, raw: Mapping[str, Any], at: Location) -> str:
        if "name" not in raw:
            self.problems.add(at, "`name:` is missing: give the phase a name")
            return ""
        name, where = raw["name"], (*at, "name")
        if check_name(self.problems, name, where, "phase"):
            if RESERVED.fullmatch(name):
                self.problems.add(where, f"{name!r} is a name that the results directory needs for itself")
            if name.lower() in self._seen:  # not every file system can tell P from p
                self.problems.add(where, f"two phases are named {name!r}")
            self._seen.add(name.lower())
        return str(name)

    def _seeds(self, raw: Mapping[str, Any], at: Location) -> tuple[int, ...] | FreshSeeds:
        if "seeds" not in raw:
            return self.seeds
        text = raw["seeds"]
        if not isinstance(text, str):
            return read_seeds(self.problems, text, (*at, "seeds"))
        match = re.fullmatch(r"fresh +([0-9]{1,9})", text)
        if match and 1 <= int(match[1]) <= MOST_SEEDS:
            return FreshSeeds(int(match[1]))
        self.problems.add((*at, "seeds"), f"expected `fresh N` with N from 1 to {MOST_SEEDS}, or a list, got {text!r}")
        return ()

    def _inherit(self, name: str, raw: Mapping[str, Any], at: Location) -> str | None:
        """The phase that `raw` inherits from, if it names one that there is."""
        inherit = raw.get("inherit")
        if inherit is None:
            return None
        if is_path(inherit):
            try:
                self.chained[inherit] = read_inherited_winner(inherit)
            except ConfigError as error:
                self.problems.add((*at, "inherit"), str(error))
                return None
            self.chained_at.setdefault(inherit, (*at, "inherit"))
            return inherit
        if not isinstance(inherit, str) or inherit not in self.names:
            self.problems.add((*at, "inherit"), unknown("phase", inherit, self.names))
            return None
        self.inherits.setdefault((name, inherit), (*at, "inherit"))
        return inherit

    def _settings(self, data: Any, at: Location) -> dict[str, tuple[Any, Location]]:
        """Settings that arms or phases may differ in, by full name."""
        found, wrong = named_settings(TrainConfig, data, at, folder=self.folder)
        for problem in wrong:
            self.problems.add(*problem)
        for name, (_, location) in found.items():
            if name == "seed":
                self.problems.add(location, "seeds are not swept: every arm runs all of `seeds:`")
            elif not is_identity(TrainConfig, name):
                self.problems.add(location, f"{name} does not change what is computed: set it in `base:`, for all")
        return found

    # ---- arms ------------------------------------------------------------------------------------------------------

    def _arms(
        self, name: str, raw: Mapping[str, Any], kind: str, at: Location, n_seeds: int
    ) -> tuple[tuple[ArmSpec, ...], dict[str, tuple[Any, ...]]]:
        data, where = raw[kind], (*at, kind)
        before = len(self.problems.all)
        if kind in ("combine", "search"):
            return (), {}
        if kind == "runs":
            arms, axes = self._runs(name, data, where), []
            self._count(str(len(arms)), len(arms), n_seeds, where)
        else:
            axes = self._axes(kind, data, where)
            fits = axes and self._count(_size(kind, axes), count(kind, axes), n_seeds, where)
            arms = SWEEPS[kind](axes) if fits else []
        if len(self.problems.all) == before:
            self._check_twins(arms)
        swept = {axis.setting: axis.values for axis in axes}
        return tuple(replace(arm, overrides=with_absolute_paths(arm.overrides)) for arm in arms), swept

    def _count(self, size: str, n_arms: int, n_seeds: int, at: Location) -> bool:
        """Whether the campaign is still of a size that can be planned."""
        n = n_arms * n_seeds
        if self.trials + n <= MOST_TRIALS:
            self.trials += n
            return True
        before = f" after {self.trials} in other phases" if self.trials else ""
        text = f"{size} arms x {n_seeds} seeds = {n if n < 10**6 else format(n, '.3g')} trials{before}"
        self.problems.add(at, f"{text}; a campaign has at most {MOST_TRIALS}")
        return False

    def _axes(self, kind: str, data: Any, at: Location) -> list[Axis]:
        """What varies, as far as it makes sense."""
        if not isinstance(data, dict) or not data:
            self.problems.add(at, "nothing varies: give at least one setting with a list of values")
            return []
        axes = []
        for setting, (values, location) in self._settings(data, at).items():
            if not isinstance(values, list):
                self.problems.add(location, f"expected a list of values, got {values!r}")
            elif not values:
                self.problems.add(location, "the list of values is empty")
            else:
                axes.append(Axis(_label(setting, location), setting, tuple(values), location))
                for i in written_alike(values) if kind != "zip" else ():
                    self.problems.add((*location, i), f"{fmt.value(values[i])} is listed twice")
        if kind == "zip" and len({len(axis.values) for axis in axes}) > 1:
            sizes = ", ".join(f"{axis.label} has {len(axis.values)}" for axis in axes)
            self.problems.add(at, f"zip needs lists of equal length; {sizes}")
            return []
        return axes

    def _runs(self, phase: str, data: Any, at: Location) -> list[ArmSpec]:
        if not isinstance(data, list) or not data:
            self.problems.add(at, "`runs:` is a list of arms, such as `- {arm: baseline}`")
            return []
        arms = [arm for i, raw in enumerate(data) if (arm := self._run(phase, raw, (*at, i)))]
        seen: set[str] = set()
        for arm in arms:
            if arm.name in seen:
                self.problems.add((*arm.origins["arm"], "arm"), f"two arms are named {arm.name!r}")
            seen.add(arm.name)
        return arms

    def _search(self, data: Any, at: Location, n_seeds: int) -> Search | None:
        search = read_search(self.problems, data, at, self._settings)
        if search is None or not self._count(str(search.trials), search.trials, n_seeds, at):
            return None
        if search.method == "optuna":
            try:
                check_optuna()
            except ConfigError as error:
                self.problems.add((*at, "method"), str(error))
                return None
        return search

    def _drawn(self, search: Search, at: Location) -> tuple[ArmSpec, ...]:
        arms = random_arms(search)
        if len(arms) < search.trials:
            self.problems.add((*at, "trials"), f"{search.trials} different arms were asked for, found {len(arms)}")
        return tuple(replace(arm, overrides=with_absolute_paths(arm.overrides)) for arm in arms)

    def _combine(self, name: str, data: Any, at: Location) -> tuple[str, ...]:
        """The phases whose better arms are joined, as far as there are such."""
        sources = data.get("from") if isinstance(data, dict) and set(data) == {"from"} else None
        if not isinstance(sources, list) or not sources:
            self.problems.add(at, f"expected `{{from: [PHASE, ...]}}`, the phases to join, got {data!r}")
            return ()
        found: list[str] = []
        for i, source in enumerate(sources):
            where = (*at, "from", i)
            if not isinstance(source, str) or source not in self.names:
                self.problems.add(where, unknown("phase", source, self.names))
            elif source in found:
                self.problems.add(where, f"phase {source!r} is listed twice")
            else:
                found.append(source)
                self.inherits.setdefault((name, source), where)
        return tuple(found)

    def _run(self, phase: str, raw: Any, at: Location) -> ArmSpec | None:
        """One item of `runs:`."""
        if not isinstance(raw, dict) or "arm" not in raw:
            self.problems.add(at, "a run is a mapping with `arm:`, its name, and the settings it changes")
            return None
        named = check_name(self.problems, raw["arm"], (*at, "arm"), "arm")
        changes = self._settings({key: value for key, value in raw.items() if key not in ("arm", "inherit")}, at)
        inherit = self._inherit(phase, raw, at)
        if raw["arm"] == BASELINE.name and (changes or inherit):
            text = "the arm `baseline` is the phase's base as it is; give another name to a changed one"
            self.problems.add((*at, "arm"), text)
        if not named:
            return None
        origins = {name: location for name, (_, location) in changes.items()} | {"arm": at}
        return ArmSpec(raw["arm"], {name: value for name, (value, _) in changes.items()}, inherit, origins)

    def _check_twins(self, arms: Sequence[ArmSpec]) -> None:
        """Two arms that change the same settings in the same way are a slip of the pen."""
        what = [[arm.inherit, *sorted(arm.overrides.items())] for arm in arms]
        for i in written_alike(what):
            twin = next(arms[j].name for j in range(i) if list(written_alike([what[j], what[i]])))
            where = arms[i].origins.get("arm") or next(iter(arms[i].origins.values()))
            self.problems.add(where, f"the arm {arms[i].name!r} changes the same settings in the same way as {twin!r}")


def chained_phase(path: str, chained: InheritedWinner, at: Location) -> PhaseInFile:
    """A phase of another results directory as one that has a single arm, its winner."""
    winner = ArmSpec(chained.winner, chained.overrides, origins=dict.fromkeys(chained.overrides, at))
    return PhaseInFile(Phase(path, None, {}, (winner,), (), {}), at, {})


def arm_changes(arm: ArmSpec) -> Given:
    """An arm's overrides with the place of each."""
    return given_in(arm.overrides, arm.origins)


def check_name(problems: Problems, name: Any, at: Location, what: str) -> bool:
    """Whether `name` can be that of a campaign, phase (both are folders) or arm."""
    pattern, longest, also = (ARM_NAME, 80, " ' ', '=', ',', ':', '+',") if what == "arm" else (NAME, 64, "")
    if isinstance(name, str) and pattern.fullmatch(name) and ".." not in name:
        return True
    shown = repr(fmt.shorten(name, 40)) if isinstance(name, str) else repr(name)
    rule = f"1 to {longest} letters, digits,{also} '.', '_' and '-', the first a letter or digit, and no '..'"
    problems.add(at, f"{shown} cannot be the name of {'an' if what == 'arm' else 'a'} {what}: use {rule}")
    return False


def read_seeds(problems: Problems, data: Any, at: Location) -> tuple[int, ...]:
    """A list of seeds; an empty tuple if any of them is wrong."""
    if not isinstance(data, list):
        problems.add(at, f"expected a list of seeds such as [1, 2, 3], got {data!r}")
        return ()
    if not data:
        problems.add(at, "the list of seeds is empty")
    before = len(problems.all)
    seen: set[int] = set()
    for i, seed in enumerate(data):
        if type(seed) is not int or not 0 <= seed < 2**31:
            problems.add((*at, i), f"a seed is a whole number from 0 to {2**31 - 1}, got {seed!r}")
        elif seed in seen:
            problems.add((*at, i), f"seed {seed} is listed twice")
        else:
            seen.add(seed)
    return tuple(data) if len(problems.all) == before else ()


def _label(setting: str, location: Location) -> str:
    """The name as it was written, unless that says too little, as `name` inside of `optim:` does."""
    written = str(location[-1])
    alike = [name for name in settings(TrainConfig) if name.rpartition(".")[2] == written]
    return written if len(alike) == 1 or "." in written else setting


def _size(kind: str, axes: Sequence[Axis]) -> str:
    """`30 x 50`, how the number of arms comes about."""
    sign = {"grid": " x ", "vary": " + "}.get(kind)
    return f"({sign.join(str(len(axis.values)) for axis in axes)})" if sign and axes[1:] else str(count(kind, axes))
