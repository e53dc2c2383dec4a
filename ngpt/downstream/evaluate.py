"""Evaluates a checkpoint on downstream tasks: the scores by name, and how they came about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.config import CORE, DownstreamTasks
from ngpt.downstream.core import CoreScore, evaluate_core
from ngpt.downstream.harness import harness_version, run_tasks, scores_of
from ngpt.training.load_model import load_model


class Downstream(NamedTuple):
    """Scores by name, such as `arc_easy/acc`, `arc_easy/acc_stderr` or `core`, and what a record says about them."""

    scores: dict[str, float | None]
    about: dict[str, Any]


def evaluate_checkpoint(
    path: Path, config: DownstreamTasks, *, device: str = "cpu", after_batch: Callable[[], None] = lambda: None
) -> Downstream:
    """Runs the tasks of `config` on the newest checkpoint at `path`.

    Raises:
        ConfigError: there is no intact checkpoint, no tokenizer in it, no such task or bundle, or no lm-eval.
    """
    loaded = load_model(path, device=device)
    scores: dict[str, float | None] = {}
    about: dict[str, Any] = {"asked": config.asked(), "checkpoint_step": loaded.checkpoint.step, "content": {}}
    if config.tasks:
        found = run_tasks(loaded, config, after_batch=after_batch)
        scores |= scores_of(found)
        about["lm_eval"] = harness_version()
        about["versions"] = {name: task for name, task in found["versions"].items() if task is not None}
        about["examples"] = {name: counts["effective"] for name, counts in found["n-samples"].items()}
        about["content"] |= found["content"]
    if config.core is not None:
        tasks = read_bundle(config.core, limit=config.limit, log=lambda line: after_batch())
        core = evaluate_core(loaded, tasks, batch_size=config.batch_size, after_batch=after_batch)
        scores |= core_scores(core)
        about["core"] = {each.label: each._asdict() for each in core.tasks}
        about["content"] |= {f"{CORE}/{task.label}": task.content() for task in tasks}
    return Downstream(scores, about)


def core_scores(core: CoreScore) -> dict[str, float | None]:
    """`core`, its standard error, and the centred accuracy of each task as `core/LABEL`."""
    scores = {CORE: core.core, f"{CORE}_stderr": core.stderr}
    return scores | {f"{CORE}/{each.label}": each.centred for each in core.tasks}
