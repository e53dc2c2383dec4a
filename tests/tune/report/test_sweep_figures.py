"""Loss against speed and parallel coordinates: every arm has its place, in words that plotly cannot read as markup."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest

from tune.report.sweep_figures import MAX_LINES, Scale, parallel_figure, speed_figure
from tune.storage.summaries import ArmSummary, Delta, Objective, PhaseSummary, Spread


def arm(name: str, score: float | None, speed: float | None = 1e4, **overrides: Any) -> ArmSummary:
    spread = Spread(score, ci_low=score and score - 0.1, ci_high=score and score + 0.1)
    delta = Delta(0.0, -0.05, 0.05)
    return ArmSummary(
        name, overrides=overrides, tokens_per_second=speed, verdict="undecided", score=spread, delta=delta
    )


def phase(*arms: ArmSummary) -> PhaseSummary:
    return PhaseSummary(arms=arms, baseline="b")


def test_each_arm_with_a_score_and_a_speed_is_a_point() -> None:
    figure = speed_figure(phase(arm("a", 4.0, 100.0), arm("b", 4.1, 200.0), arm("c", None), arm("d", 4.2, None)))
    assert figure is not None
    (trace,) = figure["data"]
    assert (trace["x"], trace["y"]) == ([100.0, 200.0], [4.0, 4.1])
    assert trace["error_y"]["array"] == pytest.approx([0.05, 0.05])  # of the difference, not of the score
    assert [text.strip() for text in trace["text"]] == ["1 a", "2 b"] and trace["customdata"] == ["1", "2"]


def boxes(figure: dict[str, Any]) -> list[tuple[float, float, float, float]]:
    """The rectangles of all labels and points, by the rules that a browser places text with: a second opinion."""
    (low, high), found = figure["layout"]["xaxis"]["range"], []
    heights = [y for trace in figure["data"] for y in trace["y"]]
    scale = 250 / ((max(heights) - min(heights)) * 1.4)
    for trace in figure["data"]:
        for x, y, text, side in zip(trace["x"], trace["y"], trace["text"], trace["textposition"], strict=True):
            px, py, wide = (x - low) / (high - low) * 940, (y - min(heights)) * scale, 7.2 * len(text.strip())
            found.append((px - 4, py - 4, px + 4, py + 4))
            start = {"left": px - 8 - wide, "right": px + 8, "center": px - wide / 2}[side.split()[1]]
            base = {"top": py + 8, "middle": py - 7, "bottom": py - 22}[side.split()[0]]
            found.append((start, base, start + wide, base + 14))
    return found


def test_every_arm_is_labelled_and_no_label_covers_another_or_a_point() -> None:
    arms = [arm(f"alpha=0.{i}, project_every={i}", 4.0 + (i * 7 % 12) / 20, 1e4 + 31 * i) for i in range(12)]
    figure = speed_figure(phase(*arms))
    assert figure is not None
    assert all(text.strip() for trace in figure["data"] for text in trace["text"])
    for one, other in itertools.combinations(boxes(figure), 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


def test_the_scatter_of_a_clock_does_not_fill_the_axis() -> None:
    figure = speed_figure(phase(arm("a", 4.0, 40000.0), arm("b", 4.1, 40100.0)))
    assert figure is not None
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < 38100 and high > 42000


def test_a_crowd_has_no_labels() -> None:
    figure = speed_figure(phase(*(arm(str(i), 4 + i / 100, 1e4 + i) for i in range(50))))
    assert figure is not None
    assert {text for trace in figure["data"] for text in trace["text"]} == {""}


def test_one_point_is_no_plot() -> None:
    assert speed_figure(phase(arm("a", 4.0), arm("b", None))) is None


def test_an_arm_is_a_line_from_axis_to_axis_to_its_score() -> None:
    arms = [arm(f"{a}{b}", 4 + a + b / 10, x=a, y="uv"[b]) for a in (0, 1) for b in (0, 1)]
    figure = parallel_figure(phase(*arms))
    assert figure is not None
    other, better = figure["data"]
    assert (better["name"], other["name"]) == ("better half", "other half")
    assert better["x"] == [0, 1, 2, None, 0, 1, 2, None]
    assert better["y"][:4] == [0, 0, 0, None] and better["y"][4:6] == [0, 1]
    assert other["y"][-4:] == [1, 1, 1, None]
    assert figure["layout"]["xaxis"]["ticktext"] == ["x", "y", "val_loss"]


def test_one_axis_is_no_plot_and_diverged_arms_have_no_line() -> None:
    assert parallel_figure(phase(*(arm(str(i), 4.0 + i, x=i) for i in range(5)))) is None
    figure = parallel_figure(phase(*(arm(str(i), 4.0 if i else None, x=i, y=i % 2) for i in range(5))))
    assert figure is not None
    assert sum(trace["x"].count(None) for trace in figure["data"]) == 4


def test_a_search_of_a_thousand_arms_keeps_the_best() -> None:
    arms = [arm(str(i), 4 + i / 1000, x=1.0 + i, y=1e-4 * (i + 1)) for i in range(1000)]
    figure = parallel_figure(phase(*arms))
    assert figure is not None
    assert [trace["name"] for trace in figure["data"]][-1] == "best fifth"
    assert sum(trace["x"].count(None) for trace in figure["data"]) == MAX_LINES


def test_a_wide_range_is_logarithmic_a_narrow_one_is_not() -> None:
    wide = Scale([1e-4, 1e-2, 1.0, *(3e-4 * k for k in range(1, 9))])
    assert wide.log and wide.place(1e-2) == pytest.approx(0.5)
    narrow = Scale([1.0 + k / 10 for k in range(11)])
    assert not narrow.log and narrow.place(1.5) == pytest.approx(0.5)
    assert len(wide.ticks()) == len(narrow.ticks()) == 3


def test_few_values_and_words_stand_in_equal_steps() -> None:
    assert [Scale([100, 1, 10]).place(x) for x in (1, 10, 100)] == [0, 0.5, 1]
    assert [Scale([None, "a", True]).place(x) for x in ("a", None, True)] == [0, 0.5, 1]
    assert Scale([3, 3]).place(3) == 0.5


def test_plotly_knows_the_figures_and_no_name_is_markup() -> None:
    name = "<b onclick=x>"
    arms = [arm(name, 4.0 + i, 1e4 + i, **{name: i, "y": f"{name}{i % 2}"}) for i in range(4)]
    own = replace(phase(*arms), metric=Objective(name), winner=name)
    for figure in (speed_figure(own), parallel_figure(own)):
        assert figure is not None
        assert "<b " not in str(figure) and "&lt;b " in str(figure)
        go.Figure(copy.deepcopy(figure))  # raises on an unknown property or value
