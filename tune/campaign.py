"""Reads and validates a campaign file; each mistake is reported with file, line, column and advice.

The YAML nodes become typed settings (tune/spec/schema.py), then the arms of each phase (tune/spec/phase_reader.py).
Finally, every config that the campaign may train is built and checked (tune/spec/validation.py).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ngpt.config.base import (
    ConfigError,
    Location,
    Problem,
    build,
    printable,
    resolve,
    sections,
    unknown_message,
)
from ngpt.config.overrides import as_assignments, named_settings
from ngpt.config.secrets import is_secret_name, refuse_secrets
from ngpt.config.yaml_reader import parse_assignment, read_yaml
from ngpt.training.config import TrainConfig
from tune.claims.possible_arms import check_claims, check_metric
from tune.claims.reader import read_claims
from tune.spec.inherited_seeds import shift_inherited_seeds
from tune.spec.metrics import SCORES, metric_goal
from tune.spec.phase_reader import PHASE_KEYS, PhasesInFile, read_phases
from tune.spec.reading import OPTION, LocatedSettings, Reading, check_name, collect, complete, read_seeds
from tune.spec.schema import Budget, Campaign, EarlyStop, Evaluation, Header, Metric, Resources, SeedRule, kinds
from tune.spec.seeds import read_seed_rule
from tune.spec.validation import (
    ConfigChecker,
    check_configs,
    check_cycles,
    check_early_stop,
    check_equal_time,
    check_evaluation,
    in_dependency_order,
    read_evaluation,
)
from tune.storage.names import RESERVED_BESIDE

TOP_KEYS = ("campaign", *Header.model_fields, "seeds", "base", "phases", "claims")  # besides the kinds of phases
HEADER_SECTIONS = {"metric": Metric, "resources": Resources, "budget": Budget, "early_stop": EarlyStop}
FIXED_KEYS = {*TOP_KEYS, *PHASE_KEYS, "runs", "combine", "search"}  # that no sweep of a plug-in can have
DEFAULT_SEEDS = (1, 2, 3)

# A parsed campaign file before its configs are checked; None marks a part with problems.
Draft = tuple[Header | None, TrainConfig | None, ConfigChecker, PhasesInFile]


def top_keys() -> tuple[str, ...]:
    """The keys of a campaign file."""
    return (*TOP_KEYS, *kinds())


def load_campaign(path: str | os.PathLike[str], overrides: Mapping[str, Any] | Sequence[str] = ()) -> Campaign:
    """Reads and checks a campaign file.

    Paths in the file are relative to the working directory and become absolute.

    Args:
        overrides: settings that change the `base:` of the file: a mapping such as `{"optim.lr": 1e-3}`, or texts as
            `--set` has them, `optim.lr=1e-3`.

    Raises:
        ConfigError: the file has mistakes; the message has one line for each, with path, line and column.
    """
    path, assignments = Path(path), as_assignments(overrides)
    document = read_yaml(path)
    text = path.read_text(encoding="utf-8")
    refuse_secrets(text, str(path))
    for assignment in assignments:
        refuse_secrets(assignment, OPTION)
    campaign = complete(_read(document.data, assignments, path.parent), document)
    return replace(campaign, text=text, assignments=assignments, path=path)


def _read(data: Any, assignments: Sequence[str], folder: Path) -> Reading[Campaign | None]:
    """Builds the campaign from the parsed YAML of a file in `folder`; returns None if there is any problem."""
    if not isinstance(data, dict):
        yield Problem((), "a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)")
        return None
    draft, wrong = collect(_read_draft(data, assignments, folder))
    yield from wrong
    if draft is None:
        return None
    header, base, checker, file = draft
    _, wrong_configs = collect(check_configs(checker, file, inherited=not wrong))
    if header and header.early_stop and base:
        wrong_configs += collect(check_early_stop(header.early_stop, file.phases, base=base, hold=header.hold))[1]
    if header:
        wrong_configs += collect(check_equal_time(header.resources, file.phases, hold=header.hold))[1]
    yield from wrong_configs
    claims = (yield from read_claims(data["claims"], folder)) if "claims" in data else {}
    if wrong or wrong_configs or header is None or base is None:
        return None
    inherited = {path: winner for path, (winner, _) in file.winners.items()}
    phases = shift_inherited_seeds(in_dependency_order(file.phases), inherited)
    yield from check_metric(header.metric.name, phases, base)
    yield from check_claims(claims, phases, base)
    return Campaign(
        name=data["campaign"],
        base=base,
        phases=phases,
        claims=tuple(claims.values()),
        inherited=inherited,
        text="",
        assignments=(),
        **dict(header),
    )


def _read_draft(data: Mapping[str, Any], assignments: Sequence[str], folder: Path) -> Reading[Draft]:
    for key in data:
        if key not in top_keys():
            yield Problem((key,), _unknown_key(key))
    if "campaign" not in data:
        yield Problem((), "`campaign:` is missing: give the campaign a name")
    elif not (yield from check_name(data["campaign"], ("campaign",), "campaign")):
        pass  # said already
    elif RESERVED_BESIDE.fullmatch(data["campaign"]):
        text = f"{data['campaign']!r} is reserved: the folder of the results uses this name itself"
        yield Problem(("campaign",), text)
    SCORES.choose((), core=False)
    evaluation = (yield from read_evaluation(data["evaluation"])) if "evaluation" in data else None
    header = yield from _read_header(data, evaluation)
    seeds = (yield from _campaign_seeds(data["seeds"])) if "seeds" in data else DEFAULT_SEEDS
    base_settings = yield from _read_base(data.get("base", {}), folder)
    resources = header.resources if header else Resources()
    checker = ConfigChecker(base_settings, (yield from _read_options(assignments)), resources)
    base = yield from checker.check()
    file = yield from read_phases(data, seeds, folder)
    yield from check_cycles(file)
    if header and header.evaluation:
        yield from check_evaluation(header, [phase.name for phase in file.phases])
    return header, base, checker, file


def _unknown_key(key: str) -> str:
    """Returns what is wrong with a top-level key; a setting of trials, such as `steps`, belongs in `base:`."""
    try:
        is_setting = key in sections(TrainConfig) or resolve(TrainConfig, key) != "seed"
    except ConfigError:
        is_setting = False
    return "a setting of trials: move it into `base:`" if is_setting else unknown_message("setting", key, top_keys())


def _campaign_seeds(data: Any) -> Reading[SeedRule]:
    """Reads the seeds of all phases that have none of their own; only a phase can have `fresh N`."""
    return (yield from (read_seed_rule if isinstance(data, dict) else read_seeds)(data, ("seeds",)))


def _read_header(data: Mapping[str, Any], evaluation: Evaluation | None) -> Reading[Header | None]:
    values: dict[str, Any] = {}
    for key in (key for key in Header.model_fields if key in data and key != "evaluation"):
        if key not in HEADER_SECTIONS or data[key] == {}:
            values[key] = data[key]
            continue
        found, wrong = named_settings(HEADER_SECTIONS[key], data[key], (key,))
        if key == "metric" and isinstance(data[key], str):
            wrong = [Problem((key,), f"must be a mapping of settings, such as {{name: {data[key]}}}")]
        yield from wrong
        values |= {f"{key}.{name}": value for name, (value, _) in found.items()}
    name = str(values.get("metric.name", ""))
    if "metric.goal" not in values and (goal := metric_goal(name)):
        values["metric.goal"] = goal
    elif "metric.goal" not in values and name in SCORES:
        yield Problem(
            ("metric", "name"), f"lm-eval does not say which {name} is better: add `goal: maximize`, or minimize"
        )
    try:
        return build(Header, values).model_copy(update={"evaluation": evaluation})
    except ConfigError as error:
        yield from error.problems
        return None


def _read_base(data: Any, folder: Path) -> Reading[LocatedSettings]:
    if isinstance(data, dict):
        for key in (misplaced := [key for key in data if key in top_keys()]):
            yield Problem(("base", key), f"`{key}:` is a top-level key of the campaign file: move it out of `base:`")
        data = {key: value for key, value in data.items() if key not in misplaced}
    given, wrong = named_settings(TrainConfig, data, ("base",), folder=folder)
    yield from wrong
    if "seed" in given:
        _, at = given.pop("seed")
        yield Problem(at, "the seed is not set in `base:`: write `seeds: [1, 2, 3]` at the top level of the file")
    return given


def _read_options(assignments: Sequence[str]) -> Reading[LocatedSettings]:
    """The settings given by `--set`, each with the argument it came from; later ones override earlier ones."""
    given: dict[str, tuple[Any, Location]] = {}
    for text in assignments:
        shown = f"{text.partition('=')[0]}=..." if is_secret_name(text.partition("=")[0]) else text
        at = (f"{OPTION} {shown}",)
        try:
            name, value = parse_assignment(text)
        except ConfigError as error:
            yield Problem(at, str(error).removeprefix(f"{OPTION} {printable(text)}: ").removeprefix(f"{OPTION}:"))
            continue
        top = name.partition(".")[0]
        if top in top_keys() and top != "base":
            advice = f"{OPTION} only changes settings under `base:`"
            yield Problem(at, f"`{top}:` is a top-level key of the campaign file; {advice}")
            continue
        found, wrong = named_settings(TrainConfig, {name: value})
        given |= {setting: (value, at) for setting, (value, _) in found.items()}
        yield from (Problem(at, problem.message) for problem in wrong)
    if "seed" in given:
        _, at = given.pop("seed")
        yield Problem(at, f"{OPTION} cannot change seeds: write `seeds: [1, 2, 3]` at the top level of the file")
    return given
