"""The report of a campaign, twice: `report.html`, one page that works offline, and `report.md` for a repository.

Both say the answer first, then each phase, then what went wrong and where the numbers come from. Names and errors are
text from outside: jinja2 escapes them in the page (and `finalize` strips their control characters), `cell` in Markdown.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ngpt.durable import write_atomic
from tune import figures
from tune import format as fmt
from tune.costs import cost_facts, troubles
from tune.graph import handovers, inheritance_graph
from tune.importance import importance
from tune.sweep_figures import parallel_figure, speed_figure

Summary = Mapping[str, Any]
Curves = Iterable[Mapping[str, Any]]

# Markdown that can start something inside a line; an underscore between letters cannot.
_MARKDOWN = re.compile(r"[\\`*\[\]~|$]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


CLAIMS_NOTE = (
    "A claim is judged at the confidence of the campaign, by paired differences over the seeds. Claims are not "
    "corrected against each other: at 95 %, up to one in forty of those that are wrong is reproduced by luck."
)


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


def render_markdown(summary: Summary) -> str:
    """The same content without the plots, as GitHub-flavoured Markdown."""
    parts = [_markdown_answer(summary), *_markdown_handovers(summary)]
    parts += [_markdown_phase(phase) for phase in summary.get("phases") or []]
    parts += [claims_markdown(summary)] if summary.get("claims") else []
    parts += [_markdown_problems(summary), _markdown_cost(summary), _markdown_sources(summary), _markdown_glossary()]
    return "\n\n".join(parts) + "\n"


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
        "fact": _fact,
        "join_settings": lambda values: ", ".join(map(fmt.value, values or ())),
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
        "next_step": fmt.next_step,
        "own_warnings": fmt.own_warnings,
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


def _fact(item: Any) -> str:
    """A value of the environment or the data: whole numbers with separators."""
    if item is None:
        return fmt.MISSING
    return f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else fmt.value(item)


def moment(text: str) -> str:
    """`2026-01-14 09:12 UTC` for an ISO time; anything else as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _plots(phases: Sequence[Summary], curves: Curves) -> tuple[list[dict[str, Any]], list[figures.Figure]]:
    """Where each phase's plots stand in the list of all figures, with the words below them."""
    rows = figures.curves_by_arm(curves)
    plots: list[dict[str, Any]] = []
    specs: list[figures.Figure] = []
    for phase in phases:
        place: dict[str, Any] = {"effect_note": _effect_note(phase), "curve_note": _curve_note(phase)}
        drawn = {
            "effect": figures.effect_figure(phase),
            "curves": figures.curve_figure(phase, rows),
            "speed": speed_figure(phase),
            "parallel": parallel_figure(phase),
        }
        place["importance"] = _importance_rows(phase)
        for name, figure in drawn.items():
            place[name] = len(specs) if figure else None
            specs += [figure] if figure else []
        place["over"] = drawn["curves"]["layout"]["meta"]["over"] if drawn["curves"] else None
        plots.append(place)
    return plots, specs


def _importance_rows(phase: Summary) -> dict[str, Any] | None:
    """The table of axis importance, the same for the page and for Markdown."""
    found = importance(phase)
    if found is None:
        return None
    rows = [(name, f"{share:.0%}", round(100 * share)) for name, share in found.shares.items()]
    if found.rest is not None:
        rows.append(("interactions and chance", f"{found.rest:.0%}", round(100 * found.rest)))
    metric = (phase.get("metric") or {}).get("name") or "val_loss"
    note = f"Share of the variance of {metric} over {found.arms} arms that each setting explains: {found.method}."
    return {"rows": rows, "note": note}


def _effect_note(phase: Summary) -> str:
    least = phase.get("min_effect")
    note = f"Dots are means over the seeds, each line is the {fmt.interval_name(phase)}, zero is the baseline."
    if least:
        note += f" Inside the shaded band (less than {least:g}) a difference is too small to matter."
    more = len(phase.get("arms") or []) - figures.MOST_EFFECTS
    return note + (f" The {more} last-ranked arms are in the table only." if more > 1 else "")


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


