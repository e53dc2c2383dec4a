"""The last screen of a campaign: each phase as a table, the claims, then the answer and what to do next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import ROUNDED, Box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from tune import format as fmt
from tune.report.wording import next_step
from tune.terminal.live import Portable, words

VERDICT_STYLES = {
    "baseline": "bold",
    "better": "bold bright_blue",
    "worse": "yellow",
    "tie": "dim",
    "no claim": "dim",
    "incomplete": "dim",
    "diverged": "magenta",
    "failed": "bold red",
}
CLAIM_STYLES = {"reproduced": "bold bright_blue", "refuted": "yellow"}
MOST_ARMS = 12  # the last screen shows this many of a phase; the report has all

GAP = 2  # between two columns
NARROW = 16  # where names would get less than this, intervals stand on a line of their own
SPEED_WIDTH, PICTURE_WIDTH = 7, 13  # one more column, and the least that a picture of the intervals needs
RULED = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one rule under the header, nothing else


def phase_table(phase: Mapping[str, Any], *, width: int = 100) -> Table:
    """The arms of a phase, ranked. A wider terminal also gets the speed, then a picture of the intervals."""
    arms, left_out = _shown(phase.get("arms") or [])
    header = ["n", fmt.plain((phase.get("metric") or {}).get("name") or "val_loss"), "against the baseline", "verdict"]
    rows = [_figures(arm) for arm in arms]
    if width - _width(header, *rows) < NARROW:
        header[2] = header[2].replace(" ", "\n", 1)
        rows = [[text.replace(" \u00b1", "\n\u00b1").replace(" [", "\n[") for text in row] for row in rows]
    name_width, speed, picture = _layout(arms, width - _width(header, *rows))
    table = Table(
        box=RULED, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", border_style="dim"
    )
    table.add_column("arm", max_width=name_width, overflow="fold")
    for name in header:
        table.add_column(Text(name), justify="right" if name == "n" else "left", no_wrap=True)
    if speed:
        table.add_column("tok/s", justify="right", no_wrap=True)
    if picture:
        table.add_column(_axis(phase, arms, picture), no_wrap=True)
    for arm, row, marks in zip(arms, rows, fmt.forest(arms, picture), strict=True):
        winner, style = arm["arm"] == phase.get("winner"), VERDICT_STYLES.get(arm.get("verdict") or "", "")
        cells = [words(arm["arm"], "bold" if winner else ""), *map(Text, row[:-1]), Text(row[-1], style)]
        cells += [Text(fmt.count(arm.get("tokens_per_second")))] if speed else []
        table.add_row(*cells, *([_picture(marks, style)] if picture else []))
    if left_out:
        table.caption, table.caption_justify = Text(f"… and {left_out} more in the report", style="dim"), "left"
    return table


def _figures(arm: Mapping[str, Any]) -> list[str]:
    """What every table says of an arm beside its name."""
    verdict = fmt.plain(arm.get("verdict") or fmt.MISSING)
    return [str(arm.get("n", fmt.MISSING)), fmt.mean_interval(arm.get("score")), fmt.effect(arm.get("delta")), verdict]


def _width(*rows: list[str]) -> int:
    """Of the columns of these rows, each with the gap before it."""
    columns = zip(*rows, strict=True)
    return sum(GAP + max(len(line) for text in column for line in text.split("\n")) for column in columns)


def _layout(arms: list[dict[str, Any]], room: int) -> tuple[int, bool, int]:
    """Width of the names, whether there is room for the speed, and the width of the picture (0 for none)."""
    names = [fmt.plain(arm["arm"]) for arm in arms]
    longest = max(map(len, names), default=0)
    words_of = [word for name in names for word in name.split()]  # names wrap at spaces
    least = max(min(max(map(len, words_of), default=0), 24), min(longest, NARROW))
    speed = room - SPEED_WIDTH >= least
    room -= SPEED_WIDTH * speed
    if room - PICTURE_WIDTH - 2 < least:
        return max(room, 10), speed, 0
    picture = max(PICTURE_WIDTH, min(33, room - 2 - min(longest, 36)))
    return room - 2 - picture, speed, picture


def _shown(arms: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The best arms and the baseline, wherever it ranks."""
    kept = [arm for n, arm in enumerate(arms) if n < MOST_ARMS or arm.get("verdict") == "baseline"]
    return kept, len(arms) - len(kept)


def _picture(marks: str, style: str) -> Text:
    text = Text(marks, style=style)
    text.highlight_regex("│", "not bold bright_black")  # the baseline's zero, the same in every row
    return text


def _axis(phase: Mapping[str, Any], arms: list[dict[str, Any]], width: int) -> str:
    """The header of the picture: a word on the side that is better."""
    low, high = fmt.span(arms)
    if (phase.get("metric") or {}).get("goal") == "maximize":
        return "→ better".rjust(width) if high > 0 else ""
    return "better ←" if low < 0 else ""


