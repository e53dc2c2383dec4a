"""Plotly figures of a sweep: loss against speed, and parallel coordinates over several settings.

Parallel coordinates are drawn as line plots, because plotly's `parcoords` needs WebGL and code generated at run time,
which the Content-Security-Policy of the page forbids.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import log, sqrt
from statistics import stdev
from typing import Any

from tune import format as fmt
from tune.analysis.importance import is_number, sweep_axes
from tune.report.figures import ABOVE, MARGIN, Figure, label, marker, verdict_slug
from tune.report.wording import VERDICTS, half_width, mean_interval
from tune.storage.summaries import ArmSummary, PhaseSummary, TrialRecord

MAX_LINES = 400  # arms in parallel coordinates, best first
MAX_BARS = 40  # with more arms, the speed plot has neither intervals nor labels
MAX_LABEL = 26  # characters of a name beside its point
MIN_SPEED_SPAN = 0.1  # smallest range of the speed axis, as a fraction of the mean speed
# Pixels on a wide screen; narrow screens show only the ranks.
PLOT_SIZE, CHAR_WIDTH = (940, 250), 7.2
SIDES = ("middle right", "middle left", "top center", "bottom center")
BESIDE_BARS = ("top right", "bottom right", "top left", "bottom left")  # sides that no error bar crosses
MAX_TICKS = 8  # values written beside one axis
WIDE_RANGE = 30  # an axis is logarithmic if its largest value is at least this many times the smallest
# Groups of arms by rank, with their colours. Fewer than `MIN_ARMS_FOR_FIFTHS` arms are split into halves.
FIFTHS = {"best fifth": "s1", "second": "s6", "third": "faint", "fourth": "s5", "last fifth": "s2"}
HALVES = {"better half": "s1", "other half": "s5"}
MIN_ARMS_FOR_FIFTHS = 10


def speed_half_widths(records: Iterable[TrialRecord], confidence: float) -> dict[str, float]:
    """Maps arms to half the interval of their mean tokens per second, by Student's t (1908) over finished trials."""
    from scipy.special import stdtrit

    speeds: dict[str, list[float]] = {}
    for record in records:
        if record.status == "finished" and is_number(speed := record.metrics.get("tokens_per_second")):
            speeds.setdefault(record.arm, []).append(speed)
    return {
        arm: stdev(sample) / sqrt(len(sample)) * float(stdtrit(len(sample) - 1, 0.5 + confidence / 2))
        for arm, sample in speeds.items()
        if len(sample) > 1
    }


def speed_figure(phase: PhaseSummary, half_widths: Mapping[str, float] | None = None) -> Figure | None:
    """Plots score against tokens per second; None if fewer than two arms have both.

    `half_widths` are those of the speeds, by arm, see `speed_half_widths`.
    """
    arms = [arm for arm in phase.arms if arm.tokens_per_second is not None and arm.score.mean is not None]
    if len(arms) < 2:
        return None
    points = [(arm.tokens_per_second or 0.0, arm.score.mean or 0.0) for arm in arms]  # neither is None
    widths = [(half_widths or {}).get(arm.arm, 0.0) for arm in arms]
    span = _speed_span([end for (x, _), w in zip(points, widths, strict=True) for end in (x - w, x + w)])
    ranks = [str(arm.rank or n) for n, arm in enumerate(arms, 1)]
    # A shortened name would lose the part that distinguishes it, so long names are replaced by the rank.
    plain = [fmt.plain(arm.arm) for arm in arms]
    names = [f"{r} {label(name)}" if len(name) <= MAX_LABEL else r for r, name in zip(ranks, plain, strict=True)]
    forms = list(zip(names, ranks, strict=True))
    sides = BESIDE_BARS if any(widths) else SIDES
    marks = label_places(points, span, forms, sides) if len(arms) <= MAX_BARS else [("", SIDES[0])] * len(arms)
    data = []
    for verdict in VERDICTS:
        indices = [i for i, arm in enumerate(arms) if arm.verdict == verdict]
        if indices:
            bars = half_widths or {} if len(phase.arms) <= MAX_BARS else None
            trace = _speed_trace(verdict, [arms[i] for i in indices], bars)
            texts = {"text": [marks[i][0] for i in indices], "textposition": [marks[i][1] for i in indices]}
            data.append(trace | texts | {"customdata": [ranks[i] if marks[i][0] else "" for i in indices]})
    layout = {
        "height": 340,
        "margin": MARGIN,
        "xaxis": {"title": {"text": "training tokens per second"}, "tickformat": "~s", "range": list(span)},
        "yaxis": {"title": {"text": label(phase.metric.name, 40)}, "automargin": True},
        "hovermode": "closest",
        "legend": ABOVE,
        "meta": {"kind": "speed"},
    }
    return {"data": data, "layout": layout}


