"""Checks the phases, and builds every config that the campaign may train.

Which settings a phase inherits is known only during the run. To find mistakes before anything is trained, each arm of
an earlier phase is assumed to win in turn. Each problem is reported at the value that causes it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, Problem, build, dotted_name, settings, unknown_message
from ngpt.config.overrides import located, named_settings
from ngpt.data import dataset as corpora
from ngpt.data.tokens.tokenizer import tokenizer_vocab_size
from ngpt.distributed.strategies import model_problem
from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.bundle_files import DOWNLOAD, downloaded_bundle
from ngpt.downstream.harness import require_harness
from ngpt.training.config import TrainConfig, resolved, with_absolute_paths
from ngpt.training.load_model import check_initial_weights
from ngpt.training.run import rank_problems
from tune import format as fmt
from tune.spec.metrics import SCORES
from tune.spec.phase_reader import PhasesInFile
from tune.spec.reading import LocatedSettings, Reading
from tune.spec.schema import EarlyStop, Evaluation, Header, Phase, Resources, UntilDecided
from tune.spec.sweeps import BASELINE, ArmSpec

EVALUATION = "evaluation"  # the key of a campaign file
MAX_COMBINATIONS = 10_000  # of an inheriting arm and possible earlier winners; they take a second at most to check
MAX_JOINED = 100  # arms of a combining phase that are considered when another phase joins it

Phases = Mapping[str, Phase]  # by name, or by path in another results directory


class ConfigChecker:
    """Builds configs from one base: the settings `given` in the file, overridden by the command line's `options`.

    A value is reported once, even if it makes a hundred arms invalid, and a corpus is looked up once.
    """

    def __init__(self, given: LocatedSettings, options: LocatedSettings, resources: Resources) -> None:
        self._given, self._options, self._resources = given, options, resources
        self._reported: set[Location] = set()
        self._looked_up: set[str] = set()

    def check(
        self, changes: LocatedSettings | None = None, *, start: LocatedSettings | None = None, note: str = ""
    ) -> Reading[TrainConfig | None]:
        """Builds and checks the base, or the base with `start` and then `changes` applied; returns a valid config.

        If the changes make a valid config invalid, the problem is reported at the changes. Mistakes of the base itself
        are reported only when the base is checked. `note` is appended to messages.
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
                    yield from self._report_setting(given, name, rest, problem.message + note)
        fits = yield from self._check_data({**base, **(start or {})}, changes or {}, note)
        if config is not None:
            yield from self._check_ranks(config, given, changes or {}, note)
        return config if fits else None

    def _check_ranks(
        self, config: TrainConfig, given: LocatedSettings, changes: LocatedSettings, note: str
    ) -> Reading[None]:
        """Checks that the ranks of a trial can train these settings."""
        resources, of_ranks = self._resources, ("resources", "ranks_per_trial")
        if "distributed.strategy" in given:
            text = "a campaign says this in its resources: {ranks_per_trial: N, strategy: ...}"
            yield from self._report(given["distributed.strategy"][1], text)
            return
        shared = config.distributed.model_copy(update={"strategy": resources.strategy})
        config = config.model_copy(update={"distributed": shared})
        for (name, *_), message in rank_problems(config, resources.ranks_per_trial):
            _, location = given.get(str(name), (None, of_ranks))
            yield from self._report(location, message + note)
        if message := model_problem(shared, config.model, resources.ranks_per_trial):
            locations = [layer[name][1] for layer in (changes, given) for name in SIZES if name in layer]
            yield from self._report(next(iter(locations), of_ranks), message + note)

    def _report_setting(self, given: LocatedSettings, name: str, rest: Location, message: str) -> Reading[None]:
        """Reports a problem at the value of a setting, or at the item of a list that `rest` points to."""
        value, location = given.get(name, (None, ("base",)))
        if len(rest) == 1 and isinstance(value, list) and rest[0] in range(len(value)):
            value, location = value[int(rest[0])], (*location, *rest)
        elif rest and message.startswith("field required"):
            message = message.replace("field required", f"value {int(rest[0]) + 1} is missing", 1)
        yield from self._report(location, message + _advice(message, value))

    def _report(self, location: Location, message: str) -> Reading[None]:
        if location not in self._reported:
            self._reported.add(location)
            yield Problem(location, message)

    def _check_data(self, base: LocatedSettings, changes: LocatedSettings, note: str) -> Reading[bool]:
        """Checks that corpus and tokenizer exist and fit the model; returns False if it reports a problem.

        Each combination is looked up once.
        """
        everything = {**base, **changes}
        has_weights = everything.get("init_from", (None,))[0] is not None
        looked_up = [*DATA_SETTINGS, *(MODEL_SETTINGS if has_weights else ())]
        given = {name: entry for name, entry in everything.items() if name in looked_up}
        key = repr(sorted((name, value) for name, (value, _) in given.items()))
        if key in self._looked_up or not _is_valid(given):
            return True
        self._looked_up.add(key)
        config = build(TrainConfig, _values(given))
        for name, look_up in DATA_CHECKS.items():
            try:
                look_up(config)
            except (ConfigError, OSError) as error:  # OSError: the path is too long or unreadable
                # Report it at the setting, or if the file does not set it, at another one that the lookup depends on.
                names = (name, *DATA_CHECKS)
                if name == "init_from" and changes:  # any setting of the model may be to blame, unless the base is
                    names = (*names, *MODEL_SETTINGS) if _passes(look_up, base) else names
                locations = [layer[setting][1] for layer in (changes, base) for setting in names if setting in layer]
                yield from self._report(locations[0] if locations else ("base",), f"{error}{note}")
                return False
        return True


