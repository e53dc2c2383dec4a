"""Plotly figures of a phase: the effect plot and the loss curves.

Colours are CSS variables (`var(--better)`), which the page resolves for its light, dark and print styles. Plotly
interprets some HTML in labels, so every name is escaped here.
"""

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import Any, NamedTuple

from tune import format as fmt
from tune.report.wording import VERDICTS, effect
from tune.storage.summaries import ArmSummary, Delta, PhaseSummary

Figure = dict[str, Any]
CurveRow = Mapping[str, Any]  # a row of curves.parquet

MAX_EFFECTS = 40  # arms in one effect plot; the table lists all arms
MAX_POINTS = 200  # steps plotted per curve
MAX_BANDS = 3  # best arms that get a band over their seeds; more bands would overlap
LOSSES = ("val_loss", "train_loss")  # that have curves
SERIES_COLORS = 7  # var(--s1) to var(--s7); further arms are grey
MARKERS = {
    "baseline": "diamond",
    "better": "circle",
    "worse": "square",
    "equivalent": "diamond-open",
    "undecided": "circle-open",
    "no claim": "circle-open",
    "incomplete": "circle-open",
}


def label(text: object, width: int = 200) -> str:
    """Returns untrusted text for plotly: one line, shortened, escaped."""
    return html.escape(fmt.shorten(fmt.plain(text), width), quote=False)


def verdict_slug(verdict: str | None) -> str:
    """Returns the CSS name of a verdict; `other` if it is not in `VERDICTS`."""
    return verdict.replace(" ", "-") if verdict in VERDICTS else "other"


# Layout shared by several figures.
ABOVE = {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}  # legend above the plot
MARGIN = {"l": 8, "r": 16, "t": 30, "b": 46}


def marker(verdict: str, size: int) -> Figure:
    """Returns the plotly marker for arms with this verdict."""
    color = f"var(--{verdict_slug(verdict)})"
    return {"color": color, "size": size, "symbol": MARKERS.get(verdict, "x"), "line": {"color": color, "width": 2}}


def effect_figure(phase: PhaseSummary) -> Figure | None:
    """Plots each arm's difference from the baseline with its interval; None if no arm has a difference."""
    arms = [arm for n, arm in enumerate(phase.arms) if n < MAX_EFFECTS or arm.verdict == "baseline"]
    if not any(arm.delta for arm in arms):
        return None
    rows = list(enumerate(arms))
    data = []
    for verdict in VERDICTS:
        judged = [(y, arm) for y, arm in rows if arm.verdict == verdict]
        with_delta = [(y, arm) for y, arm in judged if verdict == "baseline" or arm.delta]
        without_delta = [(y, arm) for y, arm in judged if (y, arm) not in with_delta]
        data += [_interval_trace(verdict, with_delta)] if with_delta else []
        data += [_verdict_text_trace(verdict, without_delta)] if without_delta else []
    direction = "better →" if phase.metric.goal == "maximize" else "← better"
    title = f"{label(phase.metric.name, 40)} against the baseline   {direction}"
    band = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    band |= {"fillcolor": "var(--band)", "line": {"width": 0}}
    layout = {
        "height": 92 + 30 * len(arms),
        "margin": MARGIN,
        "xaxis": {"title": {"text": title}, "zeroline": True},
        "yaxis": {
            "tickvals": [y for y, _ in rows],
            "ticktext": [label(arm.arm, 40) for _, arm in rows],
            "range": [len(arms) - 0.4, -0.6],
            "automargin": True,
            "showgrid": False,
        },
        "shapes": [band | {"x0": -phase.min_effect, "x1": phase.min_effect}] if phase.min_effect else [],
        "legend": ABOVE,
        "meta": {"kind": "effect", "short": [_short_label(arm) for _, arm in rows]},
    }
    return {"data": data, "layout": layout}


def _short_label(arm: ArmSummary) -> str:
    """Returns a label for narrow screens, in which the values of the settings replace a long name."""
    name, values = fmt.plain(arm.arm), ", ".join(map(fmt.value, arm.overrides.values()))
    return label(values if len(name) > 15 and values else name, 15)