def _speed_span(speeds: Sequence[float]) -> tuple[float, float]:
    """Returns the range of the speed axis, wide enough that timing noise does not look like a gain."""
    low, high = min(speeds), max(speeds)
    half = max((high - low) * 0.6, MIN_SPEED_SPAN / 2 * (low + high) / 2)
    return round((low + high) / 2 - half, 1), round((low + high) / 2 + half, 1)


def label_places(
    points: Sequence[tuple[float, float]],
    span: tuple[float, float],
    texts: Sequence[tuple[str, str]],
    sides: Sequence[str] = SIDES,
) -> list[tuple[str, str]]:
    """Returns text and side of the label of each point, placed without overlaps; earlier points have priority.

    `span` is the range of the x axis. `texts` holds a long and a short form of each label. If neither fits, the short
    form goes to the first of the `sides`.
    """
    width, height = PLOT_SIZE
    heights = [y for _, y in points]
    y_range = (max(heights) - min(heights)) * 1.4 or 1.0
    pixels = [((x - span[0]) / (span[1] - span[0]) * width, (y - min(heights)) / y_range * height) for x, y in points]
    taken = [(x - 7, x + 7, y - 7, y + 7) for x, y in pixels]
    chosen = []
    for (x, y), forms in zip(pixels, texts, strict=True):
        options = [(text, side, _label_box(x, y, text, side)) for text in forms for side in sides]
        inside = (option for option in options if option[2][0] >= 0 and option[2][1] <= width)
        fits = (option for option in inside if all(_apart(option[2], other) for other in taken))
        text, side, box = next(fits, (forms[-1], sides[0], _label_box(x, y, forms[-1], sides[0])))
        taken.append(box)
        padding = "  " if side.startswith("middle") else ""
        chosen.append((f"{padding}{text}{padding}", side))
    return chosen


def _label_box(x: float, y: float, text: str, side: str) -> tuple[float, float, float, float]:
    """Returns left, right, lower and upper edge in pixels."""
    text_width, (vertical, horizontal) = CHAR_WIDTH * len(text), side.split()
    left = {"right": x + 8, "left": x - 8 - text_width, "center": x - text_width / 2}[horizontal]
    low = y + {"middle": -7, "top": 8, "bottom": -22}[vertical]
    return left, left + text_width, low, low + 14


def _apart(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]


def _hover_text(arm: ArmSummary) -> str:
    return f"{label(arm.arm)}<br>{mean_interval(arm.score)}"


def _speed_trace(verdict: str, arms: Sequence[ArmSummary], bars: Mapping[str, float] | None) -> Figure:
    color = f"var(--{verdict_slug(verdict)})"
    half_widths = [half_width(arm.delta) or 0 for arm in arms]
    speeds = [fmt.count(arm.tokens_per_second) for arm in arms]
    widths = [(bars or {}).get(arm.arm, 0) for arm in arms]
    speeds = [f"{s} ± {fmt.count(w)}" if w else s for s, w in zip(speeds, widths, strict=True)]
    hover_texts = [f"{_hover_text(arm)} at {speed} tok/s" for arm, speed in zip(arms, speeds, strict=True)]
    bar = {"type": "data", "color": color, "thickness": 1, "width": 0, "visible": bars is not None}
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": verdict,
        "x": [round(arm.tokens_per_second or 0.0, 1) for arm in arms],
        "y": [arm.score.mean for arm in arms],
        "error_x": bar | {"array": [round(width, 1) for width in widths]},
        "error_y": bar | {"array": half_widths},
        "marker": marker(verdict, 9),
        "cliponaxis": False,
        "hovertext": hover_texts,
        "hoverinfo": "text",
    }


