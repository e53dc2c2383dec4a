"""What each phase handed on to later ones, as facts and as boxes and arrows for an inline SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune import format as fmt
from tune.storage.summaries import PhaseSummary

# Sizes in SVG units, about a pixel each; the picture is as wide as a phone.
BOX_WIDTH, BOX_HEIGHT, LANE, GAP, LINE = 350, 46, 12, 22, 16
MOST_CHARS = 46  # of one line of text in a box, whatever font the system has


@dataclass(frozen=True)
class Handover:
    """What the winner of `source` gave to `target`: to all of its arms, or to its one arm `arm`."""

    source: str
    target: str
    settings: Mapping[str, Any]
    arm: str | None = None

    def text(self) -> str:
        """For people: `alpha: alpha=0.2`, or `projection to arm winner: ...`."""
        who = fmt.plain(self.source) + (f" to arm {fmt.plain(self.arm)}" if self.arm else "")
        return f"{who}: {self._short()}"

    def label(self, *, near: bool) -> str:
        """The label beside its arrow; the source needs no name if it is `near`, the box above."""
        return self._short() if near else f"from {fmt.plain(self.source)}: {self._short()}"

    def _short(self) -> str:
        short = {name.rpartition(".")[2]: value for name, value in self.settings.items()}
        return fmt.settings(short, "the base as it is")


def handovers(phases: Sequence[PhaseSummary]) -> list[Handover]:
    """Lists what was handed on, in the order of the phases; a source may be a phase of another campaign.

    An arm of a list of runs, or one that combines phases, inherits from the winners whose settings it contains.
    """
    found: list[Handover] = []
    for i, phase in enumerate(phases):
        base = phase.base
        if phase.inherit is not None:
            known = next((_winner_settings(p) for p in phases[:i] if p.phase == phase.inherit), base)
            given = {name: value for name, value in known.items() if name in base and base[name] == value}
            found.append(Handover(phase.inherit, phase.phase, given))
        if phase.swept:
            continue
        for arm in phase.arms:
            if arm.overrides and arm.arm != phase.baseline:
                sources = {edge.source for edge in found if edge.target == phase.phase}
                for giver in _givers({**base, **arm.overrides}, phases[:i]):
                    if giver.phase not in sources:  # one arrow between two phases is enough
                        found.append(Handover(giver.phase, phase.phase, _winner_settings(giver), arm.arm))
    return found


def _givers(own: Mapping[str, Any], before: Sequence[PhaseSummary]) -> list[PhaseSummary]:
    """The phases whose winning settings are all in `own`, without those that a later one of them includes."""
    found: list[PhaseSummary] = []
    covered: dict[str, Any] = {}
    for phase in reversed(before):
        settings = _winner_settings(phase)
        won = phase.winner not in (None, phase.baseline)
        if won and {**own, **settings} == dict(own) and {**covered, **settings} != covered:
            found.insert(0, phase)
            covered |= settings
    return found


def _winner_settings(phase: PhaseSummary) -> dict[str, Any]:
    winner = phase.winning_arm
    return {**phase.base, **(winner.overrides if winner else {})}


def inheritance_graph(phases: Sequence[PhaseSummary]) -> dict[str, Any] | None:
    """Lays out boxes, arrows and labels, with the phases from top to bottom; None if nothing is handed on."""
    given = handovers(phases)
    if not given:
        return None
    names = [phase.phase for phase in phases]
    far = [edge for edge in given if edge.source in names and names.index(edge.target) - names.index(edge.source) > 1]
    left, y = LANE * len(far) + 6, 2.0
    boxes, labels, arrows = [], [], []
    for i, phase in enumerate(phases):
        incoming = [edge for edge in given if edge.target == names[i]]
        top = y
        y += (GAP + LINE * len(incoming)) if i or incoming else 0
        near = any(edge.source not in names or edge.source == names[i - 1] for edge in incoming)
        if near:
            arrows.append(f"M {left + 14} {top} V {y - 2}")
        for n, edge in enumerate(incoming):
            text = edge.label(near=bool(i) and edge.source == names[i - 1])
            labels.append({"x": left + 26, "y": top + GAP / 2 + LINE * (n + 0.75), "text": _cut(text)})
        for edge in incoming:
            if edge in far:
                lane = left - LANE * (far.index(edge) + 1)
                start = boxes[names.index(edge.source)]["y"] + BOX_HEIGHT / 2
                arrows.append(f"M {left} {start} H {lane} V {y + BOX_HEIGHT / 2} H {left - 2}")
        boxes.append({"x": left, "y": y, "name": _cut(names[i]), "result": _result(phase), "href": f"#phase-{i + 1}"})
        y += BOX_HEIGHT
    size = {"width": left + BOX_WIDTH + 4, "height": y + 4, "box_width": BOX_WIDTH, "box_height": BOX_HEIGHT}
    return size | {"boxes": boxes, "labels": labels, "arrows": arrows}


def _result(phase: PhaseSummary) -> str:
    """The result of a phase: `alpha=0.2 is better, -0.0525`."""
    winner = phase.winning_arm
    if winner is None:
        return "no winner yet"
    if winner.arm == phase.baseline:
        return "keeps its baseline"
    rest = " is better" + (f", {fmt.signed(winner.delta.mean)}" if winner.delta else "")
    return _cut(winner.arm, MOST_CHARS - len(rest)) + rest


def _cut(text: str, width: int = MOST_CHARS) -> str:
    return fmt.shorten(fmt.plain(text), width)