def _interval_trace(verdict: str, rows: list[tuple[int, ArmSummary]]) -> Figure:
    color = f"var(--{verdict_slug(verdict)})"
    deltas = [arm.delta or Delta(0) for _, arm in rows]
    upper = [0 if delta.ci_high is None else delta.ci_high - delta.mean for delta in deltas]
    lower = [0 if delta.ci_low is None else delta.mean - delta.ci_low for delta in deltas]
    error = {"type": "data", "symmetric": False, "color": color, "thickness": 2, "width": 0}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": verdict,
        "x": [delta.mean for delta in deltas],
        "y": [y for y, _ in rows],
        "error_x": error | {"array": upper, "arrayminus": lower},
        "marker": marker(verdict, 10),
        "hovertext": [f"{label(arm.arm)}<br>{label(_effect_text(arm))}" for _, arm in rows],
        "hoverinfo": "text",
    }


def _verdict_text_trace(verdict: str, rows: list[tuple[int, ArmSummary]]) -> Figure:
    trace = {"type": "scatter", "mode": "text", "name": verdict, "showlegend": False, "hoverinfo": "skip"}
    texts = {"text": [f"  {verdict}"] * len(rows), "textposition": "middle right"}
    style = {"textfont": {"color": f"var(--{verdict_slug(verdict)})"}}
    return trace | texts | style | {"x": [0] * len(rows), "y": [y for y, _ in rows]}


def _effect_text(arm: ArmSummary) -> str:
    p = arm.delta.p_holm if arm.delta else None
    return f"{arm.verdict}: {effect(arm.delta)}" + ("" if p is None else f", Holm p {fmt.p_value(p)}")


class Point(NamedTuple):
    """Mean and range of an arm's loss at one step, over the trials that logged it."""

    x: float  # training tokens, or the step if tokens are unknown
    mean: float
    low: float
    high: float
    trials: int


def curves_by_arm(curves: Iterable[CurveRow]) -> dict[tuple[str, str], list[CurveRow]]:
    """Groups the logged steps of all trials by phase and arm."""
    groups = defaultdict(list)
    for row in curves:
        if row.get("step") is not None:
            groups[row["phase"], row["arm"]].append(row)
    return groups


def curve_figure(phase: PhaseSummary, rows: Mapping[tuple[str, str], Sequence[CurveRow]]) -> Figure | None:
    """Plots the loss of each arm, averaged over its seeds; None without logged losses.

    Validation curves have markers and the best arms a band over their seeds; training curves are thin.
    """
    colors = _colors(phase)
    banded = [*list(colors)[:MAX_BANDS], phase.baseline]
    logged = {arm.arm: rows.get((phase.phase, arm.arm), ()) for arm in phase.arms}
    with_loss = [row for group in logged.values() for row in group if any(row.get(loss) is not None for loss in LOSSES)]
    axis = "tokens" if all(row.get("tokens") is not None for row in with_loss) else "step"
    data: list[Figure] = []
    points_in_focus: list[tuple[float, float]] = []
    for arm in sorted(phase.arms, key=lambda arm: arm.arm in colors):  # grey curves are drawn first, behind the others
        val, train = (_average(logged[arm.arm], loss, axis) for loss in LOSSES)
        main, color = val or train, colors.get(arm.arm)
        if not main:
            continue
        if color is None:
            data.append(_line(arm.arm, main, "var(--faint)", 1) | {"showlegend": False})
            continue
        if main[0].trials > 1 and arm.arm in banded:
            data.append(_band_over_seeds(arm.arm, main, color))
        if train:
            line = _line(arm.arm, train, color, 1, what="train")
            data.append(line | {"opacity": 0.55, "showlegend": not val})
        if val:
            width = 3 if arm.arm == phase.winner else 2
            data.append(_line(arm.arm, val, color, width, what="val") | {"mode": "lines+markers"})
        if arm.verdict not in ("diverged", "failed"):
            points_in_focus += [(point.x, y) for point in val + train for y in (point.low, point.high)]
    n_in_legend = sum(trace["showlegend"] for trace in data)
    return {"data": data, "layout": _curve_layout(axis, n_in_legend, _late_range(points_in_focus))} if data else None


