"""`judge`: compares arms with a baseline over seeds, for numbers of any program. Imports no torch."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

from ngpt.config.base import ConfigError, unknown_message
from ngpt.data.text.delimited import DELIMITERS, first_row, read_rows
from tune import format as fmt
from tune.analysis.verdicts import Goal
from tune.analysis.verdicts import judge as judge_outcomes
from tune.storage.records import TrialOutcome
from tune.terminal.table import Table, aligned, html_line, html_table

COLUMNS = ("arm", "seed", "value")  # of a table to judge
MAX_DECIMALS = 8  # of printed values; smaller differences are written with an exponent
BASELINES = ("baseline", "base")  # names of the baseline, if none is given


@dataclass(frozen=True)
class JudgedArm:
    """One arm compared with the baseline. What cannot be computed is None."""

    arm: str
    n: int  # values
    mean: float | None
    sd: float | None
    delta: float | None  # mean over the shared seeds of arm minus baseline
    ci_low: float | None  # of the delta, not corrected for the number of arms
    ci_high: float | None
    p: float | None  # two-sided, not corrected
    p_holm: float | None  # corrected for the number of arms; decides the verdict
    verdict: str  # better | worse | equivalent | undecided | no claim | diverged | incomplete | baseline
    seeds_to_decide: int | None  # of an undecided arm, with 80 % power; None if 1,000 would not do


JUDGED_COLUMNS = {
    "arm": "string",
    "n": "int64",
    **dict.fromkeys(("mean", "sd", "delta", "ci_low", "ci_high", "p", "p_holm"), "float64"),
    "verdict": "string",
    "seeds_to_decide": "int64",
}


@dataclass(frozen=True, repr=False)
class Judged:
    """Arms, best first, and the result in one sentence."""

    arms: Table[JudgedArm]
    baseline: str
    winner: str
    why: str
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join([aligned(self._rows()), "", *self._remarks()])

    def _repr_html_(self) -> str:
        """The arms as a notebook shows them."""
        header, *rows = self._rows()
        return html_table(header, rows) + "".join(map(html_line, self._remarks()))

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("arm", "n", "mean", "delta", "interval", "p", "Holm p", "verdict")]
        number, signed = _formats(self.arms)
        for arm in self.arms:
            interval = "" if arm.ci_low is None else f"[{signed(arm.ci_low)}, {signed(arm.ci_high)}]"
            delta = "" if arm.delta is None else signed(arm.delta)
            p, p_holm = ("" if p is None else f"{p:.2g}" for p in (arm.p, arm.p_holm))
            verdict = arm.verdict + (f", about {arm.seeds_to_decide} seeds" if arm.seeds_to_decide else "")
            rows.append((fmt.plain(arm.arm), f"{arm.n}", number(arm.mean), delta, interval, p, p_holm, verdict))
        return rows

    def _remarks(self) -> list[str]:
        warnings = [f"Warning: {fmt.sentence(fmt.plain(warning))}" for warning in self.warnings]
        return [fmt.sentence(fmt.plain(self.why)), *warnings]


def judge(
    values: Mapping[str, Mapping[int, float | None]],
    *,
    baseline: str,
    goal: Goal = "minimize",
    confidence: float = 0.95,
    min_effect: float = 0.005,
) -> Judged:
    """Compares arms with a baseline over seeds, as campaigns do (docs/statistics.md).

    Args:
        values: arm to seed to value. None marks a run without a result; its arm is `incomplete`. NaN or an infinite
            value marks a run that diverged.
        baseline: the arm that the others are compared with.
        goal: whether small or large values are better.
        confidence: of the intervals, and one minus the error rate of all verdicts together.
        min_effect: the smallest difference that matters, in units of the values.

    Raises:
        ConfigError: an argument is not allowed; a ValueError.
    """
    _check_values(values)
    if baseline not in values:
        raise ConfigError(unknown_message("baseline", baseline, list(values)))
    if goal not in get_args(Goal):
        raise ConfigError(unknown_message("goal", goal, get_args(Goal)))
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence must be at least 0.5 and below 1, got {confidence!r}")
    if not 0 <= min_effect < math.inf:
        raise ConfigError(f"min_effect must be 0 or more, got {min_effect!r}")
    outcomes = {arm: {seed: _outcome(arm, seed, x) for seed, x in row.items()} for arm, row in values.items()}
    limits = {"goal": goal, "confidence": confidence, "min_effect": min_effect}
    judgement = judge_outcomes(outcomes, baseline=baseline, metric="the value", **limits)
    arms = []
    for arm in judgement.arms:
        delta = arm.delta
        arms.append(
            JudgedArm(
                arm=arm.arm,
                n=arm.n,
                mean=arm.score.mean,
                sd=arm.score.sd,
                delta=delta and delta.mean,
                ci_low=delta and delta.ci_low,
                ci_high=delta and delta.ci_high,
                p=delta and delta.p,
                p_holm=delta and delta.p_holm,
                verdict=arm.verdict,
                seeds_to_decide=arm.seeds_to_decide,
            )
        )
    return Judged(Table(arms, JUDGED_COLUMNS), baseline, judgement.winner, judgement.why, tuple(judgement.warnings))


def _check_values(values: Any) -> None:
    """Raises ConfigError for what does not map arms to seeds to values, such as a list of values for each arm.

    A mapping is what has `items`, as the series of pandas have.
    """
    if not hasattr(values, "items"):
        raise ConfigError(f"values must map arms to seeds to values, got {type(values).__name__}")
    for arm, row in values.items():
        if not hasattr(row, "items"):
            advice = "if the places in lists are seeds, give dict(enumerate(values))"
            raise ConfigError(f"{arm}: must map seeds to values, got {type(row).__name__}; {advice}")
        if wrong := [seed for seed, _ in row.items() if not isinstance(seed, Integral)]:
            raise ConfigError(f"{arm}: seeds are whole numbers, got {wrong[0]!r}")


def read_values(path: Path) -> dict[str, dict[int, float | None]]:
    """Reads a table with the columns arm, seed and value, which commas, semicolons or tabs divide.

    Other columns are ignored. An empty value is None. Where commas do not divide the columns, they may be decimal.
    Seeds that are not whole numbers are numbered in sorted order.

    Raises:
        ConfigError: the table cannot be read; the message names file and line.
        OSError: the file cannot be opened.
    """
    delimiter = next((sign for sign in DELIMITERS[".csv"] if {*COLUMNS} <= {*_names(path, sign)}), ",")
    rows = list(read_rows(path, delimiter))
    header = _header(rows[0][1]) if rows else []
    if missing := [name for name in COLUMNS if name not in header]:
        raise ConfigError(f"{path}:1: the first line lacks {fmt.listing(missing)}; it must name arm, seed and value")
    if twice := [name for name in COLUMNS if header.count(name) > 1]:
        raise ConfigError(f"{path}:1: the first line names the column {twice[0]} twice")
    columns = [header.index(name) for name in COLUMNS]
    cells: dict[str, dict[int | str, str]] = {}
    lines: dict[int, str] = {}  # by line: the value
    for number, row in rows[1:]:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= max(columns):
            raise ConfigError(f"{path}:{number}: {len(row)} of {len(header)} columns")
        if any(cell.strip() for cell in row[len(header) :]):
            raise ConfigError(f"{path}:{number}: {len(row)} cells in {len(header)} columns; quote cells with commas")
        arm, seed, text = (row[i].strip() for i in columns)
        if not arm or not seed:
            raise ConfigError(f"{path}:{number}: the {'seed' if arm else 'arm'} is empty")
        if _seed(seed) in cells.setdefault(arm, {}):
            raise ConfigError(f"{path}:{number}: {arm} has seed {seed} twice")
        cells[arm][_seed(seed)] = text
        lines[number] = text
    if not cells:
        raise ConfigError(f"{path}: no rows after the first line, which names the columns")
    values = _numbers(path, lines, may_have_commas=delimiter != ",")
    seeds = _numbered({seed for row in cells.values() for seed in row})
    return {arm: {seeds[seed]: values[text] for seed, text in row.items()} for arm, row in cells.items()}


def _header(row: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in row]


def _names(path: Path, delimiter: str) -> list[str]:
    return _header(first_row(path, delimiter) or [])


def _numbers(path: Path, lines: Mapping[int, str], *, may_have_commas: bool) -> dict[str, float | None]:
    """The number of each text that is a value. ConfigError names the line of one that is none, or may mean two."""
    comma = next((number for number, text in lines.items() if may_have_commas and "," in text), None)
    point = next((number for number, text in lines.items() if "." in text), None)
    if comma is not None and point is not None:
        text = (
            f"value {lines[comma]!r} has a comma and {lines[point]!r} in line {point} a point: write one decimal sign"
        )
        raise ConfigError(f"{path}:{comma}: {text}")
    values: dict[str, float | None] = {}
    for number, text in lines.items():
        try:
            if "_" in text:  # Python's own grouping of digits
                raise ValueError
            values[text] = float(text.replace(",", ".") if may_have_commas else text) if text else None
        except ValueError:
            raise ConfigError(f"{path}:{number}: value {text!r} is not a number") from None
    return values


def _seed(text: str) -> int | str:
    """A whole number, also as `3.0`, which pandas writes if a seed is missing elsewhere; else a name."""
    return int(text.split(".")[0]) if re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", text) else text


def default_baseline(arms: Sequence[str]) -> str:
    """The arm called `baseline` or `base`; otherwise the first one."""
    return next((arm for arm in arms if arm.lower() in BASELINES), arms[0])


def _formats(arms: Sequence[JudgedArm]) -> tuple[Callable[[float | None], str], Callable[[float | None], str]]:
    """How to write values and differences: four decimals, or as many as the narrowest interval needs."""
    widths = [arm.ci_high - arm.ci_low for arm in arms if arm.ci_low is not None and arm.ci_high is not None]
    sizes = [size for size in (*widths, *(abs(arm.delta or 0.0) for arm in arms)) if size]
    decimals = max(4, 2 - math.floor(math.log10(min(sizes)))) if sizes else 4
    if decimals <= MAX_DECIMALS:
        return (lambda value: fmt.number(value, decimals)), (lambda value: fmt.signed(value, decimals))

    def number(value: float | None) -> str:
        return fmt.MISSING if value is None else f"{value:.6g}".replace("-", fmt.MINUS)

    return number, lambda value: f"+{number(value)}" if value and value > 0 else number(value)


def _numbered(seeds: set[int | str]) -> dict[int | str, int]:
    """Whole numbers as they are; with a name among them, the rank of each."""
    if all(isinstance(seed, int) for seed in seeds):
        return {seed: int(seed) for seed in seeds}
    return {seed: i for i, seed in enumerate(sorted(seeds, key=str), 1)}


def _outcome(arm: str, seed: int, value: Any) -> TrialOutcome:
    if value is None:
        return TrialOutcome("missing")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{arm}: the value of seed {seed} is not a number: {value!r}") from None
    if not math.isfinite(number):
        return TrialOutcome("diverged")
    return TrialOutcome("finished", number)
