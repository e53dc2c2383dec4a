"""Writes the report of a campaign as `report.html`, one page that works offline, and as `report.md`.

Both start with the answer, followed by the phases, problems and provenance. Names and errors are untrusted text: jinja2
escapes them, and `_finalize` strips their control characters.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from ngpt.system.atomic_files import write_atomic
from tune import format as fmt
from tune.report import figures, wording
from tune.report.explorer import Details, Logs, explore, flops_per_token
from tune.report.look_figure import look_figure
from tune.report.markdown import render_markdown
from tune.report.next_step import confirm_phase, next_step
from tune.report.phase_graph import inheritance_graph
from tune.report.sweep_figures import MAX_BARS, parallel_figure, speed_figure, speed_half_widths
from tune.report.trial_logs import DETAILS, CurveRow, curves_by_arm
from tune.storage.summaries import RUNNING, CampaignSummary, PhaseSummary

Curves = Iterable[CurveRow]

PAGE = Path(__file__).parent / "page"  # the scripts
SCRIPTS = ("data.js", "figures.js", "differences.js", "trials.js", "details.js")  # one script element, in this order
FORMATS = ("sentence", "p_value", "number", "count", "counted", "duration", "claim_value")  # filters of the template


class Live(NamedTuple):
    """What makes a page that is served follow its campaign."""

    version: str  # changes with what the page shows
    poll: str  # the address that tells the newest version
    home: str | None = None  # the path of the page of all campaigns, if there is one


def write_report(folder: Path, summary: CampaignSummary, curves: Curves, details: Details | None = None) -> None:
    """Writes `report.md` and `report.html` into `folder`, each atomically."""
    write_atomic(folder / "report.md", render_markdown(summary))
    write_atomic(folder / "report.html", render_html(summary, curves, details))


def render_html(
    summary: CampaignSummary, curves: Curves, details: Details | None = None, *, live: Live | None = None
) -> str:
    """Renders a self-contained page whose Content-Security-Policy forbids all requests.

    Args:
        summary: the campaign.
        curves: the logged rows of its trials, as in `curves.parquet`.
        details: of its trials. Without them the page has neither a table of trials nor error bars on speed.
        live: makes it a page of `serve`, which takes plotly from there and follows the campaign.
    """
    details = details or Details()
    logs = curves_by_arm(curves, (*details.metrics[: figures.MAX_CURVE_METRICS], *DETAILS))
    explored = explore(summary, logs, details)
    plots, specs = _plots(summary, logs, details, explored["phases"])
    has_plotly = live is None and bool(specs or explored["trials"])
    theme_js = page_text("theme.js")
    page_js = "\n".join(map(page_text, SCRIPTS))
    if live:  # in a function, which the page runs again for new data
        page_js = f"(() => {{\n{page_js}\n}})();"
    digests = [script_digest(script) for script in (theme_js, page_js)] + ([_packed_plotly()[1]] if has_plotly else [])
    sources = [f"'sha256-{digest}'" for digest in digests] + (["'self'"] if live else [])
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            ties=fmt.listing(map(fmt.plain, summary.answer_phase.ties)) if summary.answer_phase else "",
            plots=plots,
            graph=inheritance_graph(summary.phases),
            words=wording,
            explored=explored,
            is_running=summary.status == RUNNING,
            next_step=next_step(summary),
            confirm_phase=escape(confirm_phase(summary)),  # markup, whose lines stay as they are
            figures_json=Markup(_script_json(specs)),
            explored_json=Markup(_script_json(explored)),
            script_sources=Markup(" ".join(sources)),
            plotly_gz=Markup(_packed_plotly()[0] if has_plotly else ""),
            theme_js=Markup(theme_js),
            page_js=Markup(page_js),
            live=live,
        )
    )


def page_text(name: str) -> str:
    """Returns a script of the pages."""
    return (PAGE / name).read_text(encoding="utf-8").strip()


def script_digest(script: str) -> str:
    """Returns the digest by which a Content-Security-Policy allows a script, or a style, on a page."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _packed_plotly() -> tuple[str, str]:
    """Returns plotly compressed, in base64, and the digest of its source, which the page unpacks and runs.

    The source has 4.8 MB, its compressed form 2.0 MB.
    """
    source = get_plotlyjs()
    packed = gzip.compress(source.encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode(), script_digest(source)


def page_environment() -> jinja2.Environment:
    """Returns the templates of the pages, with filters that format numbers and escape names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "slug": figures.verdict_slug, "setting": fmt.value, "trace": _trace}
    for module, names in {fmt: FORMATS, wording: ("fact", "moment", "effect", "trace_of")}.items():
        environment.filters |= {name: getattr(module, name) for name in names}
    return environment


def _finalize(item: Any) -> Any:
    """Formats a value of the template: a dash for None, other values without control characters."""
    if isinstance(item, Markup):
        return item
    return fmt.MISSING if item is None else fmt.plain(item)


def _code(text: str) -> Markup:
    """Escapes `text` and marks up parts between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(Markup.escape(text))))


def _trace(text: str) -> Markup:
    """Escapes a traceback line by line, and keeps its indentation."""
    lines = (line[: len(line) - len(line.lstrip(" "))] + str(escape(fmt.plain(line))) for line in text.splitlines())
    return Markup("\n".join(lines))


