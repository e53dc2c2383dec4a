"""The text of a comparison: it fits, says what differs, and nothing in it is markup."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tune.results.compare import ArmComparison, Comparison, Sides, Throughput
from tune.storage.summaries import Delta, Objective
from tune.terminal.comparison import comparison_view


def row(name: str = "alpha/alpha=0.05", **more: Any) -> ArmComparison:
    own = ArmComparison(
        a=[name],
        b=[name],
        seeds=[1, 2, 3],
        paired=True,
        n=Sides(3, 3),
        score=Sides(4.5, 4.48),
        delta=Delta(-0.02, -0.03, -0.01, 0.001, 0.002),
        identical=False,
        lost=[],
        tokens_per_second=Throughput(1e4, 1.5e4, 1.5),
        verdict="B better",
    )
    return replace(own, **more)


def comparison(*rows: ArmComparison) -> Comparison:
    started_at = "2026-11-21T06:10:33.669+00:00"
    side = {"results": "results/x", "status": "finished", "started_at": started_at, "campaign": "x", "workers": 2}
    return Comparison(
        a=side,
        b=side | {"campaign": "y"},
        metric=Objective(),
        confidence=0.95,
        min_effect=0.005,
        environment={"git_commit": ["0a" * 20, "1b" * 20]},
        data={},
        base={"optim.lr": [0.1, None]},
        code={},
        arms=rows,
        only_a=[],
        only_b=[["p/q", "r/s"]],
        throughput_note=None,
    )


def text(found: Comparison, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width, highlight=False).print(comparison_view(found))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_or_120_columns(width: int) -> None:
    long = "projection/project_every=10, alpha_kind=vector, model.residual=slerp, optim.lr=0.0003"
    lines = text(comparison(row(), row(long, b=["other/name"])), width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= min(width, 120)


def test_it_says_what_differs_and_what_is_the_same() -> None:
    shown = text(comparison(row()))
    assert "0a0a0a0a0a0a " in shown and "1b1b1b1b1b1b " in shown and "0a0a0a0a0a0a0a" not in shown
    assert "optim.lr" in shown and "The same in both: trials and data." in shown
    assert "Only in B: p/q." in shown


def test_a_row_has_the_difference_its_interval_and_the_ratio() -> None:
    shown = text(comparison(row()))
    for words in ("4.5000", "\u22120.0200", "[\u22120.0300, \u22120.0100]", "0.002", "1.50x", "B better"):
        assert words in shown


def test_exact_equality_is_said_once_for_all_or_for_each_arm() -> None:
    same = row(identical=True, verdict="identical in every trial", delta=Delta(0.0, p_holm=1.0))
    assert "Identical in every trial: 2 arms, 6 trials, equal in every digit." in text(comparison(same, same))
    assert "2 arms compared by val_loss (minimize): 1 identical in every trial and 1 B better." in " ".join(
        text(comparison(same, row())).split()
    )


def test_one_arm_is_not_called_several() -> None:
    same = row(identical=True, verdict="identical in every trial", delta=Delta(0.0, p_holm=1.0), seeds=[1])
    assert "Identical in every trial: 1 arm, 1 trial, equal in every digit." in text(comparison(same))
    assert "1 arm compared by val_loss (minimize): 1 B better." in text(comparison(row()))


def test_nothing_to_compare_is_said() -> None:
    assert "No arm of A has the settings of an arm of B" in text(comparison())


def test_hostile_names_are_text_and_a_poor_terminal_gets_ascii() -> None:
    shown = text(comparison(row("a/[red]x[/]\x1b[31m\x07")), encoding="ascii")
    assert "a/[red]x[/]" in shown and "\x1b" not in shown and "\x07" not in shown
    assert "-0.0200" in shown
