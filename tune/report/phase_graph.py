"""Who inherits from whom: what each phase handed on, as facts and as boxes and arrows for an inline SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune import format as fmt

# Sizes in SVG units, about a pixel each; the picture is as wide as a phone.
BOX_WIDTH, BOX_HEIGHT, LANE, GAP, LINE = 350, 46, 12, 22, 16
MOST_CHARS = 46  # of one line of text in it, in any of the fonts that a system may have


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
        """Beside its arrow, which shows where it comes from when that is `near`: the box above."""
        return self._short() if near else f"from {fmt.plain(self.source)}: {self._short()}"

    def _short(self) -> str:
        short = {name.rpartition(".")[2]: value for name, value in self.settings.items()}
        return fmt.settings(short, "the base as it is")


def handovers(phases: Sequence[Mapping[str, Any]]) -> list[Handover]:
    """Everything that was handed on, in the order of the phases; a source may be a phase of another campaign.

    That an arm of a list of runs, or one that combines phases, started from winners is seen in its settings.
    """
    found: list[Handover] = []
    for i, phase in enumerate(phases):
        base = phase.get("base") or {}
        source = phase.get("inherit")
        if source is not None:
            known = next((_winner_settings(p) for p in phases[:i] if p.get("phase") == source), None)
            given = base if known is None else {k: v for k, v in known.items() if k in base and base[k] == v}
            found.append(Handover(source, phase.get("phase") or "", given))
        if phase.get("swept"):
            continue
        for arm in phase.get("arms") or []:
            if arm.get("overrides") and arm["arm"] != phase.get("baseline"):
                own = {**base, **arm["overrides"]}
                known = {edge.source for edge in found if edge.target == phase.get("phase")}
                for giver in _givers(own, phases[:i]):
                    if giver["phase"] not in known:  # one arrow between two phases says it
                        settings = _winner_settings(giver)
                        found.append(Handover(giver["phase"], phase.get("phase") or "", settings, arm["arm"]))
    return found


def _givers(own: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The phases whose winners' settings are among `own`, but for those that a later one of them contains."""
    found: list[Mapping[str, Any]] = []
    covered: dict[str, Any] = {}
    for phase in reversed(before):
        settings = _winner_settings(phase)
        won = phase.get("winner") not in (None, phase.get("baseline"))
        if won and {**own, **settings} == dict(own) and {**covered, **settings} != covered:
            found.insert(0, phase)
            covered |= settings
    return found


def _winner_settings(phase: Mapping[str, Any]) -> dict[str, Any]:
    winner = fmt.winning_arm(phase)
    return {**(phase.get("base") or {}), **((winner or {}).get("overrides") or {})}


def inheritance_graph(phases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Boxes, arrows and labels, phases from top to bottom; None where nothing is handed on."""
    given = handovers(phases)
    if not given:
        return None
    names = [phase.get("phase") or "" for phase in phases]
    far = [edge for edge in given if edge.source in names and names.index(edge.target) - names.index(edge.source) > 1]
    left = LANE * len(far) + 6
    boxes: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    arrows: list[str] = []
    y = 2.0
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
        boxes.append({"x": left, "y": y, "name": _cut(names[i]), "says": _says(phase), "href": f"#phase-{i + 1}"})
        y += BOX_HEIGHT
    size = {"width": left + BOX_WIDTH + 4, "height": y + 4, "box_width": BOX_WIDTH, "box_height": BOX_HEIGHT}
    return size | {"boxes": boxes, "labels": labels, "arrows": arrows}


def _says(phase: Mapping[str, Any]) -> str:
    """What came out of a phase: `alpha=0.2 is better, -0.0525`."""
    won = fmt.winning_arm(phase)
    if won is None or won["arm"] == phase.get("baseline"):
        return "keeps its baseline" if won else "no winner yet"
    delta = (won.get("delta") or {}).get("mean")
    rest = " is better" + ("" if delta is None else f", {fmt.signed(delta)}")
    return _cut(won["arm"], MOST_CHARS - len(rest)) + rest


def _cut(text: str, width: int = MOST_CHARS) -> str:
    return fmt.shorten(fmt.plain(text), width)
