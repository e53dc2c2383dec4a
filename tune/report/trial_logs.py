"""The logs of single trials in compact form: loss curves from the rows of `curves.parquet`, histograms from files."""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeVar

from ngpt.config.visible import visible
from ngpt.system.atomic_files import read_regular
from ngpt.training.tracker import read_metrics
from tune.storage.summaries import DIAGNOSTICS

T = TypeVar("T")

CurveRow = Mapping[str, Any]  # a row of curves.parquet
LOSSES = ("val_loss", "train_loss")  # that are drawn in one figure
CURVES = (*LOSSES, "val_bpb")  # metrics with curves, besides that of the campaign and those of plug-ins
COLUMNS = ("tokens", "tokens_per_second", "flops", "seconds", "train_seconds", *CURVES)
# What single trials have curves of besides, as far as they have logged it.
DETAILS = ("grad_norm", "lr", "lr_embedding", "lr_head", "lr_scales", *DIAGNOSTICS)
MAX_SAMPLE = 4000  # characters of the text of a trial that are shown
MAX_HISTOGRAM_STEPS = 8  # of a trial that are shown
MAX_HISTOGRAM_NAMES = 24
MAX_BINS = 64  # this program writes 32


@dataclass
class TrialLog:
    """The logged rows of a trial as columns; NaN where a row has no value."""

    trial_id: str
    seed: int
    steps: array = field(default_factory=lambda: array("q"))
    columns: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})

    def add(self, row: CurveRow) -> None:
        self.steps.append(row["step"])
        for name, column in self.columns.items():
            value = row.get(name)
            column.append(nan if value is None else value)

    def logged(self, name: str) -> bool:
        """Whether any row has a finite value of `name`."""
        return any(map(isfinite, self.columns.get(name, ())))

    def series(self, name: str) -> dict[int, float]:
        """Maps steps to finite values, in order. A resumed trial may log a step twice: the last row counts."""
        pairs = zip(self.steps, self.columns[name], strict=True)
        return dict(sorted({step: value for step, value in pairs if isfinite(value)}.items()))

    def records(self, name: str) -> bool:
        """Whether every step with tokens has `name` too; results of earlier versions lack times and FLOPs."""
        return self.series(name).keys() >= self.series("tokens").keys()

    def seconds(self) -> dict[int, float]:
        """Maps steps to the seconds of training up to them, for results that do not record `train_seconds`.

        They are tokens over the mean speed so far, which the rows log. Compilation, warm-up and evaluation are not part
        of that speed. Rows during the warm-up have none yet: the next one that has counts for them. The noise of the
        first speeds never turns the time back. Empty without a speed.
        """
        tokens, speed = self.series("tokens"), self.series("tokens_per_second")
        seconds: dict[int, float] = {}
        known = 0.0
        for step in reversed(tokens):
            known = speed.get(step) or known
            if known:
                seconds[step] = tokens[step] / known
        return dict(zip(reversed(seconds), accumulate(reversed(seconds.values()), max), strict=True))


def curves_by_arm(curves: Iterable[CurveRow], metrics: Sequence[str] = ()) -> dict[tuple[str, str], list[TrialLog]]:
    """Collects the logged rows of all trials by phase and arm, with `metrics` besides those of `COLUMNS`."""
    names = dict.fromkeys((*COLUMNS, *metrics))
    arms: defaultdict[tuple[str, str], dict[str, TrialLog]] = defaultdict(dict)
    for row in curves:
        if row.get("step") is not None:
            logs = arms[row["phase"], row["arm"]]
            if (log := logs.get(row["trial_id"])) is None:
                log = TrialLog(row["trial_id"], row.get("seed") or 0, columns={name: array("d") for name in names})
                logs[row["trial_id"]] = log
            log.add(row)
    return {arm: list(logs.values()) for arm, logs in arms.items()}


def rounded(value: float) -> float:
    """Returns a number with six significant digits, which is shorter on a page."""
    return float(f"{value:.6g}")


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Returns at most `most` items at equal distances, the first and the last among them."""
    last = len(items) - 1
    if last < most:
        return list(items)
    return [items[round(i * last / (most - 1))] for i in range(most)]


def read_histograms(path: Path) -> dict[str, list[list[Any]]]:
    """Reads the `histograms.jsonl` of a trial.

    Returns rows [step, lowest edge, highest edge, counts] by name, for at most `MAX_HISTOGRAM_NAMES` names and
    `MAX_HISTOGRAM_STEPS` steps each, which include the first and the last. Rows without finite values and rows of the
    wrong shape, which a damaged file may have, are left out.
    """
    rows: defaultdict[str, dict[int, list[Any]]] = defaultdict(dict)
    for row in read_metrics(path):
        name, step = row.get("name"), row.get("step")
        counts = _counts(row)
        if isinstance(name, str) and isinstance(step, int) and counts:
            low, high = (float(f"{edge:.6g}") for edge in (row["edges"][0], row["edges"][-1]))
            rows[name][step] = [step, low, high, counts]
    names = thinned(list(rows), MAX_HISTOGRAM_NAMES)
    return {name: thinned([rows[name][step] for step in sorted(rows[name])], MAX_HISTOGRAM_STEPS) for name in names}


def _counts(row: Mapping[str, Any]) -> list[Any]:
    """Returns the counts of a histogram; none if a row is not one, which has an edge more than counts."""
    edges, counts = row.get("edges"), row.get("counts")
    if not (isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 <= MAX_BINS + 1):
        return []
    return counts if all(type(value) in (int, float) for value in (*edges, *counts)) else []


def read_sample(path: Path) -> str:
    """Reads the text that the model of a trial wrote, as its first characters in visible form; empty without one."""
    try:
        text = read_regular(path, most=4 * MAX_SAMPLE).decode(errors="ignore")
    except FileNotFoundError:
        return ""
    shown = text[:MAX_SAMPLE].rstrip()
    return visible(f"{shown}…" if len(text) > MAX_SAMPLE else shown, keep="\n\t")