def parallel_figure(phase: PhaseSummary) -> Figure | None:
    """Plots a line per arm across an axis per swept setting and one for the score; None for a single setting."""
    axes = sweep_axes(phase)
    arms = [arm for arm in phase.arms if arm.score.mean is not None and arm.overrides][:MAX_LINES]  # ranked
    if len(axes) < 2 or len(arms) < 3:
        return None
    columns = [[arm.overrides[name] for arm in arms] for name in axes] + [[arm.score.mean for arm in arms]]
    scales = [Scale(column) for column in columns]
    heights = [[scale.place(value) for value in column] for scale, column in zip(scales, columns, strict=True)]
    data = []
    groups = HALVES if len(arms) < MIN_ARMS_FOR_FIFTHS else FIFTHS
    for rank, name in reversed(list(enumerate(groups))):  # the best group is drawn last, on top
        members = [i for i in range(len(arms)) if i * len(groups) // len(arms) == rank]
        color = f"var(--{groups[name]})"
        style = {"name": name, "line": {"color": color, "width": 1.2 if rank else 2.5}}
        data.append(_group_trace(members, arms, heights) | style | {"marker": {"color": color, "size": 5}})
    names, span = [label(name.rpartition(".")[2], 18) for name in (*axes, phase.metric.name)], [-0.15, len(axes) + 0.3]
    annotations = [note for x, scale in enumerate(scales) for note in _ticks(x, scale)]
    line = {"color": "var(--soft)", "width": 1}
    upright = {"type": "line", "yref": "y", "y0": 0, "y1": 1, "layer": "below"}
    layout = {
        "height": 360,
        "margin": {"l": 24, "r": 48, "t": 30, "b": 40},
        "xaxis": {"tickvals": list(range(len(names))), "ticktext": names, "range": span, "showgrid": False},
        "yaxis": {"visible": False, "range": [-0.06, 1.06]},
        "hovermode": "closest",
        "shapes": [upright | {"x0": x, "x1": x, "line": line} for x in range(len(axes) + 1)],
        "annotations": annotations,
        "legend": ABOVE | {"traceorder": "reversed"},
        "meta": {"kind": "parallel"},
    }
    return {"data": data, "layout": layout}


class Scale:
    """Maps values to [0, 1]: on a linear or log scale, or in equal steps for text or few distinct values."""

    def __init__(self, column: Sequence[Any]) -> None:
        distinct = {repr(value): value for value in column}.values()
        numeric = all(map(is_number, distinct))
        self.values: list[Any] = sorted(distinct) if numeric else sorted(distinct, key=repr)
        self.steps = not numeric or len(self.values) <= MAX_TICKS
        self.log = not self.steps and self.values[0] > 0 and self.values[-1] / self.values[0] >= WIDE_RANGE

    def place(self, value: Any) -> float:
        """Returns the position of a value, from 0 to 1; 0.5 if it is the only one."""
        if len(self.values) == 1:
            return 0.5
        if self.steps:
            return round([repr(known) for known in self.values].index(repr(value)) / (len(self.values) - 1), 4)
        low, high, scaled = (log(x) if self.log else x for x in (self.values[0], self.values[-1], value))
        return round((scaled - low) / (high - low), 4)

    def ticks(self) -> list[Any]:
        """Returns the values to print beside the axis: all, or first, middle and last."""
        last = len(self.values) - 1
        if last < MAX_TICKS:
            return self.values
        return [self.values[0], self.values[last // 2], self.values[last]]


def _ticks(x: int, scale: Scale) -> list[Figure]:
    position = {"x": x, "showarrow": False, "xanchor": "left", "xshift": 4}
    style = position | {"bgcolor": "var(--paper)", "font": {"color": "var(--soft)", "size": 11}}
    ticks = [(value, f"{value:.4g}" if isinstance(value, float) else fmt.value(value)) for value in scale.ticks()]
    return [style | {"y": scale.place(value), "text": label(text, 14)} for value, text in ticks]


def _group_trace(members: Sequence[int], arms: Sequence[ArmSummary], heights: Sequence[Sequence[float]]) -> Figure:
    x: list[int | None] = []
    y: list[float | None] = []
    hover_texts: list[str] = []
    for i in members:
        x += [*range(len(heights)), None]
        y += [*(column[i] for column in heights), None]
        hover_texts += [_hover_text(arms[i])] * (len(heights) + 1)
    return {"type": "scatter", "mode": "lines+markers", "x": x, "y": y, "hovertext": hover_texts, "hoverinfo": "text"}