def _colors(phase: PhaseSummary) -> dict[str, str]:
    """Maps the coloured arms to their colours: winner, best other arms, and baseline; the rest is grey."""
    arms = [arm.arm for arm in phase.arms]
    special = (phase.baseline, phase.winner)
    ranked = [arm for arm in arms if arm == phase.winner != phase.baseline] + [a for a in arms if a not in special]
    colors = {arm: f"var(--s{n})" for n, arm in enumerate(ranked[:SERIES_COLORS], 1)}
    return colors | {arm: "var(--baseline)" for arm in arms if arm == phase.baseline}


def _average(rows: Iterable[CurveRow], loss: str, axis: str) -> list[Point]:
    """Returns mean, minimum and maximum over the trials of an arm, at no more than `MAX_POINTS` steps."""
    steps: defaultdict[int, dict[str, float]] = defaultdict(dict)
    x: dict[int, float] = {}
    for row in rows:
        value = row.get(loss)
        if value is not None and isfinite(value):
            steps[row["step"]][row["trial_id"]] = value  # a resumed trial may log a step twice: the last row counts
            x[row["step"]] = row[axis]
    order = sorted(steps)
    if (last := len(order) - 1) >= MAX_POINTS:
        order = [order[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]
    values_at = [(step, steps[step].values()) for step in order]
    return [Point(x[step], fmean(y), min(y), max(y), len(y)) for step, y in values_at]


def _arm_trace(arm: str, x: Sequence[float], y: Sequence[float], color: str, width: int) -> Figure:
    """Returns a trace; all traces of an arm share a legend group, so that one click hides them all."""
    shared = {"type": "scatter", "mode": "lines", "name": label(arm, 48), "legendgroup": label(arm, 48)}
    return shared | {"x": x, "y": y, "line": {"color": color, "width": width}}


def _line(arm: str, points: Sequence[Point], color: str, width: int, *, what: str = "loss") -> Figure:
    trials = max(point.trials for point in points)
    seeds = f"mean of {trials} seeds, %{{customdata[0]:.4f}} to %{{customdata[1]:.4f}}" if trials > 1 else "one seed"
    ranges = [[round(point.low, 5), round(point.high, 5)] for point in points]
    x, y = [point.x for point in points], [round(point.mean, 5) for point in points]
    trace = _arm_trace(arm, x, y, color, width) | {"marker": {"color": color, "size": 5}, "showlegend": True}
    trace["hovertemplate"] = f"%{{fullData.name}}<br>{what} %{{y:.4f}} at %{{x:.3s}}<br>{seeds}<extra></extra>"
    return trace | {"customdata": ranges} if trials > 1 else trace


def _band_over_seeds(arm: str, points: Sequence[Point], color: str) -> Figure:
    """Returns the band between the lowest and the highest seed of an arm, as one outline."""
    x = [point.x for point in points]
    y = [round(point.high, 5) for point in points] + [round(point.low, 5) for point in reversed(points)]
    style = {"fill": "toself", "fillcolor": color, "showlegend": False, "hoverinfo": "skip"}
    return _arm_trace(arm, x + x[::-1], y, color, 0) | style


def _late_range(points: Sequence[tuple[float, float]]) -> list[float] | None:
    """Returns the y range of the losses after the first quarter of training, where differences show."""
    end = max((x for x, _ in points), default=0)
    late = [y for x, y in points if x >= 0.25 * end]
    low, high = min(late, default=0), max(late, default=0)
    return [low - 0.04 * (high - low), high + 0.04 * (high - low)] if high > low else None


def _curve_layout(axis: str, n_in_legend: int, focus: list[float] | None) -> Figure:
    x_name = "training tokens" if axis == "tokens" else "steps"
    return {
        "height": 340,
        "margin": {"l": 8, "r": 16, "t": 12, "b": 30},
        "xaxis": {"tickformat": "~s", "rangemode": "tozero"},
        "yaxis": {"title": {"text": "loss, nats per token"}, "automargin": True},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": -0.11, "xanchor": "left", "yanchor": "top"},
        "meta": {"kind": "curves", "focus": focus, "names": n_in_legend, "over": x_name},
    }