def _vocab_size(config: TrainConfig) -> int:
    if not config.data.corpus.strip():  # as a path, it would be the whole working directory
        raise ConfigError(f"a corpus is a name, a file or a folder, got {config.data.corpus!r}")
    return corpora.vocab_size(config.data)


def _initial_weights(config: TrainConfig) -> None:
    if config.init_from is not None:
        config = resolved(config)
        check_initial_weights(config.model, str(config.init_from), config.init_sha256)


# For each setting, the check that fails if its value is wrong; later checks rely on the earlier ones.
DATA_CHECKS: dict[str, Callable[[TrainConfig], object]] = {
    "data.tokenizer": lambda config: tokenizer_vocab_size(config.data.tokenizer),
    "data.corpus": _vocab_size,
    "data.shards": lambda config: corpora.check_shards(config.data),
    "data.path": lambda config: corpora.fingerprint(config.data),
    "init_from": _initial_weights,
    "model.vocab_size": resolved,
}
DATA_SETTINGS = (*DATA_CHECKS, "data.val_fraction", "data.splits", "data.token_dtype", "data.text_column")
SIZES = ("model.n_embd", "model.n_head", "model.n_kv_head", "model.mlp_ratio")  # of the matrices of a model
MODEL_SETTINGS = ("init_sha256", *(name for name in settings(TrainConfig) if name.startswith("model.")))


def check_cycles(file: PhasesInFile) -> Reading[None]:
    """Reports phases that inherit from each other in a cycle."""
    graph = {phase.name: sorted(phase.needs) for phase in file.phases}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1][:0:-1]  # each phase inherits from the next one, the last from the first
        first = min(range(len(cycle)), key=lambda i: list(graph).index(cycle[i]))
        cycle = [*cycle[first:], *cycle[: first + 1]]
        message = f"phases inherit from each other in a cycle: {' -> '.join(cycle)}"
        yield Problem(file.references[cycle[0], cycle[1]], message)


