"""Renders the report as Markdown: the same content as the HTML page, without its plots.

Names and errors are untrusted text; `cell` escapes their markup.
"""

import re
from collections.abc import Iterable, Sequence

from tune import format as fmt
from tune.report import wording
from tune.report.next_step import confirm_phase, next_step
from tune.report.phase_graph import handovers
from tune.storage.summaries import CampaignSummary, PhaseSummary

# Inline Markdown characters; an underscore between letters or digits is not markup.
_MARKDOWN = re.compile(r"[\\`*\[\]~|$]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def render_markdown(summary: CampaignSummary) -> str:
    """Renders the report as GitHub-flavoured Markdown."""
    edges = [f"- {cell(edge.target)} starts from {cell(edge.text())}" for edge in handovers(summary.phases)]
    parts = [_answer(summary), *(["## What the phases handed on", "\n".join(edges)] if edges else [])]
    parts += map(_phase, summary.phases)
    parts += [claims_markdown(summary)] if summary.claims else []
    parts += [_problems(summary), "## What it cost\n\n" + _list(wording.cost_facts(summary).items()), _sources(summary)]
    parts += ["## How to read this", glossary(wording.VERDICTS)]
    return "\n\n".join(parts) + "\n"


def cell(text: object) -> str:
    """Returns untrusted text on one line with Markdown and HTML escaped, also for use inside a table."""
    escaped = "".join(_ENTITIES.get(char, char) for char in fmt.plain(fmt.MISSING if text is None else text))
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", escaped) or fmt.MISSING


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> str:
    """Returns a Markdown table of untrusted text; the columns named in `right` are right-aligned."""
    lines = [header, ["---:" if name in right else "---" for name in header]]
    lines += [[cell(item) for item in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _answer(summary: CampaignSummary) -> str:
    answer = summary.answer
    facts = [("Question", summary.description or "")]
    if answer.winner:
        arm = f"arm {fmt.plain(answer.winner)} of phase {fmt.plain(answer.phase)}"
        facts.append(("Winner", f"{fmt.settings(answer.overrides, 'as it is')} ({arm})"))
    if answer.delta:
        ties = summary.answer_phase.ties if summary.answer_phase else []
        facts += [
            ("Effect", f"{wording.effect(answer.delta)}, Holm p {fmt.p_value(answer.delta.p_holm)}"),
            ("After allowing for selection", wording.selection(answer.shrunken)),
            ("Not distinguishable from it", fmt.listing(map(fmt.plain, ties)) or "no other arm"),
            ("Fresh seeds", "confirmed" if answer.confirmed else "not confirmed yet"),
        ]
    facts += [("Cost", wording.cost(summary))]
    listed = _list((name, text) for name, text in facts if text)
    listed += f"\n- Next: {next_step(summary)}"
    yaml = confirm_phase(summary)
    listed += f"\n\n```yaml\n{yaml}\n```" if yaml else ""
    heading = [f"# {cell(summary.title)}", f"**{cell(answer.sentence)}**"]
    return "\n\n".join([*heading, listed, *map(_warning, summary.own_warnings)])


def _list(facts: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {cell(text)}" for name, text in facts)


def _warning(text: str) -> str:
    return f"> Warning: {cell(fmt.sentence(text))}"


def _phase(phase: PhaseSummary) -> str:
    header = ("#", "arm", "settings", "n", cell(phase.metric.name), "against the baseline", "Holm p", "verdict")
    rows = [
        (
            arm.rank,
            arm.arm,
            fmt.settings(arm.overrides, "as it is"),
            arm.n,
            wording.mean_interval(arm.score),
            wording.effect(arm.delta),
            fmt.p_value(arm.delta.p_holm if arm.delta else None),
            wording.verdict(arm),
            fmt.count(arm.tokens_per_second),
            fmt.number(arm.val_bpb),
        )
        for arm in phase.arms
    ]
    counts = f"{wording.trial_counts(phase.trials)}, {wording.seed_counts(phase)}"
    base = f"Base: {cell(fmt.settings(phase.base, 'as it is'))}."
    inherit = f" It starts from the winner of {cell(phase.inherit)}." if phase.inherit else ""
    parts = [
        f"## {cell(phase.phase)}",
        cell(fmt.sentence(phase.why)),
        f"{counts}. {base}{inherit}",
        markdown_table((*header, "tok/s", "bits/byte"), rows, right=("#", "n", "Holm p", "tok/s", "bits/byte")),
        f"Mean over n seeds ± half of its {wording.interval_name(phase.confidence)}. {cell(wording.noise(phase))}",
    ]
    if metrics := wording.metric_table(phase):
        measured = [(name, *texts) for name, texts in metrics.rows]
        parts += [markdown_table(("arm", *map(cell, metrics.names)), measured), cell(metrics.note)]
    if rounds := wording.rounds(phase):
        decisions = "\n".join(f"- {cell(line)}" for line in rounds.decisions)
        parts += [f"{cell(rounds.saving)} {cell(rounds.note)}", decisions]
    if table := wording.importance_table(phase):
        listed = fmt.listing(f"{cell(name)} {share}" for name, share, _ in table.rows)
        parts.append(f"{cell(table.note)} {listed}.")
    return "\n\n".join([*parts, *map(_warning, phase.warnings)])


def claims_markdown(summary: CampaignSummary) -> str:
    """Renders the claims of a campaign: a table, the trials behind each claim, and a glossary."""
    claims = summary.claims
    header = ("claim", "source", "what was said", "verdict", "observed", "n", "why")
    values = [fmt.claim_value(claim.observed, claim.ci_low, claim.ci_high) for claim in claims]
    rows = [
        (c.id, c.source, c.says, c.verdict_at_scale, value, c.n, c.why) for c, value in zip(claims, values, strict=True)
    ]
    counts = wording.claim_counts(claim.verdict for claim in claims)
    parts = ["## Claims", f"{counts}.", markdown_table(header, rows, right=("n",))]
    trials = [f"- {cell(claim.id)}: {cell(', '.join(claim.trials))}" for claim in claims if claim.trials]
    parts += ["Trials that they rest on:", "\n".join(trials)] if trials else []
    return "\n\n".join([*parts, glossary(wording.CLAIM_VERDICTS), wording.CLAIMS_NOTE])


def glossary(meanings: dict[str, str]) -> str:
    """Returns a Markdown list of words with their meanings."""
    return "\n".join(f"- **{word}**: {meaning}" for word, meaning in meanings.items())


def _problems(summary: CampaignSummary) -> str:
    text = "Every trial that has run ended with a finite loss."
    if summary.problems:
        header = ("phase", "arm", "seed", "status", "error", "trial_id")
        rows = [
            (p.phase, p.arm, p.seed, p.status, "the same" if i else wording.went_wrong(p), p.trial_id)
            for group in wording.problem_groups(summary)
            for i, p in enumerate(group)
        ]
        text = markdown_table(header, rows)
    listed = "\n".join(f"- {cell(text)}" for text in wording.troubles(summary))
    return "\n\n".join(["## What went wrong", text, *([listed] if listed else [])])


def _sources(summary: CampaignSummary) -> str:
    known = {"command": summary.command, "started": wording.moment(summary.started_at)}
    facts = [*known.items(), *{**summary.environment, **summary.data}.items()]
    rows = [(name.replace("_", " "), wording.fact(item)) for name, item in facts if item != {}]
    return f"## Where the numbers come from\n\n{markdown_table(('what', 'value'), rows)}"
