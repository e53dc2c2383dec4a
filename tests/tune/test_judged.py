"""`tune.judge` and the tables of `run_campaign.py judge`, as a user without campaigns meets them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from ngpt.config.base import ConfigError
from run_campaign import main
from tune import judge
from tune.judged import default_baseline, read_values

BASE, WIDE = {1: 5.00, 2: 5.03, 3: 4.98}, {1: 4.90, 2: 4.932, 3: 4.885}


def test_two_arms_are_judged_by_the_paired_t_test() -> None:
    judged = judge({"base": BASE, "wide": WIDE}, baseline="base", goal="minimize", confidence=0.95, min_effect=0.005)
    best = judged.arms[0]
    reference = stats.ttest_rel(list(WIDE.values()), list(BASE.values()))
    interval = reference.confidence_interval(0.95)
    assert (best.arm, best.n, best.verdict, judged.winner) == ("wide", 3, "better", "wide")
    assert (best.p, best.ci_low, best.ci_high) == pytest.approx((reference.pvalue, interval.low, interval.high))
    assert best.delta == pytest.approx(-0.0976667, abs=1e-6)
    assert [arm.verdict for arm in judged.arms] == ["better", "baseline"]


def test_a_run_without_a_result_makes_its_arm_incomplete_and_nan_diverged() -> None:
    for missing, expected in ((None, "incomplete"), (math.nan, "diverged")):
        judged = judge({"base": BASE, "wide": {**WIDE, 3: missing}}, baseline="base")
        assert {arm.arm: arm.verdict for arm in judged.arms} == {"base": "baseline", "wide": expected}


def test_an_infinite_value_is_a_run_that_diverged() -> None:
    judged = judge({"base": BASE, "wide": {**WIDE, 3: math.inf}}, baseline="base")
    assert judged.arms[-1].verdict == "diverged"
    lost = judge({"base": {**BASE, 4: math.inf}, "bad": {seed: x + 0.1 for seed, x in WIDE.items()}}, baseline="base")
    assert "worse" not in {arm.verdict for arm in lost.arms}  # the baseline is better only without its worst seed


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e9])
def test_the_table_shows_differences_of_any_size(scale: float) -> None:
    values = {arm: {seed: x * scale for seed, x in row.items()} for arm, row in (("base", BASE), ("wide", WIDE))}
    row = str(judge(values, baseline="base", min_effect=0.0)).splitlines()[1].replace("\u2212", "-").split()
    assert row[0] == "wide"
    assert float(row[2]) == pytest.approx(4.9056667 * scale, rel=1e-3)
    assert float(row[3]) == pytest.approx(-0.0976667 * scale, rel=0.01)
    assert len(row[3]) <= 16


@pytest.mark.parametrize("scale", [1.0, 1e-90])
def test_arms_without_noise_beside_one_that_scatters_are_judged(scale: float) -> None:
    rows = {"base": (5.0, 5.0), "a": (5.1, 5.1), "b": (4.9, 4.9), "wild": (8.7, 4.8)}
    values = {arm: {1: scale * first, 2: scale * second} for arm, (first, second) in rows.items()}
    judged = judge(values, baseline="base", min_effect=0.0)
    assert {arm.arm: arm.verdict for arm in judged.arms}["b"] == "better"


def test_a_baseline_that_diverged_leaves_nothing_to_be_decided_by_more_seeds() -> None:
    bad = {seed: x + 0.1 for seed, x in BASE.items()} | {2: 5.131, 4: 5.1}
    judged = judge({"base": {**BASE, 4: math.inf}, "bad": bad}, baseline="base")
    assert (judged.arms[-1].verdict, judged.arms[-1].seeds_to_decide) == ("undecided", None)
    assert "beyond the noise" in judged.why and judged.why.endswith("with a baseline that diverged it is undecided")


def test_rounded_values_that_differ_alike_get_a_warning_of_their_own() -> None:
    rounded = judge({"base": {1: 0.90, 2: 0.91}, "wide": {1: 0.91, 2: 0.92}}, baseline="base")
    assert rounded.warnings[0].startswith("every seed gives the same differences")
    constant = judge({"base": {1: 0.9, 2: 0.9}, "wide": {1: 0.8, 2: 0.8}}, baseline="base")
    assert constant.warnings[0].startswith("no noise between seeds")


def test_the_sentence_counts_the_seeds_that_both_arms_have() -> None:
    judged = judge({"base": BASE, "wide": {1: 4.90, 2: 4.932, 7: 4.9, 8: 4.9}}, baseline="base")
    assert "(2 paired seeds, " in judged.why


def test_the_printed_table_has_a_row_for_each_arm_and_the_result_in_a_sentence() -> None:
    text = str(judge({"base": BASE, "wide": WIDE, "same": BASE}, baseline="base"))
    rows = text.splitlines()
    assert [row.split()[0] for row in rows[:4]] == ["arm", "wide", "base", "same"]
    assert "equivalent" in rows[3] and "wide lowers the value by 0.0977" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "bsae"}, "unknown baseline 'bsae', did you mean 'base'?"),
        ({"goal": "minimise"}, "unknown goal 'minimise', did you mean 'minimize'?"),
        ({"confidence": 95}, "confidence must be at least 0.5 and below 1, got 95"),
        ({"min_effect": -1}, "min_effect must be 0 or more, got -1"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_is_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        judge({"base": BASE, "wide": WIDE}, **{"baseline": "base", **arguments})
    assert str(error.value) == message
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": BASE, "wide": [4.9, 4.8]}, "wide: must map seeds to values, got list; if the places in lists are"),
        ({"base": BASE, "wide": {"1": 4.9}}, "wide: seeds are whole numbers, got '1'"),
        ([("base", BASE)], "values must map arms to seeds to values, got list"),
    ],
)
def test_values_of_another_shape_are_refused_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        judge(values, baseline="base")
    assert str(error.value).startswith(message)


def test_the_series_of_pandas_are_values() -> None:
    frame: Any = pd.DataFrame({"base": BASE, "wide": WIDE})
    assert judge(frame, baseline="base").arms == judge({"base": BASE, "wide": WIDE}, baseline="base").arms


def test_text_in_place_of_a_number_is_named_with_arm_and_seed() -> None:
    with pytest.raises(ConfigError, match="wide: the value of seed 2 is not a number: 'x'"):
        judge({"base": BASE, "wide": {1: 1.0, 2: "x"}}, baseline="base")  # pyright: ignore[reportArgumentType]


def test_judging_needs_no_torch() -> None:
    code = "import sys; from tune import judge; judge({'a': {1: 1.0}}, baseline='a'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    table = write(
        tmp_path, "\ufeffValue,Arm,Note,Seed\r\n5.0,base,x,1\r\n,base,,2\r\n\r\n4.5,wide,,1\r\nnan,wide,,2\r\n"
    )
    values = read_values(table)
    assert values["base"] == {1: 5.0, 2: None}
    assert values["wide"][1] == 4.5 and math.isnan(values["wide"][2] or 0)


@pytest.mark.parametrize("delimiter", ["\t", ";", ","])
def test_columns_are_divided_as_the_first_line_is_and_seeds_may_have_names(tmp_path: Path, delimiter: str) -> None:
    table = write(tmp_path, "arm,seed,value\na,s2,1\na,s1,2\nb,s1,3\n".replace(",", delimiter))
    assert read_values(table) == {"a": {2: 1.0, 1: 2.0}, "b": {1: 3.0}}


@pytest.mark.parametrize(
    "text",
    [
        "arm;seed;value\nbase;1;5,25\nbase;2;\nwide;1;1e-3\nwide;2;4\n",
        "arm\tseed\tvalue\nbase\t1\t5,25\nbase\t2\t\nwide\t1\t0,001\nwide\t2\t4\n",
        "arm;seed;value\nbase;1;5.25\nbase;2;\nwide;1;0.001\nwide;2;4\n",
    ],
)
def test_a_table_may_be_divided_by_semicolons_or_tabs_and_have_decimal_commas(tmp_path: Path, text: str) -> None:
    assert read_values(write(tmp_path, text)) == {"base": {1: 5.25, 2: None}, "wide": {1: 0.001, 2: 4.0}}


def test_a_seed_is_the_same_whether_it_is_written_as_a_whole_or_a_decimal_number(tmp_path: Path) -> None:
    table = write(tmp_path, "arm,seed,value\nbase,1,5\nbase,2,6\nwide,1.0,4\nwide,2.0,5\n")
    assert read_values(table) == {"base": {1: 5.0, 2: 6.0}, "wide": {1: 4.0, 2: 5.0}}


def test_rows_behind_a_quote_that_is_not_closed_are_not_lost(tmp_path: Path) -> None:
    table = write(tmp_path, 'arm,seed,value,note\nbase,1,5,ok\nwide,1,4,"looks fine\nwide,2,9,bad\nbase,2,6,ok\n')
    with pytest.raises(ConfigError, match="line 3 is not a row of CSV: a quote is not closed"):
        read_values(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: the first line lacks arm, seed and value; it must name arm, seed and value"),
        ("arm,seed\na,1\n", ":1: the first line lacks value; it must name arm, seed and value"),
        ("arm;seed;value\na;1;3,5\na;2;3.25\n", ":2: value '3,5' has a comma and '3.25' in line 3 a point"),
        ("arm,seed,value\na,1,1_5\n", ":2: value '1_5' is not a number"),
        ("arm;seed;value\na;1;1,234,567\n", ":2: value '1,234,567' is not a number"),
        ("arm,seed,value\na,1,2\na,1.0,3\n", ":3: a has seed 1.0 twice"),
        ("arm,seed,value\n", ": no rows after the first line, which names the columns"),
        ("arm,seed,value\na,1,2\na,1,3\n", ":3: a has seed 1 twice"),
        ("arm,seed,value\na,1,two\n", ":2: value 'two' is not a number"),
        ("arm,seed,value\na,1\n", ":2: 2 of 3 columns"),
        ("arm,seed,value\n,1,2\n", ":2: the arm is empty"),
        ("arm,seed,value\nlr=1,2,3,1,5\n", ":2: 5 cells in 3 columns; quote cells with commas"),
        ("arm,seed,value,Value\na,1,2,3\n", ":1: the first line names the column value twice"),
    ],
)
def test_a_wrong_table_is_answered_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    table = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_values(table)
    assert str(error.value).startswith(f"{table}{message}")


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.csv"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_values(path)


def test_the_baseline_is_the_arm_with_that_name_or_the_first() -> None:
    assert default_baseline(["wide", "Baseline"]) == "Baseline"
    assert default_baseline(["wide", "narrow"]) == "wide"


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{arm},{seed},{x}" for arm, row in (("base", BASE), ("wide", WIDE)) for seed, x in row.items()]
    table = write(tmp_path, "\n".join(["arm,seed,value", *rows]))
    assert main(["judge", str(table)]) == 0
    assert "better" in capsys.readouterr().out
    assert main(["judge", str(table), "--json", "--goal", "maximize", "--baseline", "wide"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["winner"], found["arms"][0]["verdict"]) == ("base", "better")
    assert main(["judge", str(tmp_path / "missing.csv")]) == 74