def cell(text: object) -> str:
    """Untrusted text for Markdown, also inside a table: no markup, no HTML, one line."""
    escaped = "".join(_ENTITIES.get(char, char) for char in fmt.plain(fmt.MISSING if text is None else text))
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", escaped) or fmt.MISSING


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> str:
    numbers = set(right)
    lines = [header, ["---:" if name in numbers else "---" for name in header]]
    lines += [[cell(item) for item in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_answer(summary: Summary) -> str:
    answer = summary.get("answer") or {}
    facts = [("Question", summary.get("description"))]
    if answer.get("winner"):
        facts += [("Winner", answer["winner"]), ("Settings", fmt.settings(answer.get("overrides"), "as it is"))]
    if answer.get("delta"):
        facts += [
            ("Effect", f"{fmt.effect(answer['delta'])}, p {fmt.p_value(answer['delta'].get('p'))}"),
            ("Ties with it", fmt.listing(fmt.tied(fmt.answer_phase(summary) or {})) or "no other arm"),
            ("Fresh seeds", "confirmed" if answer.get("confirmed") else "not confirmed yet"),
        ]
    facts += [("Cost", fmt.cost(summary))]
    lines = [f"# {cell(summary.get('campaign'))}", f"**{cell(answer.get('sentence') or 'There is no answer yet.')}**"]
    lines.append("\n".join(f"- {name}: {cell(text)}" for name, text in facts if text))
    lines[-1] += f"\n- Next: {fmt.next_step(summary)}"
    return "\n\n".join(lines + [f"> Warning: {cell(fmt.sentence(text))}" for text in fmt.own_warnings(summary)])


def _markdown_phase(phase: Summary) -> str:
    name = (phase.get("metric") or {}).get("name") or "val_loss"
    header = [
        "#",
        "arm",
        "settings",
        "n",
        cell(name),
        "against the baseline",
        "Holm p",
        "verdict",
        "tok/s",
        "bits/byte",
    ]
    rows = [
        (
            arm.get("rank"),
            arm["arm"],
            fmt.settings(arm.get("overrides"), "as it is"),
            arm.get("n"),
            fmt.mean_interval(arm.get("score")),
            fmt.effect(arm.get("delta")),
            fmt.p_value((arm.get("delta") or {}).get("p_holm")),
            arm.get("verdict"),
            fmt.count(arm.get("tokens_per_second")),
            fmt.number(arm.get("val_bpb")),
        )
        for arm in phase.get("arms") or []
    ]
    seeds = len(phase.get("seeds") or [])
    counts = f"{fmt.trial_counts(phase.get('trials'))}, {seeds} seed{'' if seeds == 1 else 's'}"
    base = f"Base: {cell(fmt.settings(phase.get('base'), 'as it is'))}."
    inherit = f" It starts from the winner of {cell(phase['inherit'])}." if phase.get("inherit") else ""
    lines = [f"## {cell(phase.get('phase'))}", cell(fmt.sentence(phase.get("why"))), f"{counts}. {base}{inherit}"]
    lines.append(_table(header, rows, right=("#", "n", "Holm p", "tok/s", "bits/byte")))
    lines.append(f"Mean over n seeds ± half of its {fmt.interval_name(phase)}. {cell(fmt.noise(phase))}")
    if shares := _importance_rows(phase):
        listed = fmt.listing(f"{cell(name)} {share}" for name, share, _ in shares["rows"])
        lines.append(f"{cell(shares['note'])} {listed}.")
    return "\n\n".join(lines + [f"> Warning: {cell(fmt.sentence(text))}" for text in phase.get("warnings") or []])


def _markdown_handovers(summary: Summary) -> list[str]:
    given = handovers(summary.get("phases") or [])
    lines = "\n".join(f"- {cell(edge.target)} starts from {cell(edge.text())}" for edge in given)
    return [f"## What the phases handed on\n\n{lines}"] if given else []


def claims_markdown(summary: Summary) -> str:
    """The claims ledger of a campaign's summary: a table, the trials that each claim rests on, and how to read it."""
    claims = summary.get("claims") or []
    if not claims:
        return "## Claims\n\nThe campaign names no claims."
    header = ("claim", "source", "what was said", "verdict", "observed", "n", "why")
    rows = [
        (
            claim.get("id"),
            claim.get("source"),
            claim.get("says"),
            claim.get("verdict"),
            fmt.claim_value(claim),
            claim.get("n"),
            claim.get("why"),
        )
        for claim in claims
    ]
    trials = [
        f"- {cell(claim.get('id'))}: {cell(', '.join(claim['trials']))}" for claim in claims if claim.get("trials")
    ]
    parts = ["## Claims", f"{fmt.claim_counts(claims)}.", _table(header, rows, right=("n",))]
    parts += ["Trials that they rest on:\n\n" + "\n".join(trials)] if trials else []
    meanings = (f"- **{verdict}**: {meaning}" for verdict, meaning in fmt.CLAIM_VERDICTS.items())
    return "\n\n".join([*parts, "\n".join(meanings), CLAIMS_NOTE])


def _markdown_problems(summary: Summary) -> str:
    problems = summary.get("problems") or []
    parts = ["## What went wrong"]
    if problems:
        names = ("phase", "arm", "seed", "status", "error", "trial_id")
        parts.append(_table(names, [[problem.get(name) for name in names] for problem in problems]))
    else:
        parts.append("Every trial that has run ended with a finite loss.")
    found = troubles(summary)
    return "\n\n".join(parts + (["\n".join(f"- {cell(text)}" for text in found)] if found else []))


def _markdown_cost(summary: Summary) -> str:
    return "## What it cost\n\n" + "\n".join(f"- {name}: {cell(text)}" for name, text in cost_facts(summary).items())


def _markdown_sources(summary: Summary) -> str:
    facts = [("command", summary.get("command")), ("started", moment(summary.get("started_at") or ""))]
    facts += [*(summary.get("environment") or {}).items(), *(summary.get("data") or {}).items()]
    table = _table(("what", "value"), [(name.replace("_", " "), _fact(item)) for name, item in facts])
    return f"## Where the numbers come from\n\n{table}"


def _markdown_glossary() -> str:
    lines = "\n".join(f"- **{verdict}**: {meaning}" for verdict, meaning in fmt.VERDICTS.items())
    return f"## How to read this\n\n{lines}"
