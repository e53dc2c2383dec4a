"""The report of a campaign, twice: `report.html`, one page that works offline, and `report.md` for a repository.

Both say the answer first, then each phase, then what went wrong and where the numbers come from. Names and errors are
text from outside: jinja2 escapes them in the page, and `finalize` strips their control characters. The Markdown is in
tune/report/markdown.py.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ngpt.system.atomic_files import write_atomic
from tune import format as fmt
from tune.report import figures
from tune.report.markdown import render_markdown
from tune.report.phase_graph import inheritance_graph
from tune.report.sweep_figures import MOST_BARS, parallel_figure, speed_figure
from tune.report.wording import (
    CLAIMS_NOTE,
    cost_facts,
    fact,
    importance_rows,
    is_named,
    moment,
    next_step,
    troubles,
    varied,
    went_wrong,
)

Summary = Mapping[str, Any]
Curves = Iterable[Mapping[str, Any]]


def write_report(folder: Path, summary: Summary, curves: Curves) -> None:
    """Writes `report.md` and `report.html` into `folder`, each replaced as a whole."""
    write_atomic(folder / "report.md", render_markdown(summary))
    write_atomic(folder / "report.html", render_html(summary, curves))


def render_html(summary: Summary, curves: Curves) -> str:
    """One page with everything inlined: no request leaves it, and its policy forbids any."""
    plots, specs = _plots(summary.get("phases") or [], curves)
    environment = _environment()
    page_js = (Path(__file__).parent / "report.js.j2").read_text(encoding="utf-8").strip()
    plotly_js = get_plotlyjs() if specs else ""
    hashes = [_script_hash(script) for script in (page_js, plotly_js) if script]
    answer = summary.get("answer") or {}
    return environment.get_template("report.html.j2").render(
        summary=summary,
        answer=answer,
        phases=summary.get("phases") or [],
        metric=(summary.get("metric") or {}).get("name") or "val_loss",
        ties=fmt.listing(fmt.tied(fmt.answer_phase(summary) or {})),
        plots=plots,
        graph=inheritance_graph(summary.get("phases") or []),
        costs=cost_facts(summary),
        troubles=troubles(summary),
        verdicts=fmt.VERDICTS,
        claims=summary.get("claims") or [],
        claim_verdicts=fmt.CLAIM_VERDICTS,
        claims_note=CLAIMS_NOTE,
        figures_json=Markup(_script_json(specs)),
        script_hashes=Markup(" ".join(hashes)),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[[Any], Any]] = {
        "code": _code,
        "slug": figures.verdict_slug,
        "setting": fmt.value,
        "fact": fact,
        "moment": moment,
        "sentence": fmt.sentence,
        "effect": fmt.effect,
        "mean_interval": fmt.mean_interval,
        "p_value": fmt.p_value,
        "number": fmt.number,
        "count": fmt.count,
        "cost": fmt.cost,
        "noise": fmt.noise,
        "interval_name": fmt.interval_name,
        "trial_counts": fmt.trial_counts,
        "next_step": next_step,
        "own_warnings": fmt.own_warnings,
        "named": is_named,
        "varied": varied,
        "went_wrong": went_wrong,
        "claim_value": fmt.claim_value,
        "claim_counts": fmt.claim_counts,
        "winning_arm": fmt.winning_arm,
    }
    environment.filters |= {name: _absent_as_none(function) for name, function in filters.items()}
    return environment


def _absent_as_none(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A summary may leave a field out; for people that is the same as a null."""
    return lambda item: function(None if isinstance(item, jinja2.Undefined) else item)


def _finalize(item: Any) -> Any:
    """What the template writes for a value: a dash for nothing, text without control characters."""
    if isinstance(item, Markup):
        return item
    return fmt.MISSING if item is None or isinstance(item, jinja2.Undefined) else fmt.plain(item)


def _code(text: str) -> Markup:
    """Our own words, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(Markup.escape(text))))


def _plots(phases: Sequence[Summary], curves: Curves) -> tuple[list[dict[str, Any]], list[figures.Figure]]:
    """Where each phase's plots stand in the list of all figures, with the words below them."""
    rows = figures.curves_by_arm(curves)
    plots: list[dict[str, Any]] = []
    specs: list[figures.Figure] = []
    for phase in phases:
        place: dict[str, Any] = {"effect_note": _effect_note(phase), "curve_note": _curve_note(phase)}
        place["speed_note"] = _speed_note(phase)
        drawn = {
            "effect": figures.effect_figure(phase),
            "curves": figures.curve_figure(phase, rows),
            "speed": speed_figure(phase),
            "parallel": parallel_figure(phase),
        }
        place["importance"] = importance_rows(phase)
        for name, figure in drawn.items():
            place[name] = len(specs) if figure else None
            specs += [figure] if figure else []
        place["over"] = drawn["curves"]["layout"]["meta"]["over"] if drawn["curves"] else None
        plots.append(place)
    return plots, specs


def _effect_note(phase: Summary) -> str:
    least = phase.get("min_effect")
    note = f"Dots are means over the seeds, each line is the {fmt.interval_name(phase)}, zero is the baseline."
    if not _has_intervals(phase):
        note = (
            "Dots are differences without an interval: nothing says how much of them is chance. Zero is the baseline."
        )
    if least:
        note += f" Inside the shaded band (less than {least:g}) a difference is too small to matter."
    more = len(phase.get("arms") or []) - figures.MOST_EFFECTS
    return note + (f" The {more} last-ranked arms are in the table only." if more > 1 else "")


def _has_intervals(phase: Summary) -> bool:
    return any((arm.get("delta") or {}).get("ci_low") is not None for arm in phase.get("arms") or [])


def _speed_note(phase: Summary) -> str:
    """What stands beside the points: nothing where there are too many of them."""
    told = ["Right is faster."]
    if len(phase.get("arms") or []) <= MOST_BARS:
        told.append("Numbers are ranks in the table.")
        if _has_intervals(phase):
            told.append(f"Bars are {fmt.interval_name(phase)}s of the difference from the baseline.")
    return " ".join([*told, "Speed leaves out compilation and warm-up."])


def _curve_note(phase: Summary) -> str:
    note = "Mean over the seeds of an arm: validation with markers, training thin; "
    note += f"the shade spans the seeds of the baseline and the best {figures.MOST_BANDS}."
    if len(phase.get("arms") or []) > figures.SERIES_COLORS + 1:
        note += f" Grey: arms beyond the best {figures.SERIES_COLORS} and the baseline."
    return f"{note} A click on a name hides its curve."


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _script_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