def in_dependency_order(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Sorts phases without cycles: each comes after those it depends on, otherwise in the order of the file."""
    done: dict[str, Phase] = {}
    while len(done) < len(phases):
        phase = next(phase for phase in phases if phase.name not in done and phase.needs <= done.keys())
        done[phase.name] = phase
    return tuple(done.values())


def check_configs(checker: ConfigChecker, file: PhasesInFile, *, inherited: bool) -> Reading[None]:
    """Builds every config that the campaign may train; without `inherited`, only those that inherit no winner."""
    for phase in file.phases:
        for arm in _arms(phase):
            yield from checker.check(_located(phase) | _located(arm))
    if not inherited:
        return
    phases = {phase.name: phase for phase in file.phases}
    for path, (winner, at) in file.winners.items():  # as a phase with a single arm
        arm = ArmSpec("winner", winner.overrides, origins=dict.fromkeys(winner.overrides, at))
        phases[path] = Phase(path, None, {}, (arm,), (), {})
    for phase in file.phases:
        inheriting = ((arm, start) for arm in _arms(phase) for start in _starts(phase, arm, phases) if start)
        for arm, start in islice(inheriting, MAX_COMBINATIONS // len(file.phases)):
            values = fmt.settings({name: value for name, (value, _) in start.items()})
            changes = _located(phase) | _located(arm)
            yield from checker.check(changes, start=start, note=f" (if {values} wins the earlier phase)")


def check_early_stop(rule: EarlyStop, phases: Iterable[Phase], *, base: TrainConfig, hold: str) -> Reading[None]:
    """Checks that each phase with a search trains past the first rung, evaluates there and compares equal steps."""
    at, searching = ("early_stop",), [phase for phase in phases if phase.stops_early]
    if not searching:
        yield Problem(at, "only phases with `search:` can stop trials early, and no phase has one")
    for phase in searching:
        settled = {"steps": base.steps, "eval_every": base.eval_every} | dict(phase.pinned)
        steps, every, first = settled["steps"], settled["eval_every"], (*at, "first")
        if isinstance(phase.seeds, UntilDecided):
            text = f"phase {phase.name} gives seeds until its arms are decided, which stops arms by itself"
            yield Problem(at, f"{text}; remove `early_stop:`, or list the seeds of that phase")
        elif (phase.hold or hold) == "seconds":
            text = f"phase {phase.name} holds seconds, so its arms cannot be compared at the same step"
            yield Problem(at, f"{text}; use `hold: tokens` or `hold: steps` there")
        elif rule.first >= steps:
            text = f"must be less than {steps}, the steps that phase {phase.name} trains, got {rule.first}"
            yield Problem(first, text)
        elif rule.first % every:
            text = f"phase {phase.name} evaluates every {every} steps, so not at step {rule.first}"
            yield Problem(first, f"{text}; use a multiple of {every}, or another eval_every")


def check_equal_time(resources: Resources, phases: Iterable[Phase], *, hold: str) -> Reading[None]:
    """Refuses `hold: seconds` for trials of several ranks, since speeds are measured on one device."""
    timed = [phase.name for phase in phases if (phase.hold or hold) == "seconds"]
    if resources.ranks_per_trial > 1 and timed:
        text = f"phase {timed[0]} holds seconds, which are measured on one device; use `hold: tokens` or `hold: steps`"
        yield Problem(("resources", "ranks_per_trial"), text)


def _arms(phase: Phase) -> Iterator[ArmSpec]:
    """The arms of a phase; for a search that proposes its arms during the run, the limits of its space."""
    yield from (BASELINE, *phase.arms)
    yield from phase.search.probes() if phase.search else ()


def _located(part: Phase | ArmSpec) -> dict[str, tuple[Any, Location]]:
    """The settings that an arm or `set:` changes, each with its location in the file."""
    changes = part.pinned if isinstance(part, Phase) else part.overrides
    return {name: (value, part.origins.get(name, ())) for name, value in changes.items()}


def _starts(phase: Phase, arm: ArmSpec, phases: Phases) -> Iterator[LocatedSettings]:
    """The settings an arm may inherit: one mapping per combination of winners its phase and it may inherit from."""
    for outer in _winners(phase.inherit, phases):
        for inner in _winners(arm.inherit, phases):
            yield {**outer, **inner}


def _winners(name: str | None, phases: Phases) -> Iterator[LocatedSettings]:
    """For each arm of phase `name`, the settings that others inherit if it wins; one empty mapping without a name."""
    if name is None:
        yield {}
        return
    phase = phases[phases[name].confirms or name]
    for arm in chain(_arms(phase), _joined(phase, phases, {})):  # lazily: the joined arms may be too many to list
        for start in _starts(phase, arm, phases):
            inherited = {setting: value for setting, value in start.items() if setting not in phase.pinned}
            yield inherited | _located(arm)


def _joined(phase: Phase, phases: Phases, known: dict[str, tuple[ArmSpec, ...]]) -> Iterator[ArmSpec]:
    """The arms that a combining phase may have: each merges one arm, or the baseline, of every phase it combines.

    A source phase that combines others itself contributes at most MAX_JOINED arms, which are cached in `known`.
    """
    for name in phase.combine:
        if name not in known:
            known[name] = tuple(islice(_joined(phases[name], phases, known), MAX_JOINED))
    sources = [(BASELINE, *phases[name].arms, *known[name]) for name in phase.combine]
    for chosen in product(*sources) if sources else ():
        overrides = {name: value for arm in chosen for name, value in arm.overrides.items()}
        origins = {name: at for arm in chosen for name, at in arm.origins.items()}
        yield ArmSpec(" + ".join(arm.name for arm in chosen), overrides, None, origins)


def _values(given: LocatedSettings) -> dict[str, Any]:
    return with_absolute_paths({name: value for name, (value, _) in given.items()})


def _culprit(base: LocatedSettings, changes: LocatedSettings) -> str | None:
    """Applies the changes one by one and returns the first that makes the config invalid.

    None if there is none, or if the base is invalid already.
    """
    given = dict(base)
    for name in (None, *changes):  # None: the base without changes
        given |= {name: changes[name]} if name else {}
        if not _is_valid(given):
            return name
    return None


def _is_valid(given: LocatedSettings) -> bool:
    try:
        build(TrainConfig, _values(given))
    except ConfigError:
        return False
    return True


def _passes(look_up: Callable[[TrainConfig], object], given: LocatedSettings) -> bool:
    try:
        look_up(build(TrainConfig, _values(given)))
    except (ConfigError, OSError):
        return False
    return True


def _split(location: Location) -> tuple[str, Location]:
    """Splits a location reported by `build` into the setting's name and the path inside its value."""
    for end in range(len(location), 0, -1):
        if (name := dotted_name(location[:end])) in settings(TrainConfig):
            return name, location[end:]
    return dotted_name(location), ()


def _advice(message: str, value: Any) -> str:
    whole = message.startswith("input should be a valid integer") and isinstance(value, float) and value.is_integer()
    return f"; write {int(value)}" if whole else ""


def read_evaluation(data: Any) -> Reading[Evaluation | None]:
    """Reads the keys of `evaluation:`; its metrics are then known. Paths become absolute."""
    found, problems = named_settings(Evaluation, data, (EVALUATION,))
    try:
        evaluation = build(Evaluation, {name: value for name, (value, _) in found.items()})
    except ConfigError as error:
        yield from problems
        yield from (located(problem, found) for problem in error.problems)
        return None
    yield from problems
    if not evaluation.tasks and evaluation.core is None:
        yield Problem((EVALUATION,), "nothing is evaluated: give `tasks:` of lm-evaluation-harness, or `core:`")
    paths = {name: getattr(evaluation, name) for name in ("include_path", "core")}
    paths = {name: path for name, path in paths.items() if path is not None and (name, path) != ("core", DOWNLOAD)}
    absolute = {name: str(Path(path).expanduser().absolute()) for name, path in paths.items()}
    if "include_path" in absolute and not Path(absolute["include_path"]).is_dir():
        yield Problem((EVALUATION, "include_path"), f"no such folder: {absolute['include_path']}")
    try:
        # To read a campaign downloads nothing; `launch` does.
        if "core" in absolute or (evaluation.core == DOWNLOAD and downloaded_bundle().exists()):
            read_bundle(absolute.get("core", DOWNLOAD), limit=evaluation.limit)
    except ConfigError as error:
        yield Problem((EVALUATION, "core"), str(error))
    try:
        if evaluation.tasks:
            require_harness()
    except ConfigError as error:
        yield Problem((EVALUATION, "tasks"), str(error))
        return None
    SCORES.choose(evaluation.tasks, core=evaluation.core is not None)
    return evaluation.model_copy(update=absolute)


def check_evaluation(header: Header, phases: Sequence[str]) -> Reading[None]:
    """Checks that the phases exist, and that every phase has the metric by which arms are compared."""
    assert header.evaluation is not None
    for i, name in enumerate(header.evaluation.phases):
        if name not in phases:
            yield Problem((EVALUATION, "phases", i), unknown_message("phase", name, phases))
    if header.metric.name not in SCORES:
        return
    if missing := [name for name in phases if not header.evaluation.asks(name)]:
        text = f"arms are compared by {header.metric.name}, which the phase {missing[0]} would not have"
        yield Problem((EVALUATION, "phases"), f"{text}: leave out `phases:`")
    if header.early_stop is not None:
        text = f"{header.metric.name} is measured at the end of a trial, and `early_stop:` needs a metric before"
        yield Problem(("early_stop",), text)
