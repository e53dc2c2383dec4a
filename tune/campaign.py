"""The campaign file as types: read, checked in full, every mistake answered with file, line, column and a suggestion."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ngpt.config import (
    Config,
    ConfigError,
    Location,
    Problem,
    build,
    flatten,
    is_identity,
    named_settings,
    resolve,
    settings,
    unknown,
)
from ngpt.train import TrainConfig, resolved
from ngpt.yamlfile import Document, parse_assignment, read_yaml
from tune.arms import BASELINE, SWEEPS, Arm, Axis, count

MOST_TRIALS = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._=,:+-]{0,79}")
RESERVED_PHASES = ("trials",)  # folders of a results directory
KINDS = (*SWEEPS, "runs")

Share = Annotated[float, Field(gt=0, lt=1)]
Seeds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class Metric(Config):
    name: Literal["val_loss", "val_bpb", "train_loss"] = "val_loss"
    goal: Literal["minimize", "maximize"] = "minimize"


class Resources(Config):
    cpus_per_trial: Annotated[int, Field(ge=1)] = 1  # threads of a trial
    gpus_per_trial: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"  # auto: one where there are GPUs
    workers: Annotated[int, Field(ge=1)] | None = None  # trials at once; null: as many as fit


@dataclass(frozen=True)
class Fresh:
    """`seeds: fresh N`: that many seeds that no other phase of the campaign uses."""

    n: int


@dataclass(frozen=True)
class Phase:
    """Trials that belong together: a baseline and what is compared with it."""

    name: str
    inherit: str | None  # the phase whose winner is the base here
    pinned: Mapping[str, Any]  # `set:` settings of all arms of this phase, by dotted name
    arms: tuple[Arm, ...]  # without the baseline, unless it was listed
    seeds: tuple[int, ...] | Fresh
    swept: Mapping[str, tuple[Any, ...]]  # the axes, by dotted name

    @property
    def needs(self) -> set[str]:
        """The phases whose winners must be known before this one can start."""
        return {name for name in (self.inherit, *(arm.inherit for arm in self.arms)) if name}


@dataclass(frozen=True)
class Campaign:
    """A campaign file, checked: every name resolved, every value of the right type, phases in order of need."""

    name: str
    description: str | None
    metric: Metric
    hold: str  # what is equal between arms: tokens | steps
    confidence: float
    min_effect: float  # in units of the metric
    base: TrainConfig
    resources: Resources
    phases: tuple[Phase, ...]
    text: str  # the file as given
    assignments: tuple[str, ...]  # --set


class CampaignFile(Config):
    """The top level of the YAML; phases and settings are checked on their own."""

    campaign: str
    description: str | None = None
    metric: Metric = Metric()
    seeds: Annotated[Seeds, Field(min_length=1)] = [1, 2, 3]
    hold: Literal["tokens", "steps"] = "tokens"
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    min_effect: Annotated[float, Field(ge=0)] = 0.005
    base: dict[str, Any] = {}
    resources: Resources = Resources()
    phases: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    vary: dict[str, Any] | None = None
    grid: dict[str, Any] | None = None
    zip: dict[str, Any] | None = None
    runs: list[Any] | None = None


PHASE_KEYS = ("name", "inherit", "set", "seeds", *KINDS)


def load_campaign(path: Path, assignments: Sequence[str] = ()) -> Campaign:
    """Reads and checks a campaign file; `assignments` are `--set` options, `name=value`.

    Raises:
        ConfigError: everything that is wrong, one line each, with path, line and column.
    """
    document = read_yaml(path)
    reader = _Reader(document)
    campaign = reader.read(assignments)
    if reader.problems or campaign is None:
        ordered = sorted(set(reader.problems), key=lambda p: document.position(p.location))
        raise ConfigError("\n".join(map(document.describe, ordered)))
    text = path.read_text(encoding="utf-8")
    return replace(campaign, text=text, assignments=tuple(assignments))


class _Reader:
    """Walks the plain data of one file and collects problems instead of stopping at the first."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []

    def fail(self, location: Location, message: str) -> None:
        self.problems.append(Problem(location, message))

    def read(self, assignments: Sequence[str]) -> Campaign | None:
        data = self.document.data
        if not isinstance(data, dict):
            self.fail((), "a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)")
            return None
        file = self._structure(data)
        given = self._base(data.get("base", {}), assignments)
        raw_phases = self._raw_phases(data)
        names = [raw.get("name") for raw, _ in raw_phases if isinstance(raw, dict)]
        phases = [self._phase(raw, at, names, given) for raw, at in raw_phases]
        base = self._check_values(given, phases)
        if self.problems or file is None or base is None:
            return None
        return Campaign(
            name=file.campaign,
            description=file.description,
            metric=file.metric,
            hold=file.hold,
            confidence=file.confidence,
            min_effect=file.min_effect,
            base=base,
            resources=file.resources,
            phases=self._ordered([phase for phase in phases if phase], file),
            text="",
            assignments=(),
        )

    # ---- the top level ---------------------------------------------------------------------------------------------

    def _structure(self, data: dict[str, Any]) -> CampaignFile | None:
        for key in data:
            if key not in CampaignFile.model_fields:
                self.fail((key,), unknown("setting", key, list(CampaignFile.model_fields)))
        known = {key: value for key, value in data.items() if key in CampaignFile.model_fields}
        if "campaign" not in data:
            self.fail((), "`campaign:` is missing: give the campaign a name")
        elif isinstance(known["campaign"], str):
            self._name(known["campaign"], ("campaign",), "campaign", NAME)
        try:
            file = CampaignFile.model_validate(known)
        except ValueError as error:
            self.problems += [p for p in _explained(error) if p.location != ("campaign",) or "campaign" in data]
            return None
        if len(set(file.seeds)) < len(file.seeds):
            self.fail(("seeds",), f"a seed is listed twice: {file.seeds}")
        return file

    def _name(self, name: Any, at: Location, what: str, pattern: re.Pattern[str]) -> bool:
        if isinstance(name, str) and pattern.fullmatch(name) and ".." not in name:
            return True
        allowed = "letters, digits, '.', '_' and '-', starting with a letter or digit"
        extra = "" if pattern is NAME else " (also ' ', '=', ',', ':' and '+')"
        self.fail(at, f"{name!r} cannot be the name of a {what}; use {allowed}{extra}, without '/' and '..'")
        return False

    def _base(self, data: Any, assignments: Sequence[str]) -> dict[str, tuple[Any, Location]]:
        given, problems = named_settings(TrainConfig, data, ("base",))
        self.problems += problems
        for text in assignments:
            name, value = parse_assignment(text)
            try:
                given[resolve(TrainConfig, name)] = (value, (f"--set {name}",))
            except ConfigError as error:
                self.fail((f"--set {name}",), str(error))
        if "seed" in given:
            self.fail(given["seed"][1], "seeds belong to the campaign: write `seeds: [1, 2, 3]` at the top")
        return given

    def _raw_phases(self, data: dict[str, Any]) -> list[tuple[Any, Location]]:
        """The phases with their locations; a file without `phases:` is a single phase named main."""
        short = {key: data[key] for key in KINDS if key in data}
        if "phases" in data:
            for key in short:
                self.fail((key,), f"`{key}:` at the top is for files without `phases:`; move it into a phase")
            phases = data["phases"] if isinstance(data["phases"], list) else []
            return [(raw, ("phases", i)) for i, raw in enumerate(phases)]
        if not short:
            self.fail((), f"nothing varies: give `phases:`, or one of {', '.join(KINDS)}")
            return []
        return [({"name": "main"} | short, ())]

    # ---- one phase -------------------------------------------------------------------------------------------------

    def _phase(self, raw: Any, at: Location, names: list[Any], base: Mapping[str, Any]) -> Phase | None:
        if not isinstance(raw, dict):
            self.fail(at, f"a phase is a mapping, got {raw!r}")
            return None
        for key in raw:
            if key not in PHASE_KEYS:
                self.fail((*at, key), unknown("setting", key, PHASE_KEYS))
        self._phase_name(raw, at, names)
        kinds = [kind for kind in KINDS if kind in raw]
        if len(kinds) != 1:
            found = f"got {' and '.join(kinds)}" if kinds else "got none"
            self.fail((*at, kinds[1]) if kinds else at, f"a phase has exactly one of {', '.join(KINDS)}; {found}")
            return None
        pinned, problems = named_settings(TrainConfig, raw.get("set", {}), (*at, "set"))
        self.problems += problems
        self._sweepable(pinned)
        arms, swept = self._arms(raw[kinds[0]], kinds[0], (*at, kinds[0]), names)
        for arm in arms:
            self._known_phase(arm.inherit, arm.origins.get("inherit", at), names)
        self._known_phase(raw.get("inherit"), (*at, "inherit"), names)
        values = {name: value for name, (value, _) in pinned.items()}
        origins = {name: location for name, (_, location) in pinned.items()}
        for arm in arms:
            self._buildable(base, values | dict(arm.overrides), origins | dict(arm.origins))
        seeds = self._seeds(raw.get("seeds"), (*at, "seeds"))
        return Phase(str(raw.get("name")), raw.get("inherit"), values, tuple(arms), seeds, swept)

    def _phase_name(self, raw: dict[str, Any], at: Location, names: list[Any]) -> None:
        if "name" not in raw:
            self.fail(at, "`name:` is missing: give the phase a name")
        elif self._name(raw["name"], (*at, "name"), "phase", NAME):
            if raw["name"] in RESERVED_PHASES:
                self.fail((*at, "name"), f"{raw['name']!r} is a folder of the results; choose another name")
            if names.count(raw["name"]) > 1 and names.index(raw["name"]) != at[-1]:
                self.fail((*at, "name"), f"two phases are named {raw['name']!r}")

    def _arms(
        self, data: Any, kind: str, at: Location, names: list[Any]
    ) -> tuple[list[Arm], dict[str, tuple[Any, ...]]]:
        if kind == "runs":
            return self._runs(data, at), {}
        axes = self._axes(data, at)
        if not axes:
            return [], {}
        if kind == "zip" and len({len(axis.values) for axis in axes}) > 1:
            sizes = ", ".join(f"{axis.label} has {len(axis.values)}" for axis in axes)
            self.fail(at, f"zip needs lists of equal length; {sizes}")
            return [], {}
        if (n := count(kind, axes)) > MOST_TRIALS:
            product = (" x " if kind == "grid" else " + ").join(str(len(axis.values)) for axis in axes)
            self.fail(at, f"{product} = {n:.3g} arms, at most {MOST_TRIALS} trials are planned")
            return [], {}
        return SWEEPS[kind](axes), {axis.setting: axis.values for axis in axes}

    def _axes(self, data: Any, at: Location) -> list[Axis]:
        if not isinstance(data, dict) or not data:
            self.fail(at, "nothing varies: give at least one setting with a list of values")
            return []
        named, problems = named_settings(TrainConfig, data, at)
        self.problems += problems
        self._sweepable(named)
        axes = []
        for setting, (values, location) in named.items():
            if not isinstance(values, list):
                self.fail(location, f"expected a list of values, got {values!r}")
            elif not values:
                self.fail(location, "the list of values is empty")
            elif len({repr(value) for value in values}) < len(values):
                self.fail(location, f"a value is listed twice: {values}")
            else:
                axes.append(Axis(str(location[-1]), setting, tuple(values), location))
        return axes

    def _runs(self, data: Any, at: Location) -> list[Arm]:
        if not isinstance(data, list) or not data:
            self.fail(at, "`runs:` is a list of arms, such as `- {arm: baseline}`")
            return []
        arms = []
        for i, raw in enumerate(data):
            where = (*at, i)
            if not isinstance(raw, dict) or "arm" not in raw:
                self.fail(where, "a run is a mapping with `arm:`, its name, and the settings it changes")
                continue
            self._name(raw["arm"], (*where, "arm"), "arm", ARM_NAME)
            changes = {key: value for key, value in raw.items() if key not in ("arm", "inherit")}
            named, problems = named_settings(TrainConfig, changes, where)
            self.problems += problems
            self._sweepable(named)
            origins = {name: location for name, (_, location) in named.items()} | {"inherit": (*where, "inherit")}
            overrides = {name: value for name, (value, _) in named.items()}
            if raw["arm"] in [arm.name for arm in arms]:
                self.fail((*where, "arm"), f"two arms are named {raw['arm']!r}")
            if raw["arm"] == BASELINE.name and (overrides or raw.get("inherit")):
                self.fail(where, "the arm `baseline` is the phase's base as it is; give another name to a changed one")
            arm = Arm(str(raw["arm"]), overrides, raw.get("inherit"), origins)
            twin = next((a.name for a in arms if (a.overrides, a.inherit) == (arm.overrides, arm.inherit)), None)
            if twin is not None:
                self.fail(where, f"the arm {arm.name!r} changes the same settings as {twin!r}")
            arms.append(arm)
        return arms

    def _seeds(self, seeds: Any, at: Location) -> tuple[int, ...] | Fresh:
        """The phase's own seeds; an empty tuple stands for the campaign's."""
        if seeds is None:
            return ()
        if isinstance(seeds, str) and (match := re.fullmatch(r"fresh +([1-9][0-9]{0,3})", seeds)):
            return Fresh(int(match[1]))
        whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            self.fail(at, f"expected a list of different whole numbers or `fresh N`, got {seeds!r}")
            return ()
        return tuple(seeds)

    def _known_phase(self, name: Any, at: Location, names: list[Any]) -> None:
        if name is not None and name not in names:
            self.fail(at, unknown("phase", name, [str(known) for known in names]))

    def _sweepable(self, named: Mapping[str, tuple[Any, Location]]) -> None:
        for name, (_, location) in named.items():
            if name == "seed":
                self.fail(location, "seeds are not swept: every arm runs all of `seeds:`")
            elif not is_identity(TrainConfig, name):
                self.fail(location, f"{name} does not change what is computed, so arms cannot differ in it")

    # ---- values ----------------------------------------------------------------------------------------------------

    def _buildable(
        self,
        base: Mapping[str, tuple[Any, Location]],
        changes: Mapping[str, Any],
        origins: Mapping[str, Location],
    ) -> TrainConfig | None:
        """Checks one complete config; each problem is put where the offending value was written."""
        values = {name: value for name, (value, _) in base.items()} | dict(changes)
        where = {name: location for name, (_, location) in base.items()} | dict(origins)
        try:
            return build(TrainConfig, values)
        except ConfigError as error:
            for problem in error.problems:
                setting = ".".join(str(part) for part in problem.location if isinstance(part, str))
                self.fail(where.get(setting, ("base",)), problem.message)
            return None

    def _check_values(
        self, base: Mapping[str, tuple[Any, Location]], phases: Sequence[Phase | None]
    ) -> TrainConfig | None:
        config = self._buildable(base, {}, {})
        if self.problems or config is None:
            return None
        data_arms = {name for phase in phases if phase for arm in phase.arms for name in arm.overrides}
        try:
            resolved(config)
        except ConfigError as error:
            at = base.get("data.corpus", (None, ("base",)))[1]
            tokenizer = base.get("data.tokenizer", (None, at))[1]
            self.fail(tokenizer if "tokenizer" in str(error) or "vocab" in str(error) else at, str(error))
        if any(name.startswith("data.") for name in data_arms):
            for phase in filter(None, phases):
                for arm in phase.arms:
                    self._resolvable(config, phase, arm)
        return config

    def _resolvable(self, config: TrainConfig, phase: Phase, arm: Arm) -> None:
        try:
            resolved(build(TrainConfig, flatten(config) | dict(phase.pinned) | dict(arm.overrides)))
        except ConfigError as error:
            origin = next((arm.origins[name] for name in arm.overrides if name.startswith("data.")), ("base",))
            self.fail(origin, str(error))

    def _ordered(self, phases: list[Phase], file: CampaignFile) -> tuple[Phase, ...]:
        """Phases such that each comes after those it needs, otherwise as written, with the campaign's seeds filled in."""
        by_name = {phase.name: phase for phase in phases}
        try:
            TopologicalSorter({phase.name: phase.needs for phase in phases}).prepare()
        except CycleError as error:
            circle = error.args[1]
            at = next(i for i, phase in enumerate(phases) if phase.name in circle)
            self.fail(("phases", at, "inherit"), f"phases inherit in a circle: {' -> '.join(circle)}")
            return ()
        done: list[str] = []
        while len(done) < len(phases):
            done.append(next(p.name for p in phases if p.name not in done and p.needs <= set(done)))
        filled = (replace(by_name[name], seeds=by_name[name].seeds or tuple(file.seeds)) for name in done)
        return tuple(filled)


def _explained(error: ValueError) -> list[Problem]:
    """The problems of the file's top level as `build` words them."""
    import pydantic

    assert isinstance(error, pydantic.ValidationError)
    found = []
    for item in error.errors():
        location: Location = tuple(part for part in item["loc"] if isinstance(part, int) or part.isidentifier())
        if item["type"] == "extra_forbidden":
            cls = CampaignFile.model_fields[str(location[0])].annotation
            names = list(settings(cls)) if isinstance(cls, type) and issubclass(cls, Config) else []
            found.append(Problem(location, unknown("setting", location[-1], names)))
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            found.append(Problem(location, f"{message}, got {item['input']!r}"))
    return found
