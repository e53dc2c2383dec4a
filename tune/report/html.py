"""Writes the report of a campaign as `report.html`, one page that works offline, and as `report.md`.

Both start with the answer, followed by the phases, problems and provenance. Names and errors are untrusted text: jinja2
escapes them, and `_finalize` strips their control characters.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ngpt.system.atomic_files import write_atomic
from tune import format as fmt
from tune.report import figures, wording
from tune.report.look_figure import look_figure
from tune.report.markdown import render_markdown
from tune.report.phase_graph import inheritance_graph
from tune.report.sweep_figures import MAX_BARS, parallel_figure, speed_figure
from tune.storage.summaries import CampaignSummary, PhaseSummary

Curves = Iterable[figures.CurveRow]

FORMATS = ("sentence", "p_value", "number", "count", "counted", "claim_value")  # filters of the template


def write_report(folder: Path, summary: CampaignSummary, curves: Curves) -> None:
    """Writes `report.md` and `report.html` into `folder`, each atomically."""
    write_atomic(folder / "report.md", render_markdown(summary))
    write_atomic(folder / "report.html", render_html(summary, curves))


def render_html(summary: CampaignSummary, curves: Curves) -> str:
    """Renders a self-contained page whose Content-Security-Policy forbids all requests."""
    plots, specs = _plots(summary.phases, curves)
    environment = _environment()
    page_js = (Path(__file__).parent / "report.js.j2").read_text(encoding="utf-8").strip()
    plotly_js = get_plotlyjs() if specs else ""
    digests = [hashlib.sha256(script.encode()).digest() for script in (page_js, plotly_js) if script]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    return environment.get_template("report.html.j2").render(
        summary=summary,
        ties=fmt.listing(map(fmt.plain, summary.answer_phase.ties)) if summary.answer_phase else "",
        plots=plots,
        graph=inheritance_graph(summary.phases),
        words=wording,
        figures_json=Markup(_script_json(specs)),
        script_hashes=Markup(" ".join(hashes)),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "slug": figures.verdict_slug, "setting": fmt.value}
    for module, names in {fmt: FORMATS, wording: ("fact", "moment", "effect")}.items():
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


def _plots(phases: Sequence[PhaseSummary], curves: Curves) -> tuple[list[dict[str, Any]], list[figures.Figure]]:
    """Returns, per phase, the index of each plot in the figure list and its caption; and the figure list."""
    curves_by_arm = figures.curves_by_arm(curves)
    plots, specs = [], []
    for phase in phases:
        drawn = {
            "effect": figures.effect_figure(phase),
            "curves": figures.curve_figure(phase, curves_by_arm),
            "speed": speed_figure(phase),
            "parallel": parallel_figure(phase),
            "looks": look_figure(phase),
        }
        plot: dict[str, Any] = {
            "effect_note": _effect_note(phase),
            "curve_note": _curve_note(phase),
            "speed_note": _speed_note(phase),
            "importance": wording.importance_table(phase),
            "over": drawn["curves"]["layout"]["meta"]["over"] if drawn["curves"] else None,
        }
        for name, figure in drawn.items():
            plot[name] = len(specs) if figure else None
            specs += [figure] if figure else []
        plots.append(plot)
    return plots, specs


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


def _speed_note(phase: PhaseSummary) -> str:
    note = "Right is faster."
    if len(phase.arms) <= MAX_BARS:
        note += " Numbers are ranks in the table."
        if _has_intervals(phase):
            note += f" Bars are {wording.interval_name(phase.confidence)}s of the difference from the baseline."
    return f"{note} Speed excludes compilation and warm-up."


def _curve_note(phase: PhaseSummary) -> str:
    note = "Mean over the seeds of an arm: validation with markers, training thin; "
    note += f"the shade spans the seeds of the baseline and the best {figures.MAX_BANDS}."
    if len(phase.arms) > figures.SERIES_COLORS + 1:
        note += f" Grey: arms beyond the best {figures.SERIES_COLORS} and the baseline."
    return f"{note} Click a name to hide its curve."


def _script_json(data: Any) -> str:
    """Returns JSON whose text cannot close the script element around it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
