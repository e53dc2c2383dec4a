"""Finds which settings each phase hands on to later phases, and lays them out as boxes and arrows for an SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune import format as fmt
from tune.storage.summaries import PhaseSummary

# Sizes in SVG units, about one pixel each; the graph fits the width of a phone.
BOX_WIDTH, BOX_HEIGHT, LANE, GAP, LINE = 350, 46, 12, 22, 16
MAX_CHARS = 46  # per line of text, so that it fits a box in any system font


@dataclass(frozen=True)
class Handover:
    """Settings that `target` inherits from the winner of `source`: in all of its arms, or only in `arm`."""

    source: str
    target: str
    settings: Mapping[str, Any]
    arm: str | None = None

    def text(self) -> str:
        """Returns the source and its settings: `alpha: alpha=0.2`, or `projection to arm winner: ...`."""
        source = fmt.plain(self.source) + (f" to arm {fmt.plain(self.arm)}" if self.arm else "")
        return f"{source}: {self._settings_text()}"

    def label(self, *, near: bool) -> str:
        """Returns the label of the arrow; it omits the source if that is the box above (`near`)."""
        return self._settings_text() if near else f"from {fmt.plain(self.source)}: {self._settings_text()}"

    def _settings_text(self) -> str:
        short = {name.rpartition(".")[2]: value for name, value in self.settings.items()}
        return fmt.settings(short, "the base as it is")


def handovers(phases: Sequence[PhaseSummary]) -> list[Handover]:
    """Lists all handovers in phase order; a source may be a phase of another campaign."""
    edges: list[Handover] = []
    known: dict[str, PhaseSummary] = {}
    for phase in phases:
        base = phase.base
        if phase.inherit is not None:
            earlier = known.get(phase.inherit)
            edges.append(Handover(phase.inherit, phase.phase, _handed_on(earlier, base) if earlier else base))
        from_phase = [phase.inherit]
        for arm in phase.arms:
            for source in arm.sources:
                if source not in from_phase:  # at most one arrow between two phases
                    earlier, settings = known.get(source), {**base, **arm.overrides}
                    handed = _handed_on(earlier, settings, arm.arm) if earlier else arm.overrides
                    edges.append(Handover(source, phase.phase, handed, arm.arm))
                    from_phase.append(source)
        known[phase.phase] = phase
    return edges


def _handed_on(source: PhaseSummary, settings: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Returns the part of `settings` that the winner of `source`, or an arm that is better there, has too.

    So does the arm called `name`: the best one of a search, which its confirmation compares again.
    """
    better = [arm.overrides for arm in source.arms if arm.verdict == "better" or arm.arm == name]
    known = [{**_winner_settings(source)}, *better]
    return {
        name: value for name, value in settings.items() if any(name in each and each[name] == value for each in known)
    }


def _winner_settings(phase: PhaseSummary) -> dict[str, Any]:
    name = phase.handed_on or phase.winner
    start = next((arm for arm in phase.arms if arm.arm == name), None)
    return {**phase.base, **(start.overrides if start else {})}


def inheritance_graph(phases: Sequence[PhaseSummary]) -> dict[str, Any] | None:
    """Lays out phases from top to bottom with arrows and labels; None if no phase inherits settings."""
    edges = handovers(phases)
    if not edges:
        return None
    names = [phase.phase for phase in phases]
    far = [edge for edge in edges if edge.source in names and names.index(edge.target) - names.index(edge.source) > 1]
    left, y = LANE * len(far) + 6, 2.0
    boxes, labels, arrows = [], [], []
    for i, phase in enumerate(phases):
        incoming = [edge for edge in edges if edge.target == names[i]]
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
    """Describes the result of a phase: `alpha=0.2 is better, -0.0525`."""
    winner = phase.winning_arm
    if winner is None:
        return "no winner yet"
    if winner.arm == phase.baseline:
        return "keeps its baseline"
    rest = " is better" + (f", {fmt.signed(winner.delta.mean)}" if winner.delta else "")
    return _cut(winner.arm, MAX_CHARS - len(rest)) + rest


def _cut(text: str, width: int = MAX_CHARS) -> str:
    return fmt.shorten(fmt.plain(text), width)
