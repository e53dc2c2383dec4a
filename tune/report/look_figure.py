"""Plotly figure of a phase with `until: decided`: how the interval of each arm narrowed from look to look."""

from tune import format as fmt
from tune.report.figures import Figure, label, marker, verdict_slug
from tune.storage.records import ArmLook
from tune.storage.summaries import ArmSummary, PhaseSummary

MAX_ARMS = 12  # best-ranked arms in the figure; more would overlap
WIDTH = 0.5  # share of the gap between two looks over which the arms of one look are spread


def look_figure(phase: PhaseSummary) -> Figure | None:
    """Plots the difference of each arm from the baseline at each look, with its interval; None without looks.

    Looks are equally spaced. Small dots are open arms; a large marker shows the verdict at the look that decided it.
    """
    arms = [arm for arm in phase.arms if arm.arm != phase.baseline][:MAX_ARMS]
    data = [trace for i, arm in enumerate(arms) if (trace := _trace(phase, arm, _offset(i, len(arms))))]
    if not data:
        return None
    band = {"type": "rect", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": -phase.min_effect}
    band |= {"y1": phase.min_effect, "fillcolor": "var(--band)", "line": {"width": 0}, "layer": "below"}
    layout = {
        "height": 360,
        "margin": {"l": 8, "r": 16, "t": 40, "b": 46},
        "xaxis": {
            "title": {"text": "seeds at the look"},
            "tickvals": list(range(len(phase.looks))),
            "ticktext": [str(look.seeds) for look in phase.looks],
            "range": [-0.5, len(phase.looks) - 0.5],
            "showgrid": False,
        },
        "yaxis": {
            "title": {"text": f"{label(phase.metric.name, 40)} against the baseline"},
            "zeroline": True,
            "automargin": True,
        },
        "shapes": [band] if phase.min_effect else [],
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "meta": {"kind": "looks"},
    }
    return {"data": data, "layout": layout}


def _offset(index: int, n: int) -> float:
    return WIDTH * ((index + 0.5) / n - 0.5)


def _trace(phase: PhaseSummary, arm: ArmSummary, offset: float) -> Figure | None:
    rows = [
        (i + offset, look.seeds, row, row.delta)
        for i, look in enumerate(phase.looks)
        for row in look.arms
        if row.arm == arm.arm and row.delta is not None
    ]
    if not rows:
        return None
    color = f"var(--{verdict_slug(arm.verdict)})"
    final, (_, _, last, _) = marker(arm.verdict, 10), rows[-1]
    is_decided = [row.decision is not None for _, _, row, _ in rows]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label(f"{arm.arm}: {last.decision or 'open'}", 60),
        "x": [x for x, _, _, _ in rows],
        "y": [delta for _, _, _, delta in rows],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [(row.ci_high or delta) - delta for _, _, row, delta in rows],
            "arrayminus": [delta - (row.ci_low or delta) for _, _, row, delta in rows],
            "color": color,
            "thickness": 1.5,
            "width": 0,
        },
        "line": {"color": color, "width": 1},
        "marker": final
        | {
            "size": [10 if decided else 5 for decided in is_decided],
            "symbol": [final["symbol"] if decided else "circle" for decided in is_decided],
        },
        "hovertext": [f"{label(arm.arm)}<br>{label(_hover(seeds, row))}" for _, seeds, row, _ in rows],
        "hoverinfo": "text",
    }


def _hover(seeds: int, row: ArmLook) -> str:
    interval = f"[{fmt.signed(row.ci_low)}, {fmt.signed(row.ci_high)}]"
    return f"{seeds} seeds: {fmt.signed(row.delta)} {interval}, {row.decision or 'open'}"
