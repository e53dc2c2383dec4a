"""From a campaign file to a `Campaign`: checked in full, every mistake answered with file, line, column and advice.

The types are in tune/spec/schema.py, the reading of one phase in tune/spec/phase_reader.py, the checks of values in tune/spec/validation.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, build, settings, unknown, visible
from ngpt.config.overrides import named_settings
from ngpt.config.secrets import is_secret_name, refuse_secrets
from ngpt.config.yaml_reader import parse_assignment, read_yaml
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.analysis.asha import check_early_stop
from tune.claims.reader import check_claims, read_claims
from tune.spec.phase_reader import PhaseInFile, PhaseReader, arm_changes, chained_phase, check_name, read_seeds
from tune.spec.schema import KINDS, Campaign, EarlyStop, Header, Phase
from tune.spec.sweeps import BASELINE, ArmSpec
from tune.spec.validation import OPTION, ConfigChecker, Given, Problems, TooManyProblems

TOP_KEYS = ("campaign", *Header.model_fields, "seeds", "base", "phases", *KINDS, "claims")
SEEDS = (1, 2, 3)  # of a campaign that gives none
MOST_JOINED = 100  # arms of a combining phase that another one joins
MOST_PHASES = 100  # each inherits from those before it, so that what one may start from is found by recursion
MOST_COMBINATIONS = 10_000  # of arms that inherit and ways in which earlier phases may end; a second at most


def load_campaign(path: Path, assignments: Sequence[str] = ()) -> Campaign:
    """Reads and checks a campaign file; `assignments` are `--set` options, `name=value`, and change the base.

    Paths in it are relative to the working directory, and absolute in the result.

    Raises:
        ConfigError: everything that is wrong, one line each, with path, line and column.
    """
    document = read_yaml(path)
    text = path.read_text(encoding="utf-8")
    refuse_secrets(text, str(path))
    for assignment in assignments:
        refuse_secrets(assignment, OPTION)
    problems = Problems()
    try:
        campaign = _read(document.data, assignments, problems, path.parent)
    except TooManyProblems:
        campaign = None
    if problems.all or campaign is None:
        raise ConfigError(problems.in_file_order(document))
    return replace(campaign, text=text, assignments=tuple(assignments))


def _read(data: Any, assignments: Sequence[str], problems: Problems, folder: Path) -> Campaign | None:
    """The campaign in the plain data of a file in `folder`; None, and problems, if there is anything wrong with it."""
    if not isinstance(data, dict):
        problems.add((), "a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)")
        return None
    for key in data:
        if key not in TOP_KEYS:
            problems.add((key,), unknown("setting", key, TOP_KEYS))
    if "campaign" not in data:
        problems.add((), "`campaign:` is missing: give the campaign a name")
    else:
        check_name(problems, data["campaign"], ("campaign",), "campaign")
    header = _header(data, problems)
    seeds = read_seeds(problems, data["seeds"], ("seeds",)) if "seeds" in data else SEEDS

    checker = ConfigChecker(problems)
    base = checker.check_base(_base(data.get("base", {}), problems, folder), _options(assignments, problems))
    raw_phases = _raw_phases(data, problems)
    names = [str(raw["name"]) for raw, _ in raw_phases if isinstance(raw, dict) and "name" in raw]
    reader = PhaseReader(problems, names, seeds, folder)
    phases = [_searching(phase, raw) for raw, at in raw_phases if (phase := reader.read(raw, at))]
    _check_circles(phases, reader.inherits, problems)
    others = [chained_phase(path, found, reader.chained_at[path]) for path, found in reader.chained.items()]
    _check_arms(checker, phases, others, ready=not problems.all)
    if header and header.early_stop and base:
        searching = [found.phase for found in phases if found.phase.stops_early]
        check_early_stop(problems, header.early_stop, searching, base=base, hold=header.hold)
    ready = not problems.all
    claims = read_claims(problems, data["claims"], folder) if "claims" in data else {}
    if not ready or header is None or base is None:
        return None
    ordered = _in_order_of_need([found.phase for found in phases])
    check_claims(problems, claims, ordered, base)
    return Campaign(
        name=data["campaign"],
        base=base,
        phases=ordered,
        claims=tuple(claims.values()),
        inherited=reader.chained,
        text="",
        assignments=(),
        **{name: getattr(header, name) for name in Header.model_fields},
    )


def _searching(found: PhaseInFile, raw: Mapping[str, Any]) -> PhaseInFile:
    """A phase that knows whether early stopping is for it; arms that were drawn at random do not tell."""
    return replace(found, phase=replace(found.phase, stops_early="search" in raw))


def _header(data: Mapping[str, Any], problems: Problems) -> Header | None:
    """The settings of the campaign itself: what it measures, how it judges, what it may use."""
    values: dict[str, Any] = {}
    known = (*settings(Header), *(f"early_stop.{name}" for name in settings(EarlyStop)))
    for key in Header.model_fields:
        names = [name.partition(".")[2] for name in known if name.startswith(f"{key}.")]
        if key in data and not names:
            values[key] = data[key]
        elif key in data and not isinstance(data[key], dict):
            problems.add((key,), f"must be a mapping of settings, got {data[key]!r}")
        elif key in data:
            values |= {} if data[key] else {key: {}}
            for name, value in data[key].items():
                if name in names:
                    values[f"{key}.{name}"] = value
                else:
                    problems.add((key, name), unknown("setting", name, names))
    try:
        return build(Header, values)
    except ConfigError as error:
        for problem in error.problems:
            problems.add(*problem)
        return None


def _base(data: Any, problems: Problems, folder: Path) -> dict[str, tuple[Any, Location]]:
    if isinstance(data, dict):
        for key in (misplaced := [key for key in data if key in TOP_KEYS]):
            problems.add(("base", key), f"`{key}:` belongs to the top of the file, not into `base:`")
        data = {key: value for key, value in data.items() if key not in misplaced}
    given, wrong = named_settings(TrainConfig, data, ("base",), folder=folder)
    for problem in wrong:
        problems.add(*problem)
    if "seed" in given:
        _, at = given.pop("seed")
        problems.add(at, "seeds belong to the campaign: write `seeds: [1, 2, 3]` at the top")
    return given


def _options(assignments: Sequence[str], problems: Problems) -> dict[str, tuple[Any, Location]]:
    """The settings of `--set`, each located at its own text; a later one beats an earlier one."""
    given: dict[str, tuple[Any, Location]] = {}
    for text in assignments:
        shown = f"{text.partition('=')[0]}=..." if is_secret_name(text.partition("=")[0]) else text
        at = (f"{OPTION} {shown}",)
        try:
            name, value = parse_assignment(text)
        except ConfigError as error:
            problems.add(at, str(error).removeprefix(f"{OPTION} {visible(text)}: ").removeprefix(f"{OPTION}:"))
            continue
        top = name.partition(".")[0]
        if top in TOP_KEYS and top != "base":
            problems.add(at, f"`{top}:` belongs to the campaign file, at its top; {OPTION} changes the base")
            continue
        found, wrong = named_settings(TrainConfig, {name: value})
        given |= {setting: (value, at) for setting, (value, _) in found.items()}
        for problem in wrong:
            problems.add(at, problem.message)
    if "seed" in given:
        _, at = given.pop("seed")
        problems.add(at, "seeds belong to the campaign file: write `seeds: [1, 2, 3]` at its top")
    return given


def _raw_phases(data: Mapping[str, Any], problems: Problems) -> list[tuple[Any, Location]]:
    """The phases with their locations; a file without `phases:` is a single phase named main."""
    short = {key: data[key] for key in KINDS if key in data}
    if "phases" not in data:
        if not short:
            problems.add((), f"nothing varies: give `phases:`, or one of {', '.join(KINDS)}")
        return [({"name": "main"} | short, ())] if short else []
    for key in short:
        problems.add((key,), f"`{key}:` at the top is for files without `phases:`; move it into a phase")
    phases = data["phases"]
    if isinstance(phases, list) and len(phases) > MOST_PHASES:
        problems.add(("phases",), f"{len(phases)} phases; a campaign has at most {MOST_PHASES}")
        return []
    if isinstance(phases, list) and phases:
        return [(raw, ("phases", i)) for i, raw in enumerate(phases)]
    problems.add(("phases",), f"expected a list of phases, got {phases!r}")
    return []


def _check_arms(
    checker: ConfigChecker, phases: Sequence[PhaseInFile], others: Sequence[PhaseInFile], *, ready: bool
) -> None:
    """Builds every config that the campaign may train: a mistake must show now, not when its phase begins.

    What a phase inherits is not known yet, so every way in which earlier phases may end is tried, unless there are
    problems already (not `ready`) that could be the cause.
    """
    for found in phases:
        for arm in (BASELINE, *found.phase.arms, *_probes(found)):
            checker.check({**found.pinned, **arm_changes(arm)})
    if not ready:
        return
    by_name = {found.phase.name: found for found in (*phases, *others)}
    for found in phases:
        for arm, start in islice(_inheriting(found, by_name), MOST_COMBINATIONS // len(phases)):
            values = fmt.settings({name: value for name, (value, _) in start.items()})
            changes = {**found.pinned, **arm_changes(arm)}
            checker.check(changes, start=start, note=f" (after {values} has won)")


def _inheriting(found: PhaseInFile, phases: Mapping[str, PhaseInFile]) -> Iterator[tuple[ArmSpec, Given]]:
    """The arms of a phase, each with everything it may start from."""
    for arm in (BASELINE, *found.phase.arms, *_probes(found)):
        yield from ((arm, start) for start in _starts(found, arm.inherit, phases) if start)


def _starts(found: PhaseInFile, inherit: str | None, phases: Mapping[str, PhaseInFile]) -> Iterator[Given]:
    """What an arm may start from: each possible winner of the phases that its phase and itself inherit from."""
    for outer in _winners(found.phase.inherit, phases):
        for inner in _winners(inherit, phases):
            yield {**outer, **inner}


def _winners(name: str | None, phases: Mapping[str, PhaseInFile]) -> Iterator[Given]:
    """What each arm of a phase would hand on, if it won; all that without a phase is nothing."""
    if name is None:
        yield {}
        return
    found = phases[name]
    # One by one: there may be more arms to join than anybody can count.
    for arm in chain((BASELINE, *found.phase.arms, *_probes(found)), _joined(found, phases)):
        for start in _starts(found, arm.inherit, phases):
            kept = {setting: entry for setting, entry in start.items() if setting not in found.pinned}
            yield {**kept, **arm_changes(arm)}


def _probes(found: PhaseInFile) -> Iterator[ArmSpec]:
    """What stands for the arms that a search will propose."""
    yield from found.phase.search.probes() if found.phase.search else ()


def _joined(
    found: PhaseInFile, phases: Mapping[str, PhaseInFile], known: dict[str, tuple[ArmSpec, ...]] | None = None
) -> Iterator[ArmSpec]:
    """Arms that a combining phase may come to have: at most one of each phase that it joins.

    Phases that join phases that join have too many to look at; of each of those some do, which are `known` once found.
    """
    known = {} if known is None else known
    for name in found.phase.combine:
        if name not in known:
            known[name] = tuple(islice(_joined(phases[name], phases, known), MOST_JOINED))
    sources = [(BASELINE, *phases[name].phase.arms, *known[name]) for name in found.phase.combine]
    for chosen in product(*sources) if sources else ():
        overrides = {name: value for arm in chosen for name, value in arm.overrides.items()}
        origins = {name: at for arm in chosen for name, at in arm.origins.items()}
        yield ArmSpec(" + ".join(arm.name for arm in chosen), overrides, None, origins)


def _check_circles(
    phases: Sequence[PhaseInFile], inherits: Mapping[tuple[str, str], Location], problems: Problems
) -> None:
    graph = {found.phase.name: sorted(found.phase.needs) for found in phases}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][:0:-1]  # as a list of who inherits from the next; the first is the last, too
        first = min(range(len(circle)), key=lambda i: list(graph).index(circle[i]))
        circle = [*circle[first:], *circle[:first]]
        at = inherits[circle[0], circle[1 % len(circle)]]
        problems.add(at, f"phases inherit in a circle: {' -> '.join([*circle, circle[0]])}")


def _in_order_of_need(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Phases such that each comes after those it needs, otherwise as written."""
    done: dict[str, Phase] = {}
    while len(done) < len(phases):
        phase = next(phase for phase in phases if phase.name not in done and phase.needs <= done.keys())
        done[phase.name] = phase
    return tuple(done.values())
