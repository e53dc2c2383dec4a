"""The metrics by which arms can be compared, and whether lower or higher is better.

Those of `METRICS` (ngpt/training/evaluation.py), to which plug-ins add, count as soon as they are there, and so do the
scores of the `evaluation:` of the campaign file that was read last.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ngpt.downstream.config import CORE
from ngpt.downstream.harness import harness_goal
from ngpt.training.evaluation import METRICS, EvalMetric
from tune.storage.summaries import DIAGNOSTICS

Goal = Literal["minimize", "maximize"]

LOSS_METRICS = ("val_loss", "val_bpb", "train_loss")
# What a trial measures besides its losses and takes from no evaluation text.
COST_GOALS: dict[str, Goal] = {
    **dict.fromkeys(("peak_memory_bytes", "n_params", "steps", "tokens", "flops"), "minimize"),
    "tokens_per_second": "maximize",
}
BUILT_IN_GOALS: dict[str, Goal] = {**dict.fromkeys((*LOSS_METRICS, *DIAGNOSTICS), "minimize"), **COST_GOALS}
# Metrics that no trial has whose setting has this value.
MISSING_WITH = dict.fromkeys(("r_mean", "r_min", "r_max", "r_replaced"), ("model.norm_mode", "baseline"))


def score_goal(name: str) -> Goal | None:
    """Whether lower or higher values of a score of downstream tasks are better; None if lm-eval does not say.

    Raises:
        ConfigError: it is a score of lm-evaluation-harness, which is not installed.
    """
    task, _, metric = name.partition("/")
    return "maximize" if task == CORE else harness_goal(metric.partition("/")[0])


class Scores(Mapping[str, Goal | None]):
    """The metrics that downstream tasks give: `core`, `core/TASK` and `TASK/METRIC`.

    Which metrics a task of lm-evaluation-harness has is known once it is loaded, before the first trial.
    """

    def __init__(self) -> None:
        self._tasks: tuple[str, ...] = ()
        self._has_core = False

    def choose(self, tasks: Sequence[str], *, core: bool) -> None:
        """Sets the tasks; those of earlier campaign files do not count any more."""
        self._tasks, self._has_core = tuple(tasks), core

    def __contains__(self, name: object) -> bool:
        task, slash, metric = str(name).partition("/")
        if task == CORE and self._has_core:
            return not slash or bool(metric)
        return bool(slash and metric) and task in self._tasks

    def __getitem__(self, name: str) -> Goal | None:
        if name not in self:
            raise KeyError(name)
        return score_goal(name)

    def __iter__(self) -> Iterator[str]:
        yield from [CORE] if self._has_core else []
        yield from (f"{task}/METRIC" for task in self._tasks)

    def __len__(self) -> int:
        return len(self._tasks) + self._has_core


SCORES = Scores()
# All known metrics by name, a live view.
KNOWN_METRICS: Mapping[str, Any] = ChainMap[str, Any](BUILT_IN_GOALS, METRICS, SCORES)  # pyright: ignore[reportArgumentType]


def metric_goal(name: str) -> Goal | None:
    """Whether lower or higher values of a metric are better; None if this version does not know the metric."""
    known = KNOWN_METRICS.get(name)
    return known.goal if isinstance(known, EvalMetric) else known
