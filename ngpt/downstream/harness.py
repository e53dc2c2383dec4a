"""Runs tasks of lm-evaluation-harness (extra `lm-eval`) on a loaded model, and names their scores."""

import contextlib
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ngpt.config.base import ConfigError, printable, unknown_message
from ngpt.downstream.config import DownstreamTasks
from ngpt.training.load_model import LoadedModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PACKAGE = "lm_eval"
INSTALL = "pip install 'ngpt-campaign[lm-eval]'"
BOOTSTRAP_ITERS = 1000  # for the standard error of metrics that are no means, such as perplexity
MOST_LISTED = 30  # names of tasks in a message
# The harness prints progress bars, and forks a process per core for the bootstrap, which a worker of Ray must not.
ENVIRONMENT = {"TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}
LOGGED_FROM = logging.ERROR  # of the harness, whose warnings are about the defaults of its own tasks


def require_harness() -> None:
    """Raises ConfigError if lm-evaluation-harness is not installed."""
    if find_spec(PACKAGE) is None:
        raise ConfigError(f"tasks of lm-evaluation-harness need the package lm-eval: {INSTALL}")


def harness_goal(metric: str) -> Literal["minimize", "maximize"] | None:
    """Whether lower or higher values of one of the harness's own metrics are better; None for another metric."""
    require_harness()
    import_module("lm_eval.api.metrics")  # registers them
    from lm_eval.api.registry import higher_is_better_registry

    if metric not in higher_is_better_registry:
        return None
    return "maximize" if higher_is_better_registry.get(metric) else "minimize"


def harness_version() -> str:
    """The installed version of lm-evaluation-harness."""
    return version(PACKAGE)


def check_tasks(config: DownstreamTasks) -> dict[str, bool]:
    """Loads the tasks with their data; returns the metrics that they will give, and whether higher is better.

    Raises:
        ConfigError: the harness is not installed, a task is unknown, or its data cannot be loaded.
    """
    require_harness()
    with _quiet():
        manager = _manager(config.tasks, config.include_path)
        try:
            loaded = manager.load(list(config.tasks))
        except Exception as error:  # the harness and `datasets` have no error of their own for this
            reason = printable(" ".join(f"{type(error).__name__}: {error}".split()), 500)
            raise ConfigError(f"the tasks {', '.join(config.tasks)} cannot be loaded: {reason}") from error
    goals: dict[str, bool] = {}
    for name, task in loaded["tasks"].items():
        filters = [each.name for each in task._filters]
        goals_of_task: Mapping[str, Any] = task.higher_is_better() or {}
        for metric, is_higher_better in goals_of_task.items():
            goals |= {metric_name(name, metric, part): bool(is_higher_better) for part in filters}
    for name, group in loaded.get("groups", {}).items():
        goals |= _goals_of_group(name, group, goals)
    return goals


def _goals_of_group(name: str, group: Any, goals: Mapping[str, bool]) -> dict[str, bool]:
    """The metrics that a group takes the mean of, over those of its tasks that have them under the same filter."""
    found: dict[str, bool] = {}
    tasks = group.get_all_tasks()
    for each in group.aggregate_metric_list or ():
        filters = dict.fromkeys(part.name for task in tasks for part in task._filters)
        for part in filters if each.filter_list is None else each.filter_list:
            names = (metric_name(task.task_name, each.metric, part) for task in tasks)
            if (own := next((own for own in names if own in goals), None)) is not None:
                found[metric_name(name, each.metric, part)] = goals[own]
    return found


def metric_name(task: str, metric: str, part: str = "none") -> str:
    """The name of a score: `arc_easy/acc`, or `gsm8k/exact_match/strict-match` with a filter of that name."""
    return f"{task}/{metric}" if part == "none" else f"{task}/{metric}/{part}"


def without_stderr(name: str) -> str:
    """The name of a score whose standard error has this name, `TASK/METRIC_stderr/FILTER`; a score's name stays."""
    return re.sub(r"_stderr(?=/|$)", "", name)


def run_tasks(
    loaded: LoadedModel, config: DownstreamTasks, *, after_batch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs the tasks of `config` and returns the harness's results; `scores_of` takes the scores out of them.

    `content` has the SHA-256 of what each task asked, in place of the harness's `samples`. The random numbers of this
    process go on afterwards as if nothing had run.

    Raises:
        ConfigError: the harness is not installed, a task is unknown, or the model has no tokenizer.
    """
    require_harness()
    with _quiet(), _kept_random_state():
        from lm_eval.evaluator import simple_evaluate

        from ngpt.downstream.harness_model import AUTO, HarnessModel

        model = HarnessModel(loaded, batch_size=config.batch_size or AUTO, after_batch=after_batch)
        found = simple_evaluate(
            model=model,
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=_manager(config.tasks, config.include_path),
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=True,
        )
    assert found is not None, "only other ranks get None"
    results: dict[str, Any] = dict(found)
    results["content"] = {name: _content(samples) for name, samples in results.pop("samples").items()}
    return results


def _content(samples: Sequence[Mapping[str, Any]]) -> str:
    """The SHA-256 of a task's examples, prompts and right answers, in their order."""
    asked = [[sample[f"{part}_hash"] for part in ("doc", "prompt", "target")] for sample in samples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def scores_of(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The scores of all tasks and groups by name, each followed by its standard error, `..._stderr`, if it has one."""
    scores: dict[str, float | None] = {}
    for task, row in {**results["results"], **results.get("groups", {})}.items():
        for key, value in row.items():
            metric, comma, part = key.partition(",")
            if comma and isinstance(value, Real) and not isinstance(value, bool):
                number = float(value)
                scores[metric_name(task, metric, part)] = number if np.isfinite(number) else None
    return scores


def _manager(tasks: Sequence[str], include_path: str | None) -> "TaskManager":
    """Knows the tasks, those of the harness itself only if they are asked for: to read them takes ten seconds."""
    own = None if include_path is None else _task_manager(include_path, False)
    if own is not None and set(tasks) <= set(own.all_tasks):
        return own
    manager = _task_manager(include_path, True)
    for name in tasks:
        if name not in manager.all_tasks and "*" not in name:
            message = unknown_message("task", name, manager.all_tasks)
            known = message.split("; choose one of")[0]
            raise ConfigError(f"{known}; `lm_eval ls tasks` lists those of lm-evaluation-harness")
    return manager


@lru_cache(maxsize=4)
def _task_manager(include_path: str | None, include_defaults: bool) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path: {include_path}: no such folder")
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness from printing, and from starting processes."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    os.environ.update(ENVIRONMENT)
    logger.setLevel(LOGGED_FROM)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restores the states of all random numbers, which the harness seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
