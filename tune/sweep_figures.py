"""Two more plots of a phase: loss against speed, and the parallel coordinates of a sweep over several axes.

Parallel coordinates are drawn with plain lines: plotly's own type needs WebGL and scripts made at run time, which the
page's policy forbids and a printer does not have.
"""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

from tune import format as fmt
from tune.figures import MARKERS, Figure, label, verdict_slug
from tune.importance import is_number, sweep_axes

MOST_LINES = 400  # arms in parallel coordinates, best first
MOST_BARS = 40  # arms up to which each has its interval against speed
MOST_TICKS = 8  # values written at one axis
WIDE_RANGE = 30  # largest over smallest from which an axis is logarithmic
# Groups of arms by rank, with their colours; a few arms make two groups only.
FIFTHS = {
    "best fifth": "var(--s1)",
    "second": "var(--s6)",
    "third": "var(--faint)",
    "fourth": "var(--s5)",
    "last fifth": "var(--s2)",
}
HALVES = {"better half": "var(--s1)", "other half": "var(--s5)"}
FEW = 10  # arms


def speed_figure(phase: Mapping[str, Any]) -> Figure | None:
    """Each arm's score over its tokens per second; None with fewer than two arms that have both."""
    arms = [
        arm
        for arm in phase.get("arms") or []
        if arm.get("tokens_per_second") is not None and (arm.get("score") or {}).get("mean") is not None
    ]
    if len(arms) < 2:
        return None
    speeds = [arm["tokens_per_second"] for arm in arms]
    middle = (min(speeds) + max(speeds)) / 2
    data = []
    for verdict in fmt.VERDICTS:
        own = [arm for arm in arms if arm["verdict"] == verdict]
        data += [_speed_trace(verdict, own, phase, middle)] if own else []
    name = label((phase.get("metric") or {}).get("name"), 40)
    layout = {
        "height": 340,
        "margin": {"l": 8, "r": 16, "t": 30, "b": 46},
        "xaxis": {"title": {"text": "training tokens per second"}, "tickformat": "~s"},
        "yaxis": {"title": {"text": name}, "automargin": True},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
        "meta": {"kind": "speed"},
    }
    return {"data": data, "layout": layout}


def _speed_trace(verdict: str, arms: Sequence[Mapping[str, Any]], phase: Mapping[str, Any], middle: float) -> Figure:
    """The arms of one verdict; the winner and the baseline are named on the side towards the `middle` speed."""
    color = f"var(--{verdict_slug(verdict)})"
    named = (phase.get("winner"), phase.get("baseline"))
    bars = len(phase["arms"]) <= MOST_BARS
    halves = [fmt.half_width(arm["score"]) or 0 for arm in arms]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": verdict,
        "x": [round(arm["tokens_per_second"], 1) for arm in arms],
        "y": [arm["score"]["mean"] for arm in arms],
        "error_y": {"type": "data", "array": halves, "color": color, "thickness": 1, "width": 0, "visible": bars},
        "marker": {
            "color": color,
            "size": 9,
            "symbol": MARKERS.get(verdict, "x"),
            "line": {"color": color, "width": 2},
        },
        "text": [f"  {label(arm['arm'], 18)}  " if arm["arm"] in named else "" for arm in arms],
        "textposition": ["middle left" if arm["tokens_per_second"] > middle else "middle right" for arm in arms],
        "cliponaxis": False,
        "hovertext": [
            f"{label(arm['arm'])}<br>{fmt.mean_interval(arm['score'])} at {fmt.count(arm['tokens_per_second'])} tok/s"
            for arm in arms
        ],
        "hoverinfo": "text",
    }


