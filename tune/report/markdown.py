"""The report as Markdown, for a pull request: what the page says, without its plots.

Names and errors are text from outside; `cell` takes the markup out of them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tune import format as fmt
from tune.report.phase_graph import handovers
from tune.report.wording import CLAIMS_NOTE, cost_facts, fact, importance_rows, moment, next_step, troubles, went_wrong

Summary = Mapping[str, Any]

# Markdown that can start something inside a line; an underscore between letters cannot.
_MARKDOWN = re.compile(r"[\\`*\[\]~|$]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def render_markdown(summary: Summary) -> str:
    """The same content without the plots, as GitHub-flavoured Markdown."""
    parts = [_markdown_answer(summary), *_markdown_handovers(summary)]
    parts += [_markdown_phase(phase) for phase in summary.get("phases") or []]
    parts += [claims_markdown(summary)] if summary.get("claims") else []
    parts += [_markdown_problems(summary), _markdown_cost(summary), _markdown_sources(summary), _markdown_glossary()]
    return "\n\n".join(parts) + "\n"


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
        arm = f"arm {fmt.plain(answer['winner'])} of phase {fmt.plain(answer.get('phase'))}"
        facts.append(("Winner", f"{fmt.settings(answer.get('overrides'), 'as it is')} ({arm})"))
    if answer.get("delta"):
        facts += [
            ("Effect", f"{fmt.effect(answer['delta'])}, Holm p {fmt.p_value(answer['delta'].get('p_holm'))}"),
            ("Ties with it", fmt.listing(fmt.tied(fmt.answer_phase(summary) or {})) or "no other arm"),
            ("Fresh seeds", "confirmed" if answer.get("confirmed") else "not confirmed yet"),
        ]
    facts += [("Cost", fmt.cost(summary))]
    lines = [f"# {cell(summary.get('campaign'))}", f"**{cell(answer.get('sentence') or 'There is no answer yet.')}**"]
    lines.append("\n".join(f"- {name}: {cell(text)}" for name, text in facts if text))
    lines[-1] += f"\n- Next: {next_step(summary)}"
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
    if shares := importance_rows(phase):
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
        rows = [problem | {"error": went_wrong(problem)} for problem in problems]
        parts.append(_table(names, [[row.get(name) for name in names] for row in rows]))
    else:
        parts.append("Every trial that has run ended with a finite loss.")
    found = troubles(summary)
    return "\n\n".join(parts + (["\n".join(f"- {cell(text)}" for text in found)] if found else []))


def _markdown_cost(summary: Summary) -> str:
    return "## What it cost\n\n" + "\n".join(f"- {name}: {cell(text)}" for name, text in cost_facts(summary).items())


def _markdown_sources(summary: Summary) -> str:
    facts = [("command", summary.get("command")), ("started", moment(summary.get("started_at") or ""))]
    known = {**(summary.get("environment") or {}), **(summary.get("data") or {})}
    facts += [(name, item) for name, item in known.items() if item != {}]
    table = _table(("what", "value"), [(name.replace("_", " "), fact(item)) for name, item in facts])
    return f"## Where the numbers come from\n\n{table}"


def _markdown_glossary() -> str:
    lines = "\n".join(f"- **{verdict}**: {meaning}" for verdict, meaning in fmt.VERDICTS.items())
    return f"## How to read this\n\n{lines}"
