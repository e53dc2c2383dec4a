"""What the page lets a reader explore: every trial with its settings, numbers, curve and histograms.

The result is plain data for JSON. The page sorts, filters and groups it, and never computes a statistic other than
mean, standard deviation and standard error; intervals come from `tune/report/differences.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, build
from tune import format as fmt
from tune.analysis.importance import is_number
from tune.analysis.readings import NoisePrior
from tune.report.differences import differences
from tune.report.figures import arm_colors, curve_metrics
from tune.report.trial_logs import COLUMNS, CURVES, DETAILS, LOSSES, TrialLog, read_histograms, read_sample, thinned
from tune.report.wording import ENDINGS
from tune.storage.summaries import CampaignSummary, PhaseSummary, TrialRecord

MAX_TRIAL_POINTS = 120  # steps of the curve of one trial
MIN_TRIAL_POINTS = 16
ALL_TRIAL_POINTS = 60_000  # of all trials together; with many trials, each has fewer steps
ALL_METRIC_POINTS = 90_000  # the same for what is not a loss; below MIN_TRIAL_POINTS of a curve, there is none
MAX_HISTOGRAMS = 120  # trials whose histograms and texts are on the page; with more trials, the first seed of each arm
PRIVATE = ("tracker.", "checkpoint.")  # settings that say where a trial writes, not what it computes
Logs = Mapping[tuple[str, str], Sequence[TrialLog]]


@dataclass(frozen=True)
class Details:
    """What a report shows of single trials beside their curves. Without details the page lacks its table of trials."""

    records: Sequence[TrialRecord] = ()
    root: Path | None = None  # the results directory, to read histograms from
    priors: Mapping[str, NoisePrior] = field(default_factory=dict)  # noise that a phase borrows, by phase
    metrics: Sequence[str] = ()  # beside losses, that may have curves


def explore(summary: CampaignSummary, logs: Logs, details: Details) -> dict[str, Any]:
    """Returns the data of the page's explorer.

    `grids` holds lists of steps and tokens that curves share, so that 3,000 trials fit on a page. A trial is
    [index of phase, index of arm, seed, id, status, earlier phase that trained it, error, metrics, curves]; its metrics
    are in the order of `metrics`, its curves are by metric [index of the grid, values]. A phase has its
    `curves` by metric, the campaign's own first, each with the differences of the arms.
    """
    metrics = _metric_names(summary, details.records)
    settings = _varying_settings(details.records)
    configs = {(record.phase, record.arm): record.config for record in reversed(details.records)}
    phases = []
    for phase in summary.phases:
        own = [record for record in details.records if record.phase == phase.phase]
        base = configs.get((phase.phase, phase.baseline or ""), {})
        colors = arm_colors(phase)
        phases.append(
            {
                "name": fmt.plain(phase.phase),
                "baseline": _index(phase, phase.baseline),
                "winner": _index(phase, phase.winner),
                "min_effect": phase.min_effect,
                "arms": [
                    {
                        "name": fmt.plain(arm.arm),
                        "verdict": arm.verdict,
                        "color": colors.get(arm.arm),
                        "settings": _shown(configs.get((phase.phase, arm.arm), {}), settings),
                        "diff": _diff(base, configs.get((phase.phase, arm.arm), {})),
                    }
                    for arm in phase.arms
                ],
                "curves": [
                    {
                        "name": fmt.plain(name),
                        "goal": _goal(phase, name),
                        "differences": differences(phase, logs, own, details.priors.get(phase.phase), name),
                    }
                    for name in curve_metrics(phase, logs)
                ],
            }
        )
    grids: dict[tuple[Any, ...], int] = {}
    of_curves = _points_of_curves(len(details.records), _logged_metrics(summary, logs))
    shown = _shown_trials(summary, details)
    return {
        "campaign": fmt.plain(summary.campaign),
        "metric": fmt.plain(summary.metric.name),
        "metrics": [fmt.plain(name) for name in metrics],
        "settings": [fmt.plain(name) for name in settings],
        "points": of_curves[LOSSES[0]],  # of a loss curve of one trial, at most
        "curves": [fmt.plain(name) for name in of_curves if name not in LOSSES],  # of single trials
        "phases": phases,
        "trials": _trials(summary, details.records, logs, metrics, grids, of_curves),
        "grids": [{"steps": steps, "tokens": tokens} for steps, tokens in grids],
        "histograms": _files(details.root, shown, "histograms.jsonl", read_histograms),
        "samples": _files(details.root, shown, "sample.txt", read_sample),
    }


def _goal(phase: PhaseSummary, metric: str) -> str | None:
    """Returns whether lower or higher values are better; None for a metric whose plug-in is not loaded."""
    from tune.spec.metrics import metric_goal  # lazy, because it needs torch

    return phase.metric.goal if metric == phase.metric.name else metric_goal(metric)


def _index(phase: PhaseSummary, arm: str | None) -> int | None:
    return next((number for number, other in enumerate(phase.arms) if other.arm == arm), None)


def _metric_names(summary: CampaignSummary, records: Sequence[TrialRecord]) -> list[str]:
    """Returns the numeric metrics of the trials; the one that ranks the arms, loss and speed come first."""
    first = [summary.metric.name, "val_loss", "val_bpb", "train_loss", "tokens_per_second"]
    names = dict.fromkeys(name for record in records for name, value in record.metrics.items() if is_number(value))
    return [*(name for name in dict.fromkeys(first) if name in names), *(name for name in names if name not in first)]


def _varying_settings(records: Sequence[TrialRecord]) -> list[str]:
    """Returns the settings that differ between trials, without the seed."""
    values: dict[str, set[str]] = {}
    for config in {id(record.config): record.config for record in records}.values():
        for name, value in config.items():
            values.setdefault(name, set()).add(fmt.value(value))
    return sorted(name for name, found in values.items() if len(found) > 1 and _is_compared(name))


def _is_compared(name: str) -> bool:
    return name != "seed" and not name.startswith(PRIVATE)


def _shown(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [fmt.value(config[name]) if name in config else fmt.MISSING for name in names]


def _diff(base: Mapping[str, Any], own: Mapping[str, Any]) -> list[list[str]]:
    """Returns [setting, value of the baseline, own value] for each setting in which the two differ."""
    names = [name for name in {**base, **own} if _is_compared(name)] if base and own else []
    rows = [[name, *(_shown(config, [name])[0] for config in (base, own))] for name in names]
    return [[fmt.plain(name), before, after] for name, before, after in rows if before != after]


def flops_per_token(records: Sequence[TrialRecord]) -> dict[tuple[str, str], int]:
    """Maps phase and arm to the FLOPs of one training token; without arms whose settings this version does not know."""
    from ngpt.model.flops import flops_per_token as of_model
    from ngpt.training.config import TrainConfig

    known: dict[str, int | None] = {}
    arms: dict[tuple[str, str], int] = {}
    for record in records:
        if (record.phase, record.arm) in arms:
            continue
        key = repr([(name, value) for name, value in record.config.items() if name.startswith("model.")])
        if key not in known:
            try:
                known[key] = of_model(build(TrainConfig, dict(record.config)).model)
            except (ConfigError, AssertionError):  # settings of another version
                known[key] = None
        if (flops := known[key]) is not None:
            arms[record.phase, record.arm] = flops
    return arms


def _trials(
    summary: CampaignSummary,
    records: Sequence[TrialRecord],
    logs: Logs,
    metrics: Sequence[str],
    grids: dict[tuple[Any, ...], int],
    of_curves: Mapping[str, int],
) -> list[list[Any]]:
    """Returns the trials as rows; `of_curves` maps the metrics of their curves to the most points of one."""
    phases = {phase.phase: number for number, phase in enumerate(summary.phases)}
    arms = {(p.phase, arm.arm): number for p in summary.phases for number, arm in enumerate(p.arms)}
    by_trial = {(phase, log.trial_id): log for (phase, _), group in logs.items() for log in group}
    rows = []
    for record in records:
        if (record.phase, record.arm) not in arms:
            continue
        values = [record.metrics.get(name) for name in metrics]
        error = record.error or (ENDINGS.get(record.status, "") if record.status != "finished" else "")
        log = by_trial.get((record.phase, record.trial_id))
        rows.append(
            [
                phases[record.phase],
                arms[record.phase, record.arm],
                record.seed,
                fmt.plain(record.trial_id),
                record.status,
                None if record.reused_from is None else fmt.plain(record.reused_from),
                fmt.reason(error) if error else "",
                [float(f"{value:.7g}") if is_number(value) else None for value in values],
                _curves(log, grids, of_curves) if log else {},
            ]
        )
    return rows


def _logged_metrics(summary: CampaignSummary, logs: Logs) -> list[str]:
    """Returns the metrics besides losses that any trial has logged: the campaign's own first, then open ones."""
    every = [log for group in logs.values() for log in group]
    opened = [name for log in every[:1] for name in log.columns if name not in (*COLUMNS, *DETAILS)]
    names = dict.fromkeys((summary.metric.name, *CURVES, *opened, "tokens_per_second", *DETAILS))
    return [name for name in names if name not in LOSSES and any(log.logged(name) for log in every)]


