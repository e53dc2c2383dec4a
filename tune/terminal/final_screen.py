"""Final screen of a campaign: a table per phase, the claims, then the answer and the next step."""

from collections.abc import Sequence

from rich.box import ROUNDED, Box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from tune import format as fmt
from tune.report.next_step import confirm_phase, next_step
from tune.report.wording import (
    claim_counts,
    cost,
    effect,
    mean_interval,
    noise,
    problem_groups,
    rounds,
    seed_counts,
    selection,
    trial_counts,
    verdict,
    went_wrong,
)
from tune.storage.summaries import ArmSummary, CampaignSummary, ClaimResult, PhaseSummary
from tune.terminal.live import Portable, words

VERDICT_STYLES = {
    "baseline": "bold",
    "better": "bold bright_blue",
    "worse": "yellow",
    "equivalent": "bright_cyan",
    "undecided": "dim",
    "no claim": "dim",
    "incomplete": "dim",
    "diverged": "magenta",
    "failed": "bold red",
}
CLAIM_STYLES = {"reproduced": "bold bright_blue", "refuted": "yellow"}
MAX_ARMS = 12  # rows of a phase table; the report lists all arms
MAX_WIDTH = 132  # longer lines are hard to follow
MOST_REASONS = 3  # of trials that failed; the report has all
GAP = 2  # between two columns
MIN_NAME_WIDTH = 16  # if less is left for the names, intervals move to a second line
SPEED_WIDTH = 7  # of the speed column
MIN_PLOT_WIDTH = 13  # of the interval plot
RULED = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one rule under the header, nothing else


def final_screen(summary: CampaignSummary, *, report: object) -> RenderableType:
    """Returns the final screen of a campaign, which names the path or address `report`."""
    return Portable(lambda width: _screen(summary, report, min(width, MAX_WIDTH)))


def _screen(summary: CampaignSummary, report: object, width: int) -> RenderableType:
    parts: list[RenderableType] = []
    for phase in summary.phases:
        facts = [trial_counts(phase.trials), seed_counts(phase)]
        facts += [f"on top of {phase.inherit}"] if phase.inherit else []
        heading = words(phase.phase, "bold").append("   ").append_text(words(" · ".join(facts), "dim not bold"))
        parts += [Text(), heading, Padding(phase_table(phase, width=width - 2), (0, 0, 1, 2))]
        remarks = [words(fmt.sentence(phase.why), "italic"), words(noise(phase), "dim")]
        if in_rounds := rounds(phase):
            remarks += [
                words(in_rounds.saving, "dim"),
                *(words(line, "dim") for line in in_rounds.decisions[:MAX_ARMS]),
            ]
        remarks += [words(f"Warning: {fmt.sentence(warning)}", "yellow") for warning in phase.warnings]
        parts += [Padding(remark, (0, 0, 0, 2)) for remark in remarks if remark.plain]
    if summary.claims:
        counts = claim_counts(claim.verdict for claim in summary.claims)
        scales = dict.fromkeys(claim.scale for claim in summary.claims if claim.scale)
        counts += f", at {fmt.listing(scales, most=1)}" if scales else ""
        heading = words("claims", "bold").append(f"   {counts}", style="dim not bold")
        parts += [Text(), heading, Padding(claims_table(summary.claims, width=width - 2), (0, 0, 0, 2))]
    yaml = confirm_phase(summary)  # outside of the panel, whose border would be pasted too
    paste = [Text(), Text(yaml, no_wrap=True, overflow="ignore")] if yaml else []
    return Group(*parts, Text(), _answer_panel(summary, report, width), *paste)


