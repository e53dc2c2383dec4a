"""The claims of a campaign file: each mistake is found before anything is trained, also an arm that is nowhere.

claims:
  - {id: alpha-028, source: "002", says: "alpha 0.28 beats 0.05", relation: less, left: {alpha: 0.28}, right: ...}
  - {id: epoch, says: "18B tokens in 20 minutes", relation: arithmetic, expression: "110e3 * 20 * 60", value: 18e9, ...}
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, Location, flatten, resolve, unknown
from ngpt.config.overrides import named_settings
from ngpt.config.yaml_reader import read_yaml
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.claims.arithmetic import evaluate
from tune.claims.relations import DIRECTIONS, METRIC_GOALS, RELATIONS
from tune.claims.selectors import PLACES, describe, is_number, same, short
from tune.spec.phase_reader import check_name
from tune.spec.schema import Claim, Phase
from tune.spec.sweeps import BASELINE
from tune.spec.validation import Problems, TooManyProblems, with_absolute_paths

COMMON = ("id", "relation", "source", "says")
ABOUT_TRIALS = ("metric", "phase")
DERIVED = ("steps", "model.vocab_size")  # settings that a plan may change, so that only a trial knows them
MOST_VALUES = 8  # that a message lists


def load_claims(path: Path) -> tuple[Claim, ...]:
    """The claims of a file that has `claims:`, for a campaign that ran without them; other keys are not looked at.

    Raises:
        ConfigError: what is wrong with them, one line each; an arm that is nowhere is not: it leaves `no data`.
    """
    document, problems = read_yaml(path), Problems()
    data = document.data if isinstance(document.data, dict) else {}
    try:
        claims = read_claims(problems, data.get("claims"), path.parent)
    except TooManyProblems:
        claims = {}
    if problems.all:
        raise ConfigError(problems.in_file_order(document))
    return tuple(claims.values())


def read_claims(problems: Problems, data: Any, folder: Path) -> dict[int, Claim]:
    """The claims as they are written, by their place in the list, without those that have problems."""
    if not isinstance(data, list):
        problems.add(("claims",), f"expected a list of claims, got {data!r}")
        return {}
    claims: dict[int, Claim] = {}
    seen: set[Any] = set()
    for i, raw in enumerate(data):
        before = len(problems.all)
        values = _read(problems, raw, ("claims", i), folder)
        if len(problems.all) == before and values["id"] in seen:
            problems.add(("claims", i, "id"), f"two claims have the id {values['id']!r}")
        if len(problems.all) == before:
            seen.add(values["id"])
            claims[i] = Claim(**values)
    return claims


def _read(problems: Problems, raw: Any, at: Location, folder: Path) -> dict[str, Any]:
    """The fields of one claim, by name."""
    if not isinstance(raw, dict):
        problems.add(at, f"a claim is a mapping with `id:` and `relation:`, got {raw!r}")
        return {}
    if "id" not in raw:
        problems.add(at, "`id:` is missing: give the claim a name")
    else:
        check_name(problems, raw["id"], (*at, "id"), "claim")
    if "relation" not in raw:
        problems.add(at, f"`relation:` is missing: choose one of {', '.join(RELATIONS)}")
        return {}
    name = raw["relation"]
    if not isinstance(name, str) or name not in RELATIONS:
        problems.add((*at, "relation"), unknown("relation", name, RELATIONS))
        return {}
    relation = RELATIONS[name]
    allowed = (*COMMON, *relation.needs, *relation.allows, *(ABOUT_TRIALS if relation.trains else ()))
    for key in raw:
        if key in FIELDS and key not in allowed:
            problems.add((*at, key), f"`{key}:` means nothing to a claim of the relation `{name}`")
        elif key not in allowed:
            problems.add((*at, key), unknown("setting", key, allowed))
    for key in relation.needs:
        if key not in raw:
            problems.add(
                at, f"`{key}:` is missing: a claim of the relation `{name}` needs {fmt.listing(relation.needs)}"
            )
    values = {key: raw[key] for key in ("id", "relation") if key in raw}
    for key in (key for key in raw if key in allowed and key not in values):
        try:
            selects = key in SELECTORS
            values[key] = _selector(problems, raw[key], (*at, key), folder) if selects else READERS[key](raw[key])
        except ConfigError as error:
            problems.add((*at, key), str(error))
    if values.get("left") and same(values["left"], values.get("right")):
        problems.add((*at, "right"), "left and right are the same")
    return values


def _selector(problems: Problems, raw: Any, at: Location, folder: Path) -> dict[str, Any]:
    """Settings by full name, and the names of an arm and a phase."""
    if not isinstance(raw, dict) or not raw:
        problems.add(at, f"expected the settings of an arm, such as {{alpha: 0.28}}, or {{arm: NAME}}, got {raw!r}")
        return {}
    names = {key: value for key, value in raw.items() if key in PLACES}
    for key, value in names.items():
        if not isinstance(value, str):
            problems.add((*at, key), f"expected the name of {'an arm' if key == 'arm' else 'a phase'}, got {value!r}")
    rest = {key: value for key, value in raw.items() if key not in PLACES}
    found, wrong = named_settings(TrainConfig, rest, at, folder=folder)
    for problem in wrong:
        problems.add(*problem)
    if "seed" in found:
        problems.add(found["seed"][1], "a claim is about all seeds of its arms")
    return names | with_absolute_paths({name: value for name, (value, _) in found.items()})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f'expected text, got {value!r}; write "{value}" in quotes')
    return value


def _metric(value: Any) -> str:
    if not isinstance(value, str) or value not in METRIC_GOALS:
        raise ConfigError(unknown("metric", value, METRIC_GOALS))
    return value


def _direction(value: Any) -> str:
    if not isinstance(value, str) or value not in DIRECTIONS:
        raise ConfigError(unknown("direction", value, DIRECTIONS))
    return value


def _setting(value: Any) -> str:
    return resolve(TrainConfig, _text(value))


def _tolerance(value: Any) -> float:
    number = evaluate(value)
    if number < 0:
        raise ConfigError(f"a tolerance is 0 or more, got {value!r}")
    return number


def _expression(value: Any) -> str:
    evaluate(value)
    return str(value)


READERS = {
    "source": _text,
    "says": _text,
    "phase": _text,
    "metric": _metric,
    "setting": _setting,
    "direction": _direction,
    "value": evaluate,
    "tolerance": _tolerance,
    "expression": _expression,
}
SELECTORS = ("left", "right")
FIELDS = ("id", "relation", *READERS, *SELECTORS)


# ---- what a campaign can say of them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Possible:
    """An arm as far as the file tells: what it has for sure, and what else winners before it may hand on."""

    phase: str
    name: str
    fixed: Mapping[str, Any]
    handed: Mapping[str, Sequence[Any]] | None  # None: nobody knows, as for what another campaign has found

    def values(self, setting: str, base: Mapping[str, Any]) -> Sequence[Any]:
        """What the setting may be in this arm, as far as the file tells."""
        return (
            [self.fixed[setting]] if setting in self.fixed else [base[setting], *(self.handed or {}).get(setting, ())]
        )

    def may_be(self, selector: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
        """Whether the arm can come out as one that `selector` means."""
        if self.phase != selector.get("phase", self.phase) or (
            self.name and self.name != selector.get("arm", self.name)
        ):
            return False
        for name, value in ((name, value) for name, value in selector.items() if name not in PLACES):
            open_ = name in DERIVED or (self.handed is None and name not in self.fixed)
            if not open_ and not any(same(value, possible) for possible in self.values(name, base)):
                return False
        return True


def check_claims(problems: Problems, claims: Mapping[int, Claim], phases: Sequence[Phase], base: TrainConfig) -> None:
    """Files a problem for each claim about arms that no phase will have, or that no phase has together."""
    if not claims:
        return
    known, arms = flatten(base), possible_arms(phases)
    names = [phase.name for phase in phases]
    for i, claim in claims.items():
        at, before = ("claims", i), len(problems.all)
        if claim.phase is not None and claim.phase not in names:
            problems.add((*at, "phase"), unknown("phase", claim.phase, names))
            continue
        here = [arm for arm in arms if claim.phase in (None, arm.phase)]
        found: dict[str, set[str]] = {}
        for side in (side for side in SELECTORS if getattr(claim, side) is not None):
            selector = getattr(claim, side)
            found[side] = {arm.phase for arm in here if arm.may_be(selector, known)}
            phase = selector.get("phase", claim.phase)
            if phase is not None and phase not in names:
                problems.add((*at, side, "phase"), unknown("phase", phase, names))
            elif claim.phase not in (None, phase):
                problems.add((*at, side, "phase"), f"the claim is about phase {claim.phase}")
            elif not found[side]:
                problems.add((*at, side), _nowhere(selector, phase, here, known))
        if len(problems.all) == before and len(found) == 2 and not found["left"] & found["right"]:
            places = " and ".join(f"{side} in {fmt.listing(sorted(phases))}" for side, phases in found.items())
            problems.add(at, f"no phase has both sides: {places}")
        if claim.setting and len(problems.all) == before and not _varies(claim.setting, here, known):
            problems.add((*at, "setting"), f"no phase varies {short(claim.setting)} over two numbers or more")


def possible_arms(phases: Sequence[Phase]) -> list[Possible]:
    """Every arm of phases that are in order of need; one without a name stands for arms that only a run will know."""
    arms: list[Possible] = []
    winners: dict[str, Mapping[str, Sequence[Any]] | None] = {}  # what each phase may hand on
    for phase in phases:
        own: list[Possible] = []
        for arm in (BASELINE, *phase.arms):
            sources = [name for name in (phase.inherit, arm.inherit) if name]
            handed = _joined([winners.get(name) for name in sources])
            own.append(Possible(phase.name, arm.name, {**phase.pinned, **arm.overrides}, handed))
        if not phase.arms:  # found by a search, or combined from winners
            own.append(Possible(phase.name, "", dict(phase.pinned), None))
        kept = [
            {name: [value] for name, value in arm.fixed.items() if name not in phase.pinned or name in given.overrides}
            for arm, given in zip(own, (BASELINE, *phase.arms), strict=False)
        ]
        winners[phase.name] = _joined([*(arm.handed for arm in own), *kept])
        arms += own
    return arms


def _joined(parts: Sequence[Mapping[str, Sequence[Any]] | None]) -> Mapping[str, Sequence[Any]] | None:
    """All values of each setting; None if any part is not known."""
    values: dict[str, list[Any]] = {}
    for part in parts:
        if part is None:
            return None
        for name, more in part.items():
            seen = values.setdefault(name, [])
            seen += [value for value in more if not any(same(value, other) for other in seen)]
    return values


def _varies(setting: str, arms: Iterable[Possible], base: Mapping[str, Any]) -> bool:
    """Whether some phase may have the setting at two numbers."""
    by_phase: dict[str, set[float]] = {}
    for arm in arms:
        if arm.handed is None and setting not in arm.fixed:
            return True
        by_phase.setdefault(arm.phase, set()).update(filter(is_number, arm.values(setting, base)))
    return any(len(values) > 1 for values in by_phase.values())


def _nowhere(selector: Mapping[str, Any], phase: str | None, arms: Sequence[Possible], base: Mapping[str, Any]) -> str:
    """What to say of a selector that no arm of `phase`, or of any phase, can match."""
    arms = [arm for arm in arms if phase in (None, arm.phase)]
    place = f"of phase {phase}" if phase else "of any phase"
    names = list(dict.fromkeys(arm.name for arm in arms if arm.name))
    if selector.get("arm", BASELINE.name) not in names:
        return unknown(f"arm {place}", selector["arm"], names)
    wanted = {name: value for name, value in selector.items() if name not in PLACES}
    facts = []
    for name in wanted:
        if not any(arm.may_be({name: wanted[name]}, base) for arm in arms):
            facts.append(f"{short(name)} takes {_listed(value for arm in arms for value in arm.values(name, base))}")
    together = f"; {'; '.join(facts)}" if facts else " all together" if len(selector) > 1 else ""
    return f"no arm {place} has {describe(wanted)}{together}"


def _listed(values: Iterable[Any]) -> str:
    """Each value once, numbers by size, as the file writes them."""
    distinct: list[Any] = []
    for value in values:
        distinct += [] if any(same(value, other) for other in distinct) else [value]
    distinct.sort(key=lambda value: (not is_number(value), value if is_number(value) else 0))
    shown = ", ".join(map(fmt.value, distinct[:MOST_VALUES]))
    return shown + (f" and {len(distinct) - MOST_VALUES} more" if len(distinct) > MOST_VALUES else "")
