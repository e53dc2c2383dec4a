"""Plotly figures of a phase: the effect plot and the curves of its metrics.

Colours are CSS variables (`var(--better)`), which the page resolves for its light, dark and print styles. Plotly
interprets some HTML in labels, so every name is escaped here.
"""

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from tune import format as fmt
from tune.report.trial_logs import COLUMNS, CURVES, DETAILS, LOSSES, TrialLog, rounded, thinned
from tune.report.wording import VERDICTS, effect
from tune.storage.summaries import ArmSummary, Delta, PhaseSummary

Figure = dict[str, Any]

MAX_EFFECTS = 40  # arms in one effect plot; the table lists all arms
MAX_POINTS = 200  # steps plotted per curve
MAX_FIGURE_POINTS = 12_000  # of one figure; with many curves each has fewer steps, but at least `MIN_POINTS`
MIN_POINTS = 40
MAX_CURVES = 150  # arms in one figure of curves, best first
MAX_CURVE_METRICS = 8  # metrics whose curves are on the page
MAX_BANDS = 3  # best arms that get a band over their seeds; more bands would overlap
SERIES_COLORS = 7  # var(--s1) to var(--s7); further arms are grey
# The columns of `curves.parquet` that curves can be drawn over, by axis.
RECORDED = {"seconds": "train_seconds", "elapsed": "seconds", "flops": "flops"}
# What a curve has on its y axis; other metrics have their name.
UNITS = {**dict.fromkeys(LOSSES, "loss, nats per token"), "val_bpb": "bits per byte"}
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
    """The arms of one verdict, as points with intervals; `rows` has the height of each arm."""
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


class Place(NamedTuple):
    """Where a step of an arm is on each axis, averaged over its trials; None where no trial has logged it."""

    tokens: float | None = None
    seconds: float | None = None  # in training steps
    elapsed: float | None = None  # since training began
    flops: float | None = None


class Point(NamedTuple):
    """Mean and range of a metric of an arm at one step, over the trials that logged it."""

    step: int
    place: Place
    mean: float
    low: float
    high: float
    trials: int


def curve_metrics(phase: PhaseSummary, logs: Mapping[tuple[str, str], Sequence[TrialLog]]) -> list[str]:
    """Returns the logged metrics that have curves: that of the campaign, losses, then those of plug-ins."""
    own = [log for arm in curve_arms(phase) for log in logs.get((phase.phase, arm.arm), ())]
    open_names = [name for log in own[:1] for name in log.columns if name not in (*COLUMNS, *DETAILS)]
    names = dict.fromkeys((phase.metric.name, *CURVES, *open_names))
    return [name for name in names if any(log.logged(name) for log in own)][:MAX_CURVE_METRICS]


def curve_figures(
    phase: PhaseSummary,
    logs: Mapping[tuple[str, str], Sequence[TrialLog]],
    metrics: Sequence[str] = ("val_loss",),
    flops_per_token: Mapping[str, int] | None = None,
) -> dict[str, Figure]:
    """Plots each of the metrics of the arms, averaged over their seeds; without metrics that nothing has logged.

    The figure of `val_loss` has the training loss too, as thin lines. Other curves have markers, and the best arms a
    band over their seeds. The `meta` of a trace says which arm it shows, and has what the page needs to draw it over
    steps, tokens, seconds or FLOPs; `flops_per_token` maps arms to theirs, for results that did not record FLOPs.
    """
    arms = curve_arms(phase)
    known = recorded_axes(phase, logs)
    places = {arm.arm: _places(logs.get((phase.phase, arm.arm), ()), known) for arm in arms}
    most = points_per_curve(len(arms))
    figures = {}
    for metric in metrics:
        names = LOSSES if metric == "val_loss" else (metric,)
        points = {
            arm.arm: {
                name: _average(logs.get((phase.phase, arm.arm), ()), name, places[arm.arm], most) for name in names
            }
            for arm in arms
        }
        if figure := _curve_figure(phase, metric, points, flops_per_token or {}):
            figures[metric] = figure
    return figures