def phase_table(phase: PhaseSummary, *, width: int = 100) -> Table:
    """Returns the ranked arms of a phase; wider terminals add speeds, then a plot of the intervals."""
    arms = [arm for n, arm in enumerate(phase.arms) if n < MAX_ARMS or arm.verdict == "baseline"]
    header, rows, (name_width, has_speed, plot_width) = _fit(phase.metric.name, arms, width)
    table = _plain_table()
    table.add_column("arm", max_width=name_width, overflow="fold")
    for name in header:
        table.add_column(Text(name), justify="right" if name == "n" else "left", no_wrap=True)
    if has_speed:
        table.add_column("tok/s", justify="right", no_wrap=True)
    if plot_width:
        low, high = _span(arms)
        is_up = phase.metric.goal == "maximize"
        word, is_shown = ("→ better".rjust(plot_width), high > 0) if is_up else ("better ←", low < 0)
        table.add_column(word if is_shown else "", no_wrap=True)
    for arm, row, marks in zip(arms, rows, forest(arms, plot_width), strict=True):
        style = VERDICT_STYLES.get(arm.verdict, "")
        cells = [words(arm.arm, "bold" if arm.arm == phase.winner else ""), *map(Text, row[:-1]), Text(row[-1], style)]
        cells += [Text(fmt.count(arm.tokens_per_second))] if has_speed else []
        if plot_width:
            cells.append(Text(marks, style))
            cells[-1].highlight_regex("│", "not bold bright_black")  # the zero line of the baseline
        table.add_row(*cells)
    if len(arms) < len(phase.arms):
        table.caption = Text(f"… and {len(phase.arms) - len(arms)} more in the report", style="dim")
        table.caption_justify = "left"
    return table


def _fit(
    metric: str, arms: Sequence[ArmSummary], width: int
) -> tuple[list[str], list[list[str]], tuple[int, bool, int]]:
    """Returns header and rows of the columns after the name, as long as there is room for, and their `_layout`."""
    header = ["n", fmt.plain(metric), "against the baseline", "verdict"]
    rows = [[str(arm.n), mean_interval(arm.score), effect(arm.delta), fmt.plain(arm.verdict)] for arm in arms]
    if width - _width(header, *rows) < MIN_NAME_WIDTH:
        header[2] = header[2].replace(" ", "\n", 1)
        rows = [[text.replace(" \u00b1", "\n\u00b1").replace(" [", "\n[") for text in row] for row in rows]
    layout = _layout(arms, width - _width(header, *rows))
    long = [[*row[:-1], fmt.plain(verdict(arm))] for arm, row in zip(arms, rows, strict=True)]
    long_layout = _layout(arms, width - _width(header, *long))
    costs_a_column = long_layout[1:] < (layout[1], min(layout[2], 1))
    longest = max((len(fmt.plain(arm.arm)) for arm in arms), default=0)
    if costs_a_column or long_layout[0] < min(layout[0], longest, MIN_NAME_WIDTH):
        return header, rows, layout
    return header, long, long_layout


def _plain_table() -> Table:
    return Table(
        box=RULED, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", border_style="dim"
    )


def _width(*rows: Sequence[str]) -> int:
    """Returns the total width of the columns of `rows`, gaps included."""
    columns = zip(*rows, strict=True)
    return sum(GAP + max(len(line) for text in column for line in text.split("\n")) for column in columns)


def _layout(arms: Sequence[ArmSummary], room: int) -> tuple[int, bool, int]:
    """Returns the width of the names, whether the speed fits, and the width of the interval plot (0 for none)."""
    names = [fmt.plain(arm.arm) for arm in arms]
    longest = max(map(len, names), default=0)
    longest_word = max((len(word) for name in names for word in name.split()), default=0)  # names wrap at spaces
    needed = max(min(longest_word, 24), min(longest, MIN_NAME_WIDTH))
    has_speed = room - SPEED_WIDTH >= needed
    room -= SPEED_WIDTH if has_speed else 0
    if room - MIN_PLOT_WIDTH - GAP < needed:
        return max(room, 10), has_speed, 0
    plot_width = max(MIN_PLOT_WIDTH, min(33, room - GAP - min(longest, 36)))
    return room - GAP - plot_width, has_speed, plot_width


def _span(arms: Sequence[ArmSummary]) -> tuple[float, float]:
    """Returns the range of all intervals against the baseline, including zero."""
    deltas = [arm.delta for arm in arms if arm.delta]
    ends = [end for delta in deltas for end in (delta.mean, delta.ci_low, delta.ci_high) if end is not None]
    return min([0.0, *ends]), max([0.0, *ends])


