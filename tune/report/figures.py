"""The plots of the report as plain plotly specifications: one for the effects of a phase, one for its loss curves.

Colours are names of CSS variables (`var(--better)`); the page resolves them, so that one style sheet rules the screen,
the dark screen and the paper. Plotly reads a little HTML in its labels, so every name is escaped here.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import Any

from tune import format as fmt

Figure = dict[str, Any]
Series = list[tuple[int, float | None, float, float, float, int]]  # step, tokens, mean, lowest, highest, trials

MOST_EFFECTS = 40  # arms in one effect plot; the table has all
MOST_POINTS = 200  # of one curve
MOST_BANDS = 3  # best arms with a band over their seeds; more of them hide each other
SERIES_COLORS = 7  # var(--s1) and on; further arms are drawn in grey
MARKERS = {
    "baseline": "diamond",
    "better": "circle",
    "worse": "square",
    "tie": "circle-open",
    "no claim": "circle-open",
    "incomplete": "circle-open",
}


def label(text: object, width: int = 200) -> str:
    """Untrusted text for plotly: one line, shortened, its markup inert."""
    return html.escape(fmt.shorten(fmt.plain(text), width), quote=False)


def verdict_slug(verdict: str | None) -> str:
    """The name of a verdict's colour and style class; what is not a verdict has none of its own."""
    return verdict.replace(" ", "-") if verdict in fmt.VERDICTS else "other"


def effect_figure(phase: Mapping[str, Any]) -> Figure | None:
    """Each arm's difference from the baseline as a dot with its interval; None where nothing can be compared."""
    arms = [arm for n, arm in enumerate(phase.get("arms") or []) if n < MOST_EFFECTS or arm["verdict"] == "baseline"]
    if not any((arm.get("delta") or {}).get("mean") is not None for arm in arms):
        return None
    rows = list(enumerate(arms))
    data = []
    for verdict in fmt.VERDICTS:
        own = [(y, arm) for y, arm in rows if arm["verdict"] == verdict]
        placed = [row for row in own if verdict == "baseline" or (row[1].get("delta") or {}).get("mean") is not None]
        data += [_interval_trace(verdict, placed)] if placed else []
        data += [_word_trace(verdict, [row for row in own if row not in placed])] if len(placed) < len(own) else []
    metric = phase.get("metric") or {}
    side = "better →" if metric.get("goal") == "maximize" else "← better"
    least = phase.get("min_effect") or 0
    layout = {
        "height": 92 + 30 * len(arms),
        "margin": {"l": 8, "r": 16, "t": 30, "b": 46},
        "xaxis": {
            "title": {"text": f"{label(metric.get('name'), 40)} against the baseline   {side}"},
            "zeroline": True,
        },
        "yaxis": {
            "tickvals": [y for y, _ in rows],
            "ticktext": [label(arm["arm"], 40) for _, arm in rows],
            "range": [len(arms) - 0.4, -0.6],
            "automargin": True,
            "showgrid": False,
        },
        "shapes": [_band(-least, least)] if least else [],
        "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
        "meta": {"kind": "effect", "short": [_short_label(arm) for _, arm in rows]},
    }
    return {"data": data, "layout": layout}


def _short_label(arm: Mapping[str, Any]) -> str:
    """A label for a narrow screen: a long name gives way to its values."""
    name, values = fmt.plain(arm["arm"]), ", ".join(map(fmt.value, (arm.get("overrides") or {}).values()))
    return label(values if len(name) > 15 and values else name, 15)


