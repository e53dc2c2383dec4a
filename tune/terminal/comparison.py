"""Terminal view of `compare`: what differs between the two directories, then a row for each arm."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from tune import format as fmt
from tune.report.wording import effect, interval_name
from tune.results.compare import IDENTICAL, Comparison, EffectComparison
from tune.terminal.final_screen import RULED, VERDICT_STYLES
from tune.terminal.live import Portable, words

MAX_WIDTH = 120  # longer lines are hard to follow
STYLES = {"B better": "bold bright_blue", "A better": "yellow", IDENTICAL: "bold"}


def comparison_view(comparison: Comparison) -> RenderableType:
    """Returns the view, laid out for 80 to 120 columns."""
    return Portable(lambda width: _view(comparison, min(width, MAX_WIDTH)))


def _view(comparison: Comparison, width: int) -> RenderableType:
    a, b = comparison.a, comparison.b
    sides = [Column(name, ratio=1, overflow="fold") for name in "AB"]
    table = Table(Column("", style="dim"), *sides, box=RULED, width=width)
    for name in ("results", "campaign", "status", "workers"):
        table.add_row(name, *(words(_fact(side[name])) for side in (a, b)))
    table.add_row("started at", *(words(f"{side['started_at'][:16].replace('T', ' ')} UTC") for side in (a, b)))
    sections = {
        "Environment": comparison.environment,
        "Trials": comparison.code,
        "Data": comparison.data,
        "Base settings": comparison.base,
    }
    for title, differing in sections.items():
        if differing:
            table.add_row(Text(title, style="bold"), "", "")
        for name, (left, right) in differing.items():
            table.add_row(Text(f"  {fmt.plain(name)}"), words(_fact(left)), words(_fact(right)))
    parts: list[RenderableType] = [table]
    if same := [title.lower() for title, differing in sections.items() if not differing]:
        parts.append(words(f"The same in both: {fmt.listing(same)}.", "dim"))
    if comparison.arms:
        parts += [Text(), _arm_table(comparison, width)]
    parts += [Constrain(Padding(words(remark), (1, 0, 0, 0)), width) for remark in _remarks(comparison)]
    return Group(*parts)


def effects_view(comparison: EffectComparison) -> RenderableType:
    """Returns the view of effects matched by name."""
    return Portable(lambda width: _effects_view(comparison, min(width, MAX_WIDTH)))


def _effects_view(comparison: EffectComparison, width: int) -> RenderableType:
    table = Table(box=RULED, width=width, padding=(0, 1, 0, 0))
    table.add_column("arm", ratio=1, overflow="fold")
    for side in "AB":
        table.add_column(f"n {side}", justify="right")
        table.add_column(f"effect in {side}", no_wrap=True)
    for arm in comparison.arms:
        cells: list[Text] = []
        for each in (arm.a, arm.b):
            text = Text(effect(each.delta).replace(" [", "\n[") + "\n" if each.delta else "")
            cells += [Text(str(each.n)), text.append(each.verdict, VERDICT_STYLES.get(each.verdict, ""))]
        table.add_row(words(arm.name), *cells)
    remarks = [f"{name}: {side['results']}" for name, side in (("A", comparison.a), ("B", comparison.b))]
    metric = comparison.metric
    remarks.append(
        f"{metric.name} ({metric.goal}) against the baseline of the same phase. Arms are matched by phase and name."
        if comparison.arms
        else "No arm of A has the phase and name of an arm of B."
    )
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            remarks.append(f"Only in {side}: {fmt.listing(names, most=8)}.")
    remarks += [f"Note: {fmt.sentence(note)}" for note in comparison.notes]
    parts: list[RenderableType] = [table] if comparison.arms else []
    return Group(*parts, *(Constrain(Padding(words(remark), (1, 0, 0, 0)), width) for remark in remarks))


def _fact(item: Any) -> str:
    """Formats a value; hashes are cut to 12 digits."""
    text = fmt.MISSING if item is None else fmt.value(item)
    return text[:12] if len(text) in (40, 64) and not set(text) - set("0123456789abcdef") else text


def _arm_table(comparison: Comparison, width: int) -> Table:
    table = Table(box=RULED, width=width, padding=(0, 1, 0, 0))
    table.add_column("arm", ratio=1, overflow="fold")
    for name in ("n", f"A {comparison.metric.name}", "B \u2212 A", "Holm p", "tok/s"):
        is_interval = name == "B \u2212 A"
        table.add_column(words(name), justify="left" if is_interval else "right", no_wrap=is_interval)
    table.add_column("verdict", max_width=13)
    for arm in comparison.arms:
        name = arm.a[0] if arm.a[0] == arm.b[0] else f"{arm.a[0]} = {arm.b[0]}"
        is_same, ratio = arm.identical and arm.delta is not None, arm.tokens_per_second.ratio
        table.add_row(
            words(name),
            str(arm.n.a) if arm.paired else f"{arm.n.a}+{arm.n.b}",
            fmt.number(arm.score.a),
            "0" if is_same else effect(arm.delta).replace(" [", "\n["),
            fmt.p_value(None if arm.identical or arm.delta is None else arm.delta.p_holm),
            fmt.MISSING if ratio is None else f"{ratio:.2f}x",
            Text(arm.verdict, style=STYLES.get(arm.verdict, "")),
        )
    return table


def _remarks(comparison: Comparison) -> Iterator[str]:
    arms = comparison.arms
    if not arms:
        yield "No arm of A has the settings of an arm of B: nothing to compare."
    elif all(arm.identical for arm in arms):
        trials = sum(len(arm.seeds) for arm in arms)
        size = f"{fmt.counted(len(arms), 'arm')}, {fmt.counted(trials, 'trial')}"
        yield f"Identical in every trial: {size}, equal in every digit."
    else:
        counts = fmt.listing(f"{n} {verdict}" for verdict, n in Counter(arm.verdict for arm in arms).items())
        metric = comparison.metric
        yield f"{fmt.counted(len(arms), 'arm')} compared by {metric.name} ({metric.goal}): {counts}."
        interval = interval_name(comparison.confidence)
        yield (
            f"B \u2212 A with its {interval}, paired over shared seeds (n+n: no shared seeds). "
            f"`equivalent` means an interval within \u00b1{comparison.min_effect:g}."
        )
    for side, arm_names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if arm_names:
            yield f"Only in {side}: {fmt.listing((names[0] for names in arm_names), most=8)}."
    if comparison.throughput_note:
        yield f"{comparison.throughput_note}."
