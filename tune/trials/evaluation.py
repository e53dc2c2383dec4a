"""Runs the downstream tasks of a trained trial, `evaluation:` in a campaign, from its newest checkpoint."""

from collections.abc import Generator
from pathlib import Path

from ngpt.downstream.config import DownstreamTasks
from ngpt.downstream.evaluate import Downstream, evaluate_checkpoint
from ngpt.system.atomic_files import write_json
from ngpt.system.heartbeat import HeartbeatWriter

EVALUATION_FILE = "evaluation.json"  # in the trial's folder: all scores, with what they are made of


class EvaluationStopped(Exception):
    """Somebody has asked the trial to stop while its tasks ran."""


def evaluate_trial(
    folder: Path, tasks: DownstreamTasks, *, steps: int, device: str
) -> Generator[None, None, Downstream]:
    """Returns the scores of the trial in `folder`, which has taken its `steps`, and writes them to a file there.

    After a stop request, it yields so that the caller can close the generator.

    Raises:
        ConfigError: there is no checkpoint or no tokenizer, or the tasks cannot be loaded.
    """
    with HeartbeatWriter(folder, began=steps) as heartbeat:
        batches = 0

        def after_batch() -> None:
            nonlocal batches
            batches += 1
            heartbeat.beat(steps + batches)  # otherwise the trial would count as hung
            if heartbeat.stop_requested():
                raise EvaluationStopped

        try:
            found = evaluate_checkpoint(folder, tasks, device=device, after_batch=after_batch)
        except EvaluationStopped:
            while True:
                yield
    write_json(folder / EVALUATION_FILE, {"scores": found.scores, **found.about})
    return found
