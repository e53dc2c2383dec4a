"""What a session records and prints when a trial ends, or when its downstream tasks end."""

from collections.abc import Mapping
from typing import Any

from ngpt.downstream.config import is_score
from tune import format as fmt
from tune.planning.plan import PlannedTrial
from tune.results.snapshot import Progress
from tune.trials.trial import TrialResult

HEADER_FIELDS = ("seq", "time", "event", "elapsed", "crc")  # of an event, which the journal writes


def trial_line(progress: Progress, trial: PlannedTrial, result: TrialResult, metric: str) -> str:
    """Formats the line for an ended trial: `[12/29] alpha  alpha=0.15 seed 2  val_loss 4.3211  12.3k tok/s  4.1 s`."""
    total, plus = str(progress.total), "" if progress.total_is_final else "+"
    parts = [f"[{progress.done:>{len(total)}}/{total}{plus}] {trial.phase}", f"{trial.arm} seed {trial.seed}"]
    if result.status != "finished":
        parts.append(result.status + (f": {fmt.reason(result.error)}" if result.error else ""))
    loss, speed = result.metrics.get(metric), result.metrics.get("tokens_per_second")
    parts += [f"{metric} {fmt.number(loss)}"] if loss is not None else []
    parts += [f"{fmt.count(speed)} tok/s"] if speed is not None else []
    return "  ".join(map(fmt.plain, [*parts, fmt.duration(result.seconds)]))


def add_scores(before: Mapping[str, Any], result: TrialResult, *, asked: Any) -> dict[str, Any]:
    """Returns the fields of a `trial_finished` event that adds scores, or why there are none, to the one `before`.

    Args:
        before: the event that recorded the trial as trained.
        result: of the downstream tasks.
        asked: what the campaign file asks for, recorded if the tasks ended without a report.
    """
    about: dict[str, Any] | None = result.provenance.get("evaluation")
    if about is None:
        about = {"asked": asked, "error": result.error or "it did not end"}
    about = {**about, "seconds": round(result.seconds, 3)}
    scores = result.metrics if result.status == "finished" else {}
    # An earlier evaluation has asked for something else: its scores must not stand beside those of other trials.
    is_first = "evaluation" not in before["provenance"]
    trained = {name: value for name, value in before["metrics"].items() if is_first or not is_score(name)}
    return {name: value for name, value in before.items() if name not in HEADER_FIELDS} | {
        "metrics": trained | scores,
        "provenance": before["provenance"] | {"evaluation": about},
    }


def scores_line(trial: PlannedTrial, result: TrialResult, error: str | None, metric: str) -> str:
    """Formats the line for the downstream tasks of a trained trial: `main  baseline seed 1  evaluated in 4.1 s`."""
    shown = f"evaluated in {fmt.duration(result.seconds)}"
    if error is not None:
        shown = f"not evaluated: {fmt.reason(error)}"
    elif (value := result.metrics.get(metric)) is not None:
        shown = f"{shown}  {metric} {fmt.number(value)}"
    return fmt.plain(f"{trial.phase}  {trial.arm} seed {trial.seed}  {shown}")