def _points_of_curves(n_trials: int, others: Sequence[str]) -> dict[str, int]:
    """Returns how many points the curve of a trial has at most, by metric: losses, and others if there is room."""
    points = max(MIN_TRIAL_POINTS, min(MAX_TRIAL_POINTS, ALL_TRIAL_POINTS // max(1, n_trials)))
    other_points = min(points, ALL_METRIC_POINTS // max(1, n_trials * len(others)))
    others = others if other_points >= MIN_TRIAL_POINTS else []
    return {**dict.fromkeys(LOSSES, points), **dict.fromkeys(others, other_points)}


def _curves(log: TrialLog, grids: dict[tuple[Any, ...], int], of_curves: Mapping[str, int]) -> dict[str, list[Any]]:
    """Returns the curves of a trial by metric, each as the number of its grid and its values.

    A grid is the steps of a curve with their tokens. Curves with the same one share it: a new grid enters `grids`.
    `of_curves` has the largest number of points of each metric.
    """
    tokens = log.series("tokens")
    curves = {}
    for name, points in of_curves.items():
        series = log.series(name) if log.logged(name) else {}
        steps = thinned(list(series), points)
        if steps:
            grid = (tuple(steps), tuple(int(tokens[step]) if step in tokens else None for step in steps))
            values = [round(series[step], 4) if name in LOSSES else float(f"{series[step]:.5g}") for step in steps]
            curves[fmt.plain(name)] = [grids.setdefault(grid, len(grids)), values]
    return curves


def _shown_trials(summary: CampaignSummary, details: Details) -> list[str]:
    """Returns the trials whose files are shown; with many trials, the first seed of the best-ranked arms."""
    ids = list(dict.fromkeys(record.trial_id for record in details.records))
    if len(ids) > MAX_HISTOGRAMS:
        of_arms = [(phase, arm) for phase in summary.phases for arm in phase.arms]
        of_arms.sort(key=lambda pair: pair[1].rank)
        firsts = {(r.phase, r.arm): r.trial_id for r in reversed(details.records)}
        ids = [firsts[phase.phase, arm.arm] for phase, arm in of_arms if (phase.phase, arm.arm) in firsts]
        ids = list(dict.fromkeys(ids))[:MAX_HISTOGRAMS]
    return ids


def _files(root: Path | None, trials: Sequence[str], name: str, read: Callable[[Path], Any]) -> dict[str, Any]:
    """Returns what a file of each trial holds, by trial; without trials whose file holds nothing."""
    found = {trial: read(root / "trials" / trial / name) for trial in trials} if root else {}
    return {fmt.plain(trial): content for trial, content in found.items() if content}