def _curve_figure(
    phase: PhaseSummary, metric: str, points: Mapping[str, Mapping[str, list[Point]]], flops: Mapping[str, int]
) -> Figure | None:
    """Returns the figure of `points`, which are by arm and metric; None without points."""
    colors = arm_colors(phase)
    banded = [*list(colors)[:MAX_BANDS], phase.baseline]
    drawn = [point for curves in points.values() for curve in curves.values() for point in curve]
    axis = "tokens" if all(point.place.tokens is not None for point in drawn) else "steps"
    numbers = {arm.arm: number for number, arm in enumerate(phase.arms)}
    data: list[Figure] = []
    points_in_focus: list[tuple[float, float]] = []
    # Grey curves are drawn first, behind the others.
    for arm in sorted(curve_arms(phase), key=lambda arm: arm.arm in colors):
        main = points[arm.arm][metric]
        train = points[arm.arm].get("train_loss", []) if metric == "val_loss" else []
        color, first = colors.get(arm.arm), main or train
        if not first:
            continue
        traces: list[Figure] = []
        if color is None:
            traces.append(_line(arm.arm, first, axis, "var(--faint)", 1, what=metric) | {"showlegend": False})
        else:
            if first[0].trials > 1 and arm.arm in banded:
                traces.append(_band_over_seeds(arm.arm, first, axis, color))
            if train:
                line = _line(arm.arm, train, axis, color, 1, what="train_loss")
                traces.append(line | {"opacity": 0.55, "showlegend": not main})
            if main:
                line = _line(arm.arm, main, axis, color, 3 if arm.arm == phase.winner else 2, what=metric)
                traces.append(line | ({} if metric == "train_loss" else {"mode": "lines+markers"}))
            if arm.verdict not in ("diverged", "failed"):
                points_in_focus += [(_x(point, axis), y) for point in main + train for y in (point.low, point.high)]
        for trace in traces:
            trace["meta"]["arm"] = numbers[arm.arm]
            trace["meta"].setdefault("flops", flops.get(arm.arm))
        data += traces
    n_in_legend = sum(trace["showlegend"] for trace in data)
    focus = _late_range(points_in_focus)
    return {"data": data, "layout": _curve_layout(metric, axis, n_in_legend, focus)} if data else None


def arm_colors(phase: PhaseSummary) -> dict[str, str]:
    """Maps the coloured arms to their colours: winner, best other arms, and baseline; the rest is grey."""
    arms = [arm.arm for arm in phase.arms]
    special = (phase.baseline, phase.winner)
    ranked = [arm for arm in arms if arm == phase.winner != phase.baseline] + [a for a in arms if a not in special]
    colors = {arm: f"var(--s{n})" for n, arm in enumerate(ranked[:SERIES_COLORS], 1)}
    return colors | {arm: "var(--baseline)" for arm in arms if arm == phase.baseline}


def curve_arms(phase: PhaseSummary) -> list[ArmSummary]:
    """Returns the arms whose curves are drawn: the baseline, and the best of the others."""
    return [arm for n, arm in enumerate(phase.arms) if n < MAX_CURVES or arm.arm == phase.baseline]


