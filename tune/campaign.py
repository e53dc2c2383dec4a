"""Reads a campaign file and checks all of it: every mistake is answered with file, line, column and advice.

One way: YAML nodes, then types (tune/spec/schema.py), the arms of each phase (tune/spec/phase_reader.py), complete
configs (tune/spec/validation.py), problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, Problem, build, printable, settings, unknown_message
from ngpt.config.overrides import named_settings
from ngpt.config.secrets import is_secret_name, refuse_secrets
from ngpt.config.yaml_reader import parse_assignment, read_yaml
from ngpt.training.config import TrainConfig
from tune.claims.possible_arms import check_claims
from tune.claims.reader import read_claims
from tune.spec.inheritance import check_circles, check_configs, order_by_need
from tune.spec.phase_reader import PhasesInFile, read_phases
from tune.spec.problems import OPTION, Reading, collect, describe
from tune.spec.schema import KINDS, Campaign, EarlyStop, Header
from tune.spec.validation import ConfigChecker, check_early_stop
from tune.spec.values import LocatedSettings, check_name, read_seeds

TOP_KEYS = ("campaign", *Header.model_fields, "seeds", "base", "phases", *KINDS, "claims")
SEEDS = (1, 2, 3)  # of a campaign that gives none


@dataclass(frozen=True)
class _Draft:
    """A campaign file as types, before its configs are checked; None is a part with problems."""

    header: Header | None
    base: TrainConfig | None
    checker: ConfigChecker
    file: PhasesInFile


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
    campaign, problems = collect(_read(document.data, assignments, path.parent))
    if problems or campaign is None:
        raise ConfigError(describe(problems, document))
    return replace(campaign, text=text, assignments=tuple(assignments))


def _read(data: Any, assignments: Sequence[str], folder: Path) -> Reading[Campaign | None]:
    """The campaign in the plain data of a file in `folder`; None if anything is wrong with it."""
    if not isinstance(data, dict):
        yield Problem((), "a campaign is a mapping with at least `campaign:` and `phases:` (or `vary:`)")
        return None
    draft, wrong = collect(_read_draft(data, assignments, folder))
    yield from wrong
    if draft is None:
        return None
    _, wrong_configs = collect(_check_draft(draft, inherited=not wrong))
    yield from wrong_configs
    claims = (yield from read_claims(data["claims"], folder)) if "claims" in data else {}
    if wrong or wrong_configs or draft.header is None or draft.base is None:
        return None
    phases = order_by_need([entry.phase for entry in draft.file.phases])
    yield from check_claims(claims, phases, draft.base)
    return Campaign(
        name=data["campaign"],
        base=draft.base,
        phases=phases,
        claims=tuple(claims.values()),
        inherited={path: winner for path, (winner, _) in draft.file.winners.items()},
        text="",
        assignments=(),
        **{name: getattr(draft.header, name) for name in Header.model_fields},
    )


def _read_draft(data: Mapping[str, Any], assignments: Sequence[str], folder: Path) -> Reading[_Draft]:
    """The header, the base and the phases."""
    for key in data:
        if key not in TOP_KEYS:
            yield Problem((key,), unknown_message("setting", key, TOP_KEYS))
    if "campaign" not in data:
        yield Problem((), "`campaign:` is missing: give the campaign a name")
    else:
        yield from check_name(data["campaign"], ("campaign",), "campaign")
    header = yield from _read_header(data)
    seeds = (yield from read_seeds(data["seeds"], ("seeds",))) if "seeds" in data else SEEDS
    given = yield from _read_base(data.get("base", {}), folder)
    checker = ConfigChecker(given, (yield from _read_options(assignments)))
    base = yield from checker.check_base()
    file = yield from read_phases(data, seeds, folder)
    yield from check_circles(file)
    return _Draft(header, base, checker, file)


def _check_draft(draft: _Draft, *, inherited: bool) -> Reading[None]:
    """Checks what the phases train; without `inherited`, not what they may start from."""
    yield from check_configs(draft.checker, draft.file, inherited=inherited)
    if draft.header and draft.header.early_stop and draft.base:
        phases = [entry.phase for entry in draft.file.phases]
        yield from check_early_stop(draft.header.early_stop, phases, base=draft.base, hold=draft.header.hold)


def _read_header(data: Mapping[str, Any]) -> Reading[Header | None]:
    """The settings of the campaign itself: what it measures, how it judges, what it may use."""
    values: dict[str, Any] = {}
    known = (*settings(Header), *(f"early_stop.{name}" for name in settings(EarlyStop)))
    for key in Header.model_fields:
        names = [name.partition(".")[2] for name in known if name.startswith(f"{key}.")]
        if key in data and not names:
            values[key] = data[key]
        elif key in data and not isinstance(data[key], dict):
            yield Problem((key,), f"must be a mapping of settings, got {data[key]!r}")
        elif key in data:
            values |= {} if data[key] else {key: {}}
            for name, value in data[key].items():
                if name in names:
                    values[f"{key}.{name}"] = value
                else:
                    yield Problem((key, name), unknown_message("setting", name, names))
    try:
        return build(Header, values)
    except ConfigError as error:
        yield from error.problems
        return None


def _read_base(data: Any, folder: Path) -> Reading[LocatedSettings]:
    """The settings in `base:`."""
    if isinstance(data, dict):
        for key in (misplaced := [key for key in data if key in TOP_KEYS]):
            yield Problem(("base", key), f"`{key}:` belongs to the top of the file, not into `base:`")
        data = {key: value for key, value in data.items() if key not in misplaced}
    given, wrong = named_settings(TrainConfig, data, ("base",), folder=folder)
    yield from wrong
    if "seed" in given:
        _, at = given.pop("seed")
        yield Problem(at, "seeds belong to the campaign: write `seeds: [1, 2, 3]` at the top")
    return given


def _read_options(assignments: Sequence[str]) -> Reading[LocatedSettings]:
    """The settings of `--set`, each located at its own text; a later one beats an earlier one."""
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
        if top in TOP_KEYS and top != "base":
            yield Problem(at, f"`{top}:` belongs to the campaign file, at its top; {OPTION} changes the base")
            continue
        found, wrong = named_settings(TrainConfig, {name: value})
        given |= {setting: (value, at) for setting, (value, _) in found.items()}
        yield from (Problem(at, problem.message) for problem in wrong)
    if "seed" in given:
        _, at = given.pop("seed")
        yield Problem(at, "seeds belong to the campaign file: write `seeds: [1, 2, 3]` at its top")
    return given