def final_screen(summary: Mapping[str, Any], *, report: Path) -> RenderableType:
    """The last screen of a campaign: each phase with its table and its why, then the answer and what to do next."""
    return Portable(lambda width: _final(summary, report, width))


def _final(summary: Mapping[str, Any], report: Path, width: int) -> RenderableType:
    width = min(width, 132)  # beyond this a line is hard to follow
    parts: list[RenderableType] = []
    for phase in summary.get("phases") or []:
        parts += [Text(), _phase_heading(phase), Padding(phase_table(phase, width=width - 2), (0, 0, 1, 2))]
        remarks = [words(fmt.sentence(phase.get("why")), "italic"), words(fmt.noise(phase), "dim")]
        remarks += [words(f"Warning: {fmt.sentence(warning)}", "yellow") for warning in phase.get("warnings") or []]
        parts += [Padding(remark, (0, 0, 0, 2)) for remark in remarks if remark.plain]
    if claims := summary.get("claims"):
        parts += [Text(), _claims_heading(claims), Padding(claims_table(claims, width=width - 2), (0, 0, 0, 2))]
    return Group(*parts, Text(), _answer_panel(summary, report, width))


def _claims_heading(claims: Sequence[Mapping[str, Any]]) -> Text:
    return words("claims", "bold").append(f"   {fmt.claim_counts(claims)}", style="dim not bold")


def claims_table(claims: Sequence[Mapping[str, Any]], *, width: int = 100) -> Table:
    """The ledger, a line for each claim; what a narrow terminal leaves out is in the report."""
    table = Table(
        box=RULED, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", border_style="dim"
    )
    names = [fmt.shorten(fmt.plain(claim.get("id") or fmt.MISSING), 20) for claim in claims]
    values = [fmt.claim_value(claim) for claim in claims]
    room = width - max(len("claim"), *map(len, names)) - max(len("observed"), *map(len, values)) - len("reproduced") - 6
    table.add_column("claim", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if room >= 0:
        table.add_column("observed", no_wrap=True)
    if room >= 12:
        table.add_column("what was said", no_wrap=True, overflow="ellipsis", max_width=room)
    for claim, name, value in zip(claims, names, values, strict=True):
        verdict = claim.get("verdict") or fmt.MISSING
        cells = [words(name), words(verdict, CLAIM_STYLES.get(verdict, "dim"))]
        cells += [Text(value)] if room >= 0 else []
        table.add_row(*cells, *([words(claim.get("says") or "")] if room >= 12 else []))
    return table


def _phase_heading(phase: Mapping[str, Any]) -> Text:
    seeds = len(phase.get("seeds") or [])
    heading = Text().append_text(words(phase.get("phase"), "bold"))
    facts = [fmt.trial_counts(phase.get("trials")), f"{seeds} seed{'' if seeds == 1 else 's'}"]
    facts += [f"on top of {phase['inherit']}"] if phase.get("inherit") else []
    return heading.append("   ").append_text(words(" · ".join(facts), "dim not bold"))


def _answer_panel(summary: Mapping[str, Any], report: Path, width: int) -> Panel:
    answer = summary.get("answer") or {}
    rows = Table.grid(Column(style="dim", no_wrap=True), Column(ratio=1, overflow="fold"), padding=(0, 2, 0, 0))
    if answer.get("overrides"):
        rows.add_row("winner", words(fmt.settings(answer["overrides"]), "bold bright_blue"))
    if answer.get("winner"):
        arm = Text().append_text(words(answer["winner"]))
        arm.append("  ").append_text(words(f"in phase {answer.get('phase')}", "dim"))
        rows.add_row("arm" if answer.get("overrides") else "winner", arm)
    if answer.get("delta"):
        rows.add_row("effect", Text(fmt.effect(answer["delta"])))
        rows.add_row("fresh seeds", Text("confirmed" if answer.get("confirmed") else "not confirmed yet"))
    if ties := fmt.tied(fmt.answer_phase(summary) or {}):
        rows.add_row("ties with", words(fmt.listing(ties)))
    rows.add_row("cost", Text(fmt.cost(summary)))
    for warning in fmt.own_warnings(summary):
        rows.add_row("warning", words(warning, "yellow"))
    if problems := summary.get("problems"):
        rows.add_row(
            "problems",
            Text(f"{fmt.counted(len(problems), 'trial')} failed or diverged; the report says why", "magenta"),
        )
    rows.add_row("report", words(report))
    rows.add_row("next", Text(next_step(summary)))
    sentence = words(answer.get("sentence") or "There is no answer yet.", "bold")
    title = Text().append_text(words(summary.get("campaign"), "bold"))
    title.append("  ").append_text(words(summary.get("status") or "", "dim"))
    return Panel(
        Group(sentence, Text(), rows), title=title, title_align="left", box=ROUNDED, padding=(1, 2), width=width
    )