def points_per_curve(curves: int) -> int:
    """Returns how many steps of each curve are drawn in a figure of so many curves."""
    return max(MIN_POINTS, min(MAX_POINTS, MAX_FIGURE_POINTS // max(1, 2 * curves)))


def recorded_axes(phase: PhaseSummary, logs: Mapping[tuple[str, str], Sequence[TrialLog]]) -> set[str]:
    """Returns which axes of `RECORDED` every trial of the curves has logged; one that lacks them would not compare."""
    own = [log for arm in curve_arms(phase) for log in logs.get((phase.phase, arm.arm), ()) if log.logged("tokens")]
    return {axis for axis, name in RECORDED.items() if own and all(log.records(name) for log in own)}


def _places(logs: Sequence[TrialLog], recorded: Iterable[str]) -> dict[int, Place]:
    """Maps the steps of an arm to their places on the axes. Seconds that are not recorded are computed."""
    found: dict[str, defaultdict[int, list[float]]] = {name: defaultdict(list) for name in Place._fields}
    for log in logs:
        columns = {axis: log.series(RECORDED[axis]) for axis in recorded}
        columns["tokens"] = log.series("tokens")
        if "seconds" not in columns:
            columns["seconds"] = log.seconds()
        for name, series in columns.items():
            for step, value in series.items():
                found[name][step].append(value)
    means = {name: {step: fmean(values) for step, values in by_step.items()} for name, by_step in found.items()}
    steps = {step for by_step in means.values() for step in by_step}
    return {step: Place(*(means[name].get(step) for name in Place._fields)) for step in steps}


def _average(logs: Sequence[TrialLog], metric: str, places: Mapping[int, Place], most: int) -> list[Point]:
    """Returns mean, minimum and maximum over the trials of an arm, at no more than `most` steps."""
    steps: defaultdict[int, list[float]] = defaultdict(list)
    for log in logs:
        for step, value in log.series(metric).items():
            steps[step].append(value)
    values_at = [(step, steps[step]) for step in thinned(sorted(steps), most)]
    return [Point(step, places.get(step, Place()), fmean(y), min(y), max(y), len(y)) for step, y in values_at]


def _x(point: Point, axis: str) -> float:
    return point.step if axis == "steps" or point.place.tokens is None else point.place.tokens


def _arm_trace(arm: str, points: Sequence[Point], axis: str, color: str, width: int) -> Figure:
    """Returns a trace; all traces of an arm share a legend group, so that one click hides them all."""
    shared = {"type": "scatter", "mode": "lines", "name": label(arm, 48), "legendgroup": label(arm, 48)}
    meta: dict[str, Any] = {"steps": [point.step for point in points]}
    for name in ("seconds", "elapsed", "flops"):
        values = [getattr(point.place, name) for point in points]
        if None not in values:
            meta[name] = [float(f"{value:.5g}") for value in values]
    x = [_x(point, axis) for point in points]
    return shared | {"x": x, "line": {"color": color, "width": width}, "meta": meta}


def _line(arm: str, points: Sequence[Point], axis: str, color: str, width: int, *, what: str) -> Figure:
    trials = max(point.trials for point in points)
    form = ".4f" if what in CURVES else ".4~g"
    spread = f"%{{customdata[0]:{form}}} to %{{customdata[1]:{form}}}"
    seeds = f"mean of {trials} seeds, {spread}" if trials > 1 else "one seed"
    ranges = [[rounded(point.low), rounded(point.high)] for point in points]
    trace = _arm_trace(arm, points, axis, color, width) | {"marker": {"color": color, "size": 5}, "showlegend": True}
    trace["y"] = [rounded(point.mean) for point in points]
    value = f"{label(what, 40)} %{{y:{form}}} at %{{x:.3s}}"
    trace["hovertemplate"] = f"%{{fullData.name}}<br>{value}<br>{seeds}<extra></extra>"
    trace["meta"]["kind"] = "line"
    return trace | {"customdata": ranges} if trials > 1 else trace


def _band_over_seeds(arm: str, points: Sequence[Point], axis: str, color: str) -> Figure:
    """Returns the band between the lowest and the highest seed of an arm, as one outline."""
    there_and_back = [*points, *reversed(points)]
    trace = _arm_trace(arm, there_and_back, axis, color, 0)
    trace["y"] = [rounded(point.high) for point in points] + [rounded(point.low) for point in reversed(points)]
    trace["meta"]["kind"] = "band"
    return trace | {"fill": "toself", "fillcolor": color, "showlegend": False, "hoverinfo": "skip"}


def _late_range(points: Sequence[tuple[float, float]]) -> list[float] | None:
    """Returns the y range of the values after the first quarter of training, where differences show."""
    end = max((x for x, _ in points), default=0)
    late = [y for x, y in points if x >= 0.25 * end]
    low, high = min(late, default=0), max(late, default=0)
    return [low - 0.04 * (high - low), high + 0.04 * (high - low)] if high > low else None


def _curve_layout(metric: str, axis: str, n_in_legend: int, focus: list[float] | None) -> Figure:
    x_name = "training tokens" if axis == "tokens" else "steps"
    return {
        "height": 340,
        "margin": {"l": 8, "r": 16, "t": 12, "b": 30},
        "xaxis": {"tickformat": "~s", "rangemode": "tozero"},
        "yaxis": {"title": {"text": UNITS.get(metric) or label(metric, 40)}, "automargin": True},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": -0.11, "xanchor": "left", "yanchor": "top"},
        "meta": {"kind": "curves", "focus": focus, "names": n_in_legend, "over": x_name},
    }