def _plots(
    summary: CampaignSummary, logs: Logs, details: Details, explored: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[figures.Figure]]:
    """Returns, per phase, the index of each plot in the figure list and its caption; and the figure list.

    The curves of each metric get their figure and their captions, in the `explored` phase.
    """
    flops = flops_per_token(details.records)
    plots, specs = [], []
    for phase, shown in zip(summary.phases, explored, strict=True):
        of_arms = {arm: number for (name, arm), number in flops.items() if name == phase.phase}
        own = [record for record in details.records if record.phase == phase.phase]
        bars = speed_half_widths(own, phase.confidence)
        curves = figures.curve_figures(phase, logs, figures.curve_metrics(phase, logs), of_arms)
        axes = _axes(list(curves.values()))
        compared = [curve["differences"] for curve in shown["curves"]]
        drawn = {
            "effect": figures.effect_figure(phase),
            "curves": next(iter(curves.values()), None),
            "speed": speed_figure(phase, bars),
            "parallel": parallel_figure(phase),
            "looks": look_figure(phase),
        }
        plot: dict[str, Any] = {
            "effect_note": _effect_note(phase),
            "speed_note": _speed_note(phase, bars),
            "importance": wording.importance_table(phase),
            "axes": axes,
            "baselines": sorted({number for found in compared if found for number in found["baselines"]}),
        }
        for name, figure in drawn.items():
            plot[name] = len(specs) if figure else None
            specs += [figure] if figure else []
        for curve, (metric, figure) in zip(shown["curves"], curves.items(), strict=True):
            figure["layout"]["meta"]["axis"] = next(iter(axes))
            if figure is not drawn["curves"]:
                specs.append(figure)
            curve["figure"] = plot["curves"] if figure is drawn["curves"] else len(specs) - 1
            curve["note"] = _curve_note(phase, metric, curve["goal"], axes, logs)
            curve["differences_note"] = wording.differences_note(phase, metric, curve["goal"], curve["differences"])
        plots.append(plot)
    return plots, specs


def _axes(curves: Sequence[figures.Figure]) -> dict[str, str]:
    """Returns what all curves can be drawn over, by name in the page's script; the first is drawn at first."""
    if not curves:
        return {}
    metas = [trace["meta"] for figure in curves for trace in figure["data"]]
    has_tokens = all(figure["layout"]["meta"]["over"] != "steps" for figure in curves)
    axes = {"tokens": "training tokens"} if has_tokens else {}
    axes["steps"] = "steps"
    for name, text in {"seconds": "seconds of training", "elapsed": "seconds since the start"}.items():
        axes |= {name: text} if all(name in meta for meta in metas) else {}
    has_flops = all(isinstance(meta["flops"], list) or (has_tokens and meta["flops"]) for meta in metas)
    return axes | ({"flops": "FLOPs"} if has_flops else {})


def _effect_note(phase: PhaseSummary) -> str:
    interval = wording.interval_name(phase.confidence)
    note = f"Dots are means over the seeds, each line is the {interval}, zero is the baseline."
    if not _has_intervals(phase):
        note = "Dots are differences without an interval, so chance alone may explain them. Zero is the baseline."
    if phase.min_effect:
        note += f" Inside the shaded band (less than {phase.min_effect:g}) a difference is too small to matter."
    more = len(phase.arms) - figures.MAX_EFFECTS
    return note + (f" The {more} last-ranked arms are in the table only." if more > 1 else "")


def _has_intervals(phase: PhaseSummary) -> bool:
    return any(arm.delta and arm.delta.ci_low is not None for arm in phase.arms)


def _speed_note(phase: PhaseSummary, bars: Mapping[str, float]) -> str:
    note = "Right is faster."
    if len(phase.arms) <= MAX_BARS:
        note += " Numbers are ranks in the table."
        if _has_intervals(phase):
            note += f" Bars are {wording.interval_name(phase.confidence)}s of the difference from the baseline"
            note += ", and of the mean speed of an arm's trials." if bars else "."
    return f"{note} Speed excludes compilation and warm-up."


def _curve_note(phase: PhaseSummary, metric: str, goal: str | None, axes: Iterable[str], logs: Logs) -> str:
    note = "Mean over the seeds of an arm"
    note += ": validation with markers, training thin; " if metric == "val_loss" else f"; {wording.direction(goal)}; "
    note += f"the shade spans the seeds of the baseline and the best {figures.MAX_BANDS}."
    if len(phase.arms) > figures.SERIES_COLORS + 1:
        note += f" Grey: arms beyond the best {figures.SERIES_COLORS} and the baseline."
    drawn = figures.curve_arms(phase)
    if len(drawn) < len(phase.arms):
        note += f" Only the best {figures.MAX_CURVES} arms and the baseline have curves here."
    logged = max((len(set(log.steps)) for arm in drawn for log in logs.get((phase.phase, arm.arm), ())), default=0)
    if logged > (most := figures.points_per_curve(len(drawn))):
        note += f" Thinned: a curve has at most {most} of its up to {logged:,} logged steps, equally spaced."
    known = figures.recorded_axes(phase, logs)
    computed = {"seconds": "Seconds of training are tokens over the mean speed so far", "flops": "FLOPs are computed"}
    texts = [text for axis, text in computed.items() if axis in axes and axis not in known]
    if texts:
        note += f" {' and '.join(texts)}, because not every trial here has recorded them."
    return f"{note} Click a name to hide its curve."


def _script_json(data: Any) -> str:
    """Returns JSON whose text cannot close the script element around it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