def forest(arms: Sequence[ArmSummary], width: int) -> list[str]:
    """Draws the intervals of all arms as text on a common scale: `──●──  │`, where the bar is the baseline."""
    low, high = _span(arms)
    if width < 2 or low == high:
        return [" " * width] * len(arms)

    def place(x: float) -> int:
        return round((x - low) / (high - low) * (width - 1))

    rows = []
    for arm in arms:
        row, delta = [" "] * width, arm.delta
        if delta and delta.ci_low is not None and delta.ci_high is not None:
            first, last = place(delta.ci_low), place(delta.ci_high)
            row[first : last + 1] = "─" * (last + 1 - first)
        row[place(0)] = "│"
        if delta or arm.verdict == "baseline":
            row[place(delta.mean if delta else 0)] = "●"
        rows.append("".join(row))
    return rows


def claims_table(claims: Sequence[ClaimResult], *, width: int = 100) -> Table:
    """Returns a row per claim; narrow terminals omit columns, which the report has."""
    table = _plain_table()
    names = [fmt.shorten(fmt.plain(claim.id), 20) for claim in claims]
    values = [fmt.claim_value(claim.observed, claim.ci_low, claim.ci_high) for claim in claims]
    room = width - max(len("claim"), *map(len, names)) - max(len("observed"), *map(len, values)) - len("reproduced") - 6
    n_columns = 4 if room >= 12 else 3 if room >= 0 else 2
    for name in ("claim", "verdict", "observed")[:n_columns]:
        table.add_column(name, no_wrap=True)
    if n_columns == 4:
        table.add_column("what was said", no_wrap=True, overflow="ellipsis", max_width=room)
    for claim, name, value in zip(claims, names, values, strict=True):
        table.add_row(
            *[
                words(name),
                words(claim.verdict, CLAIM_STYLES.get(claim.verdict, "dim")),
                Text(value),
                words(claim.says or ""),
            ][:n_columns]
        )
    return table


def _answer_panel(summary: CampaignSummary, report: object, width: int) -> Panel:
    answer, phase = summary.answer, summary.answer_phase
    rows = Table.grid(Column(style="dim", no_wrap=True), Column(ratio=1, overflow="fold"), padding=(0, 2, 0, 0))
    if answer.overrides:
        rows.add_row("winner", words(fmt.settings(answer.overrides), "bold bright_blue"))
    if answer.winner:
        arm = words(answer.winner).append("  ").append_text(words(f"in phase {answer.phase}", "dim"))
        rows.add_row("arm" if answer.overrides else "winner", arm)
    if answer.delta:
        rows.add_row("effect", Text(effect(answer.delta)))
        if answer.shrunken is not None:
            rows.add_row("selection", Text(selection(answer.shrunken)))
        rows.add_row("fresh seeds", Text("confirmed" if answer.confirmed else "not confirmed yet"))
    if phase and phase.ties:
        rows.add_row("not distinguishable", words(fmt.listing(map(fmt.plain, phase.ties))))
    rows.add_row("cost", Text(cost(summary)))
    for warning in summary.own_warnings:
        rows.add_row("warning", words(warning, "yellow"))
    if summary.problems:
        text = f"{fmt.counted(len(summary.problems), 'trial')} failed or diverged; see the report"
        rows.add_row("problems", Text(text, "magenta"))
        for group in problem_groups(summary)[:MOST_REASONS]:
            rows.add_row("", words(f"{fmt.counted(len(group), 'trial')}: {went_wrong(group[0])}", "magenta"))
    rows.add_row("report", words(report))
    rows.add_row("next", Text(next_step(summary)))
    title = words(summary.title, "bold").append("  ").append_text(words(summary.status, "dim"))
    content = Group(words(answer.sentence, "bold"), Text(), rows)
    return Panel(content, title=title, title_align="left", box=ROUNDED, padding=(1, 2), width=width)
