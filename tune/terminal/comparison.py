"""A comparison of two results directories for the terminal: facts that differ, then a row for each arm."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from tune import format as fmt
from tune.terminal.final_screen import RULED
from tune.terminal.live import Portable, words

WIDEST = 120  # beyond this a line is hard to follow
STYLES = {"B better": "bold bright_blue", "A better": "yellow", "identical in every trial": "bold"}
SECTIONS = {"environment": "Environment", "code": "Trials", "data": "Data", "base": "Base settings"}


def comparison_view(comparison: Mapping[str, Any]) -> RenderableType:
    """The text of `compare`, for 80 to 120 columns."""
    return Portable(lambda width: _view(comparison, min(width, WIDEST)))


def _view(comparison: Mapping[str, Any], width: int) -> RenderableType:
    a, b = comparison["a"], comparison["b"]
    head = Table(Column("", style="dim"), *_sides(), box=RULED, width=width)
    for name in ("results", "campaign", "status", "started_at", "workers"):
        left, right = (_minute(side[name]) if name == "started_at" else _fact(side[name]) for side in (a, b))
        head.add_row(name.replace("_", " "), words(left), words(right))
    same = []
    for key, title in SECTIONS.items():
        if not comparison[key]:
            same.append(title.lower())
            continue
        head.add_row(Text(title, style="bold"), "", "")
        for name, (left, right) in comparison[key].items():
            head.add_row(f"  {fmt.plain(name)}", words(_fact(left)), words(_fact(right)))
    parts: list[RenderableType] = [head]
    parts += [words(f"The same in both: {fmt.listing(same)}.", "dim")] if same else []
    parts += [Text(), _arms(comparison, width)] if comparison["arms"] else []
    parts += [Padding(words(remark), (1, 0, 0, 0)) for remark in _remarks(comparison)]
    return Group(*parts)


def _sides() -> list[Column]:
    return [Column("A", ratio=1, overflow="fold"), Column("B", ratio=1, overflow="fold")]


def _fact(item: Any) -> str:
    """A value; hashes are cut, since their first digits tell them apart."""
    text = fmt.MISSING if item is None else fmt.value(item)
    return text[:12] if len(text) in (40, 64) and not set(text) - set("0123456789abcdef") else text


def _minute(time: str) -> str:
    return f"{time[:16].replace('T', ' ')} UTC"


def _arms(comparison: Mapping[str, Any], width: int) -> Table:
    name = comparison["metric"]["name"]
    table = Table(box=RULED, width=width, padding=(0, 1, 0, 0))
    table.add_column("arm", ratio=1, overflow="fold")
    table.add_column("n", justify="right")
    table.add_column(f"A {name}", justify="right")
    table.add_column("B \u2212 A", no_wrap=True)
    table.add_column("Holm p", justify="right")
    table.add_column("tok/s", justify="right")
    table.add_column("verdict", max_width=13)
    for row in comparison["arms"]:
        delta, ratio = row["delta"] or {}, row["tokens_per_second"]["ratio"]
        verdict = row["verdict"]
        table.add_row(
            words(_name(row)),
            _seeds(row),
            fmt.number(row["score"]["a"]),
            "0" if row["identical"] and delta else fmt.effect(delta).replace(" [", "\n["),
            fmt.p_value(None if row["identical"] else delta.get("p_holm")),
            fmt.MISSING if ratio is None else f"{ratio:.2f}x",
            Text(verdict, style=STYLES.get(verdict, "")),
        )
    return table


def _name(row: Mapping[str, Any]) -> str:
    """The names of the arm: one if both call it the same."""
    a, b = row["a"][0], row["b"][0]
    return a if a == b else f"{a} = {b}"


def _seeds(row: Mapping[str, Any]) -> str:
    return str(row["n"]["a"]) if row["paired"] else f"{row['n']['a']}+{row['n']['b']}"


def _remarks(comparison: Mapping[str, Any]) -> Iterable[str]:
    rows = comparison["arms"]
    if not rows:
        yield "No arm of A has the settings of an arm of B: nothing to compare."
    elif all(row["identical"] for row in rows):
        trials = sum(len(row["seeds"]) for row in rows)
        size = f"{fmt.counted(len(rows), 'arm')}, {fmt.counted(trials, 'trial')}"
        yield f"Identical in every trial: {size}, equal in every digit."
    else:
        name, goal = comparison["metric"]["name"], comparison["metric"]["goal"]
        counts = [row["verdict"] for row in rows]
        told = fmt.listing(f"{counts.count(verdict)} {verdict}" for verdict in dict.fromkeys(counts))
        yield f"{fmt.counted(len(rows), 'arm')} compared by {name} ({goal}): {told}."
        pairs = f"B \u2212 A with {fmt.interval_name(comparison)}, paired over shared seeds"
        yield f"{pairs} (n+n: no seed is shared); an effect below {comparison['min_effect']:g} is a tie."
    for side, key in (("A", "only_a"), ("B", "only_b")):
        if comparison[key]:
            yield f"Only in {side}: {fmt.listing((names[0] for names in comparison[key]), most=8)}."
    if comparison["throughput_note"]:
        yield f"{comparison['throughput_note']}."
