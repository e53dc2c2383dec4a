"""Logs of trials: columns from rows, thinning, and histograms from files that may be damaged."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tune.report.figures import RECORDED
from tune.report.trial_logs import (
    COLUMNS,
    MAX_HISTOGRAM_NAMES,
    MAX_HISTOGRAM_STEPS,
    TrialLog,
    curves_by_arm,
    read_histograms,
    thinned,
)
from tune.results.summary import CURVE_COLUMNS


def row(step: int | None, trial: str = "t", **values: Any) -> dict[str, Any]:
    return {"phase": "p", "arm": "a", "trial_id": trial, "seed": 1, "step": step, **values}


def only_log(*rows: dict[str, Any]) -> TrialLog:
    ((log,),) = curves_by_arm(rows).values()
    return log


def test_the_rows_of_a_trial_become_columns_in_the_order_of_steps() -> None:
    log = only_log(row(20, val_loss=4.0), row(10, val_loss=None, train_loss=6.0), row(10, val_loss=5.0), row(None))
    assert log.series("val_loss") == {10: 5.0, 20: 4.0}
    assert list(log.series("val_loss")) == [10, 20]
    assert log.series("train_loss") == {10: 6.0}


def test_a_step_that_is_logged_again_counts_once_and_losses_that_are_not_finite_do_not() -> None:
    log = only_log(row(10, val_loss=5.0), row(10, val_loss=4.5), row(20, val_loss=float("inf")))
    assert log.series("val_loss") == {10: 4.5}


def test_seconds_are_tokens_over_the_mean_speed_so_far() -> None:
    log = only_log(
        row(0, tokens=0),
        row(1, tokens=100, tokens_per_second=50.0),
        row(2, tokens=200),
        row(3, tokens=300, tokens_per_second=75.0),
    )
    assert log.seconds() == {0: 0.0, 1: 2.0, 2: 200 / 75, 3: 4.0}  # a row without a speed has that of the next


def test_the_seconds_of_a_trial_never_go_back() -> None:
    log = only_log(*(row(n, tokens=100 * n, tokens_per_second=speed) for n, speed in enumerate((50.0, 100.0, 10.0), 1)))
    faster = only_log(*(row(n, tokens=100, tokens_per_second=speed) for n, speed in enumerate((50.0, 100.0, 80.0), 1)))
    assert log.seconds() == {1: 2.0, 2: 2.0, 3: 30.0}
    assert faster.seconds() == {1: 2.0, 2: 2.0, 3: 2.0}


def test_the_curves_need_no_column_that_the_parquet_file_lacks() -> None:
    assert {*COLUMNS, *RECORDED.values()} <= CURVE_COLUMNS.keys()


def test_a_step_without_recorded_times_makes_them_incomplete() -> None:
    rows = [row(n, tokens=10 * n, train_seconds=2.0 * n) for n in range(3)]
    assert only_log(*rows).records("train_seconds")
    assert not only_log(*rows, row(3, tokens=30)).records("train_seconds")
    assert not only_log(row(0, tokens=0)).records("train_seconds")


def test_further_metrics_are_columns_only_where_they_are_asked_for() -> None:
    rows = [row(1, accuracy=0.5), row(2, accuracy=None)]
    (((log,),),) = (curves_by_arm(rows, ["accuracy"]).values(),)
    assert log.series("accuracy") == {1: 0.5} and log.logged("accuracy")
    assert not only_log(*rows).logged("accuracy")


def test_without_a_speed_there_are_no_seconds() -> None:
    assert only_log(row(0, tokens=0), row(1, tokens=100)).seconds() == {}


def test_trials_of_an_arm_stay_apart() -> None:
    logs = curves_by_arm([row(1, "t", val_loss=1.0), row(1, "u", val_loss=2.0), row(2, "t", val_loss=3.0)])["p", "a"]
    assert [(log.trial_id, list(log.series("val_loss").values())) for log in logs] == [("t", [1.0, 3.0]), ("u", [2.0])]


@pytest.mark.parametrize(("length", "most"), [(5, 10), (10, 10), (11, 10), (1000, 7), (1, 3)])
def test_thinning_keeps_the_ends_and_equal_distances(length: int, most: int) -> None:
    kept = thinned(range(length), most)
    assert len(kept) == min(length, most)
    assert (kept[0], kept[-1]) == (0, length - 1)
    gaps = {b - a for a, b in pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def histogram(name: str, step: int, counts: list[int], edges: list[float] | None = None) -> str:
    edges = edges or [0.1 * i for i in range(len(counts) + 1)]
    return json.dumps({"step": step, "name": name, "edges": edges, "counts": counts, "not_finite": 0})


def test_histograms_are_read_by_name_and_step(tmp_path: Path) -> None:
    path = tmp_path / "histograms.jsonl"
    lines = [
        histogram("r/mlp.0", 10, [1, 2]),
        histogram("alpha/mlp.0", 0, [3, 4], [1.0, 2.0, 3.0]),
        histogram("r/mlp.0", 0, [5, 6]),
    ]
    path.write_text("\n".join(lines) + "\n")
    assert read_histograms(path) == {
        "r/mlp.0": [[0, 0.0, 0.2, [5, 6]], [10, 0.0, 0.2, [1, 2]]],
        "alpha/mlp.0": [[0, 1.0, 3.0, [3, 4]]],
    }


def test_damaged_histograms_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "histograms.jsonl"
    bad = [
        histogram("no values", 0, [], []),
        histogram("edges", 0, [1, 2], [0.0, 1.0]),
        json.dumps({"step": "0", "name": "step", "edges": [0, 1], "counts": [1]}),
        json.dumps({"step": 0, "name": ["x"], "edges": [0, 1], "counts": [1]}),
        json.dumps({"step": 0, "name": "text", "edges": ["a", "b"], "counts": [1]}),
        histogram("too many bins", 0, [1] * 5000),
        "{",
    ]
    path.write_text("\n".join([*bad, histogram("good", 0, [1])]) + "\n")
    assert list(read_histograms(path)) == ["good"]
    assert read_histograms(tmp_path / "missing.jsonl") == {}


def test_only_so_many_histograms_are_kept_with_the_first_and_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "histograms.jsonl"
    path.write_text("".join(histogram(f"r/{n}", step, [1]) + "\n" for n in range(60) for step in range(0, 500, 10)))
    kept = read_histograms(path)
    assert len(kept) == MAX_HISTOGRAM_NAMES and {len(rows) for rows in kept.values()} == {MAX_HISTOGRAM_STEPS}
    assert all((rows[0][0], rows[-1][0]) == (0, 490) for rows in kept.values())