def _interval_trace(verdict: str, rows: list[tuple[int, Mapping[str, Any]]]) -> Figure:
    color = f"var(--{verdict_slug(verdict)})"
    ends = []
    for _, arm in rows:
        delta = arm.get("delta") or {}
        mean, low, high = delta.get("mean") or 0, delta.get("ci_low"), delta.get("ci_high")
        ends.append((mean, 0 if low is None else mean - low, 0 if high is None else high - mean))
    error = {"type": "data", "symmetric": False, "color": color, "thickness": 2, "width": 0}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": verdict,
        "x": [mean for mean, _, _ in ends],
        "y": [y for y, _ in rows],
        "error_x": error | {"array": [high for *_, high in ends], "arrayminus": [low for _, low, _ in ends]},
        "marker": {
            "color": color,
            "size": 10,
            "symbol": MARKERS.get(verdict, "x"),
            "line": {"color": color, "width": 2},
        },
        "hovertext": [f"{label(arm['arm'])}<br>{label(_effect_words(arm))}" for _, arm in rows],
        "hoverinfo": "text",
    }


def _word_trace(verdict: str, rows: list[tuple[int, Mapping[str, Any]]]) -> Figure:
    """Arms that have no place on the scale: the verdict stands in their row, so that they are not missed."""
    return {
        "type": "scatter",
        "mode": "text",
        "name": verdict,
        "x": [0] * len(rows),
        "y": [y for y, _ in rows],
        "text": [f"  {verdict}"] * len(rows),
        "textposition": "middle right",
        "textfont": {"color": f"var(--{verdict_slug(verdict)})"},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _effect_words(arm: Mapping[str, Any]) -> str:
    p = (arm.get("delta") or {}).get("p_holm")
    words = f"{arm['verdict']}: {fmt.effect(arm.get('delta'))}"
    return f"{words}, Holm p {fmt.p_value(p)}" if p is not None else words


def _band(low: float, high: float) -> Figure:
    """The differences that are too small to matter."""
    place = {"type": "rect", "xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
    return place | {"fillcolor": "var(--band)", "line": {"width": 0}, "layer": "below"}


def curves_by_arm(curves: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The logged steps of all trials, sorted by phase and arm in one pass."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in curves:
        if row.get("step") is not None:
            found.setdefault((row["phase"], row["arm"]), []).append(row)
    return found


def curve_figure(
    phase: Mapping[str, Any], rows: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> Figure | None:
    """Loss curves, averaged over the seeds of each arm: validation with markers and a band, training thin."""
    arms = phase.get("arms") or []
    chosen = _colors(phase)
    banded = [*list(chosen)[:MOST_BANDS], phase.get("baseline")]
    data: list[Figure] = []
    focus: list[tuple[float, float]] = []
    for arm in sorted(arms, key=lambda arm: arm["arm"] in chosen):  # grey ones first, behind the others
        logged = rows.get((phase["phase"], arm["arm"]), ())
        val, train = _average(logged, "val_loss"), _average(logged, "train_loss")
        if not val and not train:
            continue
        width = 3 if arm["arm"] == phase.get("winner") else 2
        color = chosen.get(arm["arm"])
        if color is None:
            data.append(_line(arm["arm"], val or train, "var(--faint)", 1) | {"showlegend": False})
            continue
        if (val or train)[0][5] > 1 and arm["arm"] in banded:
            data.append(_band_over_seeds(arm["arm"], val or train, color))
        if train:
            data.append(_line(arm["arm"], train, color, 1, group=bool(val), what="train") | {"opacity": 0.55})
        if val:
            data.append(_line(arm["arm"], val, color, width, markers=True, what="val"))
        if arm["verdict"] not in ("diverged", "failed"):
            focus += [(row[1] if row[1] is not None else row[0], value) for row in val + train for value in row[3:5]]
    if not data:
        return None
    for trace in data:
        trace["legendgroup"] = trace["name"]
    tokens = all(row[1] is not None for trace in data for row in trace["meta"])
    for trace in data:
        series = trace.pop("meta")
        trace["x"] = [row[1] if tokens else row[0] for row in series]
        if trace.get("fill"):
            trace["x"] += trace["x"][::-1]
    names = sum(trace["showlegend"] for trace in data)
    return {"data": data, "layout": _curve_layout(tokens, names, _late_range(focus))}


def _colors(phase: Mapping[str, Any]) -> dict[str, str]:
    """The arms that get a colour: the baseline, the winner and the best of the others."""
    arms: list[str] = [arm["arm"] for arm in phase.get("arms") or []]
    baseline, winner = phase.get("baseline"), phase.get("winner")
    first = [winner] if winner in arms and winner != baseline else []
    named = first + [arm for arm in arms if arm not in (baseline, winner)]
    colors = {arm: f"var(--s{n})" for n, arm in enumerate(named[:SERIES_COLORS], 1)}
    return colors | {arm: "var(--baseline)" for arm in arms if arm == baseline}


def _average(rows: Iterable[Mapping[str, Any]], name: str) -> Series:
    """Mean, lowest and highest value over the trials of an arm at each step, thinned to `MOST_POINTS` steps."""
    steps: dict[int, dict[str, float]] = {}
    tokens: dict[int, float | None] = {}
    for row in rows:
        value = row.get(name)
        if value is not None and isfinite(value):
            steps.setdefault(row["step"], {})[row["trial_id"]] = value  # a resumed trial logs a step again
            tokens[row["step"]] = row.get("tokens")
    order = sorted(steps)
    if len(order) > MOST_POINTS:
        last = len(order) - 1
        order = [order[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
    every = [(step, list(steps[step].values())) for step in order]
    return [(step, tokens[step], fmean(seen), min(seen), max(seen), len(seen)) for step, seen in every]


def _line(
    arm: str, series: Series, color: str, width: int, *, markers: bool = False, group: bool = False, what: str = "loss"
) -> Figure:
    """One curve; with `group` its legend entry is that of the arm's validation curve."""
    trials = max(row[5] for row in series)
    seeds = f"mean of {trials} seeds, %{{customdata[0]:.4f}} to %{{customdata[1]:.4f}}" if trials > 1 else "one seed"
    spread = {"customdata": [[round(row[3], 5), round(row[4], 5)] for row in series]} if trials > 1 else {}
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": label(arm, 48),
        "y": [round(row[2], 5) for row in series],
        "line": {"color": color, "width": width},
        "marker": {"color": color, "size": 5},
        "showlegend": not group,
        "hovertemplate": f"%{{fullData.name}}<br>{what} %{{y:.4f}} at %{{x:.3s}}<br>{seeds}<extra></extra>",
        "meta": series,
    } | spread


def _band_over_seeds(arm: str, series: Series, color: str) -> Figure:
    """From the lowest to the highest seed of an arm, as one outline."""
    trace = _line(arm, series, color, 0) | {"mode": "lines", "showlegend": False, "hoverinfo": "skip"}
    del trace["hovertemplate"]
    trace.pop("customdata", None)
    outline = [round(row[4], 5) for row in series] + [round(row[3], 5) for row in reversed(series)]
    return trace | {"y": outline, "fill": "toself", "fillcolor": color}


def _late_range(points: Sequence[tuple[float, float]]) -> list[float] | None:
    """The losses after the first steep fall, where arms differ: from a quarter of the run on."""
    end = max((x for x, _ in points), default=0)
    late = [y for x, y in points if x >= 0.25 * end]
    low, high = min(late, default=0), max(late, default=0)
    return [low - 0.04 * (high - low), high + 0.04 * (high - low)] if high > low else None


def _curve_layout(tokens: bool, names: int, focus: list[float] | None) -> Figure:
    return {
        "height": 340,
        "margin": {"l": 8, "r": 16, "t": 12, "b": 30},
        "xaxis": {"tickformat": "~s", "rangemode": "tozero"},
        "yaxis": {"title": {"text": "loss, nats per token"}, "automargin": True},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": -0.11, "xanchor": "left", "yanchor": "top"},
        "meta": {"kind": "curves", "focus": focus, "names": names, "over": "training tokens" if tokens else "steps"},
    }
