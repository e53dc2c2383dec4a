"""The text of a comparison: it fits, says what differs, and nothing in it is markup."""

import io
from typing import Any

import pytest
from rich.console import Console

from tune.terminal.comparison import comparison_view


def row(name: str = "alpha/alpha=0.05", **more: Any) -> dict[str, Any]:
    delta = {"mean": -0.02, "ci_low": -0.03, "ci_high": -0.01, "p": 0.001, "p_holm": 0.002}
    speed = {"a": 1e4, "b": 1.5e4, "ratio": 1.5}
    counted = {"seeds": [1, 2, 3], "paired": True, "n": {"a": 3, "b": 3}, "score": {"a": 4.5, "b": 4.48}}
    judged = {"delta": delta, "identical": False, "lost": [], "tokens_per_second": speed, "verdict": "B better"}
    return {"a": [name], "b": [name]} | counted | judged | more


def comparison(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {"results": "results/x", "campaign": "x", "status": "finished", "workers": 2}
    side = about | {"started_at": "2026-11-21T06:10:33.669+00:00"}
    differs: dict[str, Any] = {"environment": {"git_commit": ["0a" * 20, "1b" * 20]}, "data": {}, "code": {}}
    rules = {"metric": {"name": "val_loss", "goal": "minimize"}, "confidence": 0.95, "min_effect": 0.005}
    lists = {"only_a": [], "only_b": [["p/q", "r/s"]], "throughput_note": None}
    base = {"base": {"optim.lr": [0.1, None]}, "arms": list(rows)}
    return {"a": side, "b": side | {"campaign": "y"}} | rules | differs | base | lists | more


def text(found: dict[str, Any], width: int = 80, encoding: str = "utf-8") -> str:
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
    same = row(identical=True, verdict="identical in every trial", delta={"mean": 0.0, "p_holm": 1.0})
    assert "Identical in every trial: 2 arms, 6 trials, equal in every digit." in text(comparison(same, same))
    assert "2 arms compared by val_loss (minimize): 1 identical in every trial and 1 B better." in " ".join(
        text(comparison(same, row())).split()
    )


def test_one_arm_is_not_called_several() -> None:
    same = row(identical=True, verdict="identical in every trial", delta={"mean": 0.0, "p_holm": 1.0}, seeds=[1])
    assert "Identical in every trial: 1 arm, 1 trial, equal in every digit." in text(comparison(same))
    assert "1 arm compared by val_loss (minimize): 1 B better." in text(comparison(row()))


def test_nothing_to_compare_is_said() -> None:
    assert "No arm of A has the settings of an arm of B" in text(comparison())


def test_hostile_names_are_text_and_a_poor_terminal_gets_ascii() -> None:
    shown = text(comparison(row("a/[red]x[/]\x1b[31m\x07")), encoding="ascii")
    assert "a/[red]x[/]" in shown and "\x1b" not in shown and "\x07" not in shown
    assert "-0.0200" in shown
