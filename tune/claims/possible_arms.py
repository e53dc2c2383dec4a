"""Checks before training that each claim selects arms that may exist.

Which settings a phase inherits is known only during the run, so an arm may have any value that an earlier phase offers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ngpt.config.base import Location, Problem, flatten, unknown_message
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.analysis.importance import is_number
from tune.claims.selectors import NAME_KEYS, Selector, describe, same
from tune.spec.metrics import MISSING_WITH
from tune.spec.reading import Reading, collect, distinct, short
from tune.spec.schema import Claim, Phase
from tune.spec.sweeps import BASELINE

DERIVED = ("steps", "model.vocab_size")  # not checked here: the planner may change them per trial
MAX_LISTED = 8  # values in a message

Inherited = Mapping[str, Sequence[Any]] | None  # possible values by setting; None: unknown before the run


@dataclass(frozen=True)
class PossibleArm:
    """What the file determines about an arm; an empty name represents all arms that are created during the run."""

    phase: str
    name: str
    base: Mapping[str, Any]  # the settings of the campaign's base
    fixed: Mapping[str, Any]  # set by the phase or the arm
    inherited: Inherited

    def values(self, setting: str) -> Sequence[Any] | None:
        """The possible values of a setting in this arm; None if it may have any value."""
        if setting in self.fixed:
            return [self.fixed[setting]]
        return None if self.inherited is None else [self.base[setting], *self.inherited.get(setting, ())]

    def may_match(self, selector: Selector) -> bool:
        """Whether the selector may select this arm once all its settings are known."""
        if self.phase != selector.get("phase", self.phase) or self.name not in ("", selector.get("arm", self.name)):
            return False
        wanted = {name: value for name, value in selector.items() if name not in (*NAME_KEYS, *DERIVED)}
        possible = {name: self.values(name) for name in wanted}
        return all(
            values is None or any(same(wanted[name], value) for value in values) for name, values in possible.items()
        )


def missing_metric(metric: str, arms: Sequence[PossibleArm]) -> str | None:
    """Why none of the arms can have a metric; None if one may have it."""
    if metric not in MISSING_WITH:
        return None
    setting, value = MISSING_WITH[metric]
    if any(values is None or any(other != value for other in values) for values in (a.values(setting) for a in arms)):
        return None
    return f"no arm can have {metric}, because {short(setting)} is {fmt.value(value)} in all of them"


def check_metric(metric: str, phases: Sequence[Phase], base: TrainConfig) -> Reading[None]:
    """Checks that an arm may have the metric by which the campaign compares arms."""
    if reason := missing_metric(metric, possible_arms(phases, flatten(base)) if metric in MISSING_WITH else []):
        yield Problem(("metric", "name"), reason)


def check_claims(claims: Mapping[int, Claim], phases: Sequence[Phase], base: TrainConfig) -> Reading[None]:
    """Checks that both sides of each claim may exist in one phase, and that its `setting` varies there."""
    arms = possible_arms(phases, flatten(base)) if claims else []
    names = [phase.name for phase in phases]
    for i, claim in claims.items():
        at = ("claims", i)
        if claim.phase not in (None, *names):
            yield Problem((*at, "phase"), unknown_message("phase", claim.phase, names))
            continue
        candidates = [arm for arm in arms if claim.phase in (None, arm.phase)]
        if reason := missing_metric(claim.metric or "", candidates):
            yield Problem((*at, "metric"), reason)
            continue
        sides, wrong = collect(_check_sides(claim, at, candidates, names))
        yield from wrong
        if wrong or sides is None:
            continue
        if len(sides) > 1 and not set.intersection(*sides.values()):
            places = " and ".join(f"{side} in {fmt.listing(sorted(found))}" for side, found in sides.items())
            yield Problem(at, f"no phase has {'both' if len(sides) == 2 else 'all'} sides: {places}")
        elif claim.setting and not _varies(claim.setting, candidates):
            yield Problem((*at, "setting"), f"no phase has two or more numeric values of {short(claim.setting)}")


def _check_sides(
    claim: Claim, at: Location, arms: Sequence[PossibleArm], names: Sequence[str]
) -> Reading[dict[str, set[str]]]:
    """Checks the sides of a claim; returns for each the phases that may have arms it selects."""
    phases: dict[str, set[str]] = {}
    parts = {f"parts[{i}]": (("parts", i), part) for i, part in enumerate(claim.parts or ())}
    sides = {"left": (("left",), claim.left), "right": (("right",), claim.right)} | parts
    for side, (key, selector) in sides.items():
        if selector is None:
            continue
        phases[side] = {arm.phase for arm in arms if arm.may_match(selector)}
        phase = selector.get("phase", claim.phase)
        if phase not in (None, *names):
            yield Problem((*at, *key, "phase"), unknown_message("phase", phase, names))
        elif claim.phase not in (None, phase):
            yield Problem((*at, *key, "phase"), f"the claim is about phase {claim.phase}")
        elif not phases[side]:
            yield Problem((*at, *key), _explain_no_match(selector, phase, arms))
    return phases


def possible_arms(phases: Sequence[Phase], base: Mapping[str, Any]) -> list[PossibleArm]:
    """The arms that the phases may have; each phase must come after those it depends on."""
    arms: list[PossibleArm] = []
    winners: dict[str, Inherited] = {}  # the settings that others may inherit from each phase
    for phase in phases:
        own: list[PossibleArm] = []
        for arm in (BASELINE, *phase.arms):
            inherited = _union([winners.get(name) for name in (phase.inherit, arm.inherit) if name])
            own.append(PossibleArm(phase.name, arm.name, base, {**phase.pinned, **arm.overrides}, inherited))
        if not phase.arms:  # created during the run, by a search or by combining
            own.append(PossibleArm(phase.name, "", base, phase.pinned, None))
        offered = [{name: [value] for name, value in arm.overrides.items()} for arm in phase.arms]
        winners[phase.name] = _union([*(arm.inherited for arm in own), *offered])
        arms += own
    return arms


def _union(parts: Sequence[Inherited]) -> Inherited:
    """The possible values of each setting in any part; None if a part is unknown."""
    known = [part for part in parts if part is not None]
    names = dict.fromkeys(name for part in known for name in part)
    values = {name: distinct(value for part in known for value in part.get(name, ())) for name in names}
    return values if len(known) == len(parts) else None


def _varies(setting: str, arms: Iterable[PossibleArm]) -> bool:
    """Whether the setting may have two or more numeric values in some phase."""
    by_phase: dict[str, set[float]] = {}
    for arm in arms:
        values = arm.values(setting)
        if values is None:
            return True
        by_phase.setdefault(arm.phase, set()).update(filter(is_number, values))
    return any(len(values) > 1 for values in by_phase.values())


def _explain_no_match(selector: Selector, phase: str | None, arms: Sequence[PossibleArm]) -> str:
    """Why no arm of `phase`, or of any phase, can match a selector."""
    arms = [arm for arm in arms if phase in (None, arm.phase)]
    place = f"of phase {phase}" if phase else "of any phase"
    names = list(dict.fromkeys(arm.name for arm in arms if arm.name))
    if selector.get("arm", BASELINE.name) not in names:
        return unknown_message(f"arm {place}", selector["arm"], names)
    wanted = {name: value for name, value in selector.items() if name not in NAME_KEYS}
    facts = []
    for name, value in wanted.items():
        if not any(arm.may_match({name: value}) for arm in arms):
            facts.append(f"{short(name)} takes {_listed(v for arm in arms for v in arm.values(name) or ())}")
    together = f"; {'; '.join(facts)}" if facts else " all together" if len(selector) > 1 else ""
    return f"no arm {place} has {describe(wanted)}{together}"


def _listed(values: Iterable[Any]) -> str:
    """The distinct values as text: sorted numbers first, then the rest, at most MAX_LISTED of them."""
    shown = sorted(distinct(values), key=lambda value: (not is_number(value), value if is_number(value) else 0))
    more = f" and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else ""
    return ", ".join(map(fmt.value, shown[:MAX_LISTED])) + more