def parallel_figure(phase: Mapping[str, Any]) -> Figure | None:
    """An upright line per setting of the sweep and one for the score, an arm as a line across; None for one axis."""
    axes = sweep_axes(phase)
    known = [arm for arm in phase.get("arms") or [] if (arm.get("score") or {}).get("mean") is not None]
    arms = [arm for arm in known if arm.get("overrides")][:MOST_LINES]  # ranked
    if len(axes) < 2 or len(arms) < 3:
        return None
    columns = [[arm["overrides"][name] for arm in arms] for name in axes] + [[a["score"]["mean"] for a in arms]]
    scales = [Scale.of(column) for column in columns]
    heights = [[scale.place(value) for value in column] for scale, column in zip(scales, columns, strict=True)]
    data = []
    groups = HALVES if len(arms) < FEW else FIFTHS
    for rank, name in reversed(list(enumerate(groups))):  # the best on top
        own = [i for i in range(len(arms)) if i * len(groups) // len(arms) == rank]
        look = {"name": name, "line": {"color": groups[name], "width": 1.2 if rank else 2.5}}
        data.append(_group_trace(own, arms, heights) | look | {"marker": {"color": groups[name], "size": 5}})
    leaves = [label(name.rpartition(".")[2], 18) for name in axes]
    notes = [note for x, scale in enumerate(scales) for note in _ticks(x, scale)]
    upright = {"type": "line", "yref": "y", "y0": 0, "y1": 1, "layer": "below"}
    layout = {
        "height": 360,
        "margin": {"l": 24, "r": 48, "t": 30, "b": 40},
        "xaxis": {
            "tickvals": list(range(len(axes) + 1)),
            "ticktext": [*leaves, label((phase.get("metric") or {}).get("name"), 18)],
            "range": [-0.15, len(axes) + 0.3],
            "showgrid": False,
        },
        "yaxis": {"visible": False, "range": [-0.06, 1.06]},
        "hovermode": "closest",
        "shapes": [
            upright | {"x0": x, "x1": x, "line": {"color": "var(--soft)", "width": 1}} for x in range(len(axes) + 1)
        ],
        "annotations": notes,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "xanchor": "left",
            "yanchor": "bottom",
            "traceorder": "reversed",
        },
        "meta": {"kind": "parallel"},
    }
    return {"data": data, "layout": layout}


class Scale:
    """Places of values between 0 and 1: by size, by logarithm, or in equal steps for words and a few values."""

    def __init__(self, values: Sequence[Any], *, steps: bool) -> None:
        self.values, self.steps = list(values), steps
        self.log = not steps and self.values[0] > 0 and self.values[-1] / self.values[0] >= WIDE_RANGE

    @classmethod
    def of(cls, column: Sequence[Any]) -> "Scale":
        distinct = list({repr(value): value for value in column}.values())
        numeric = all(is_number(value) for value in distinct)
        distinct.sort(key=(lambda value: value) if numeric else repr)
        return cls(distinct, steps=not numeric or len(distinct) <= MOST_TICKS)

    def place(self, value: Any) -> float:
        if len(self.values) == 1:
            return 0.5
        if self.steps:
            return round([repr(known) for known in self.values].index(repr(value)) / (len(self.values) - 1), 4)
        low, high, at = (log(x) if self.log else x for x in (self.values[0], self.values[-1], value))
        return round((at - low) / (high - low), 4)

    def ticks(self) -> list[Any]:
        """Values to write beside the axis."""
        last = len(self.values) - 1
        if last < MOST_TICKS:
            return self.values
        return [self.values[0], self.values[last // 2], self.values[last]]


def _ticks(x: int, scale: Scale) -> list[Figure]:
    look = {
        "x": x,
        "showarrow": False,
        "xanchor": "left",
        "xshift": 4,
        "bgcolor": "var(--paper)",
        "font": {"color": "var(--soft)", "size": 11},
    }
    return [look | {"y": scale.place(value), "text": label(_tick(value), 14)} for value in scale.ticks()]


def _tick(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else fmt.value(value)


def _group_trace(own: Sequence[int], arms: Sequence[Mapping[str, Any]], heights: Sequence[Sequence[float]]) -> Figure:
    x: list[int | None] = []
    y: list[float | None] = []
    words: list[str] = []
    for i in own:
        x += [*range(len(heights)), None]
        y += [*(column[i] for column in heights), None]
        words += [f"{label(arms[i]['arm'])}<br>{fmt.mean_interval(arms[i]['score'])}"] * (len(heights) + 1)
    return {"type": "scatter", "mode": "lines+markers", "x": x, "y": y, "hovertext": words, "hoverinfo": "text"}
