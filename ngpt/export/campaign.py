"""What a campaign says about one of its trials, read from the files of its results folder."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.training.checkpoint import Checkpoint

SUMMARY, TRIALS = "summary.json", "trials"


@dataclass(frozen=True)
class Verdict:
    """What a phase says about an arm: `better`, `equivalent`, ...; `delta` is its effect with its interval, if any."""

    phase: str
    arm: str
    verdict: str
    delta: Mapping[str, Any] | None
    trials: int


@dataclass(frozen=True)
class CampaignFacts:
    """A campaign as the card of a model tells it: its answer, and the verdicts on the arms of one trial."""

    campaign: str
    metric: str
    sentence: str
    commit: str | None
    is_dirty: bool
    device: str | None
    data: Mapping[str, Any]
    verdicts: list[Verdict]


def campaign_facts(checkpoint: Checkpoint) -> CampaignFacts | None:
    """Returns what the campaign of a checkpoint says of its trial; None if it lies in no results folder.

    Raises ConfigError if the summary of the campaign is not one.
    """
    trial = next((path for path in checkpoint.path.resolve().parents if path.parent.name == TRIALS), None)
    if trial is None or not (trial.parent.parent / SUMMARY).is_file():
        return None
    summary = _read_summary(trial.parent.parent)
    with _as_summary(trial.parent.parent):
        environment = summary["environment"]
        return CampaignFacts(
            campaign=summary["campaign"],
            metric=summary["metric"]["name"],
            sentence=summary["answer"]["sentence"],
            commit=environment.get("git_commit"),
            is_dirty=bool(environment.get("git_dirty")),
            device=environment.get("device"),
            data=summary["data"] or {},
            verdicts=[
                Verdict(phase["phase"], arm["arm"], arm["verdict"], arm["delta"], arm["n"])
                for phase, arm in _arms(summary)
                if trial.name in arm["trial_ids"]
            ],
        )


def best_trial(results: Path) -> tuple[Path, str] | None:
    """Returns the trial that stands for a whole results folder, and a line that says which; None for another folder.

    It is the one with the best score of the arm that won the last phase; of its baseline, if no arm won.

    Raises ConfigError if no trial of that arm has a checkpoint, or the summary is not one.
    """
    if not (results / SUMMARY).is_file() or not (results / TRIALS).is_dir():
        return None
    summary = _read_summary(results)
    with _as_summary(results):
        if not summary["phases"]:
            raise ConfigError(f"{results} has no finished phase yet: give one of its trials")
        phase, metric = summary["phases"][-1], summary["metric"]
        winner = phase["winner"] or phase["baseline"]
        found = [(arm, trial) for arm in phase["arms"] if arm["arm"] == winner for trial in arm["trial_ids"]]
        scores = _scores(results / phase["phase"] / "trials.jsonl", metric["name"])
        sign = -1 if metric["goal"] == "maximize" else 1
        kept = [trial for _, trial in found if trial in scores and (results / TRIALS / trial / "checkpoints").is_dir()]
        if not kept:
            raise ConfigError(
                f"no trial of {winner} in phase {phase['phase']} has a checkpoint: give one of its trials"
            )
        best = min(kept, key=lambda trial: sign * scores[trial])
        text = f"{metric['name']} {scores[best]:.4f}, the best of {len(kept)} of {winner} in phase {phase['phase']}"
        return results / TRIALS / best, f"{results / TRIALS / best}: {text}"


def _scores(path: Path, metric: str) -> dict[str, float]:
    """Returns the metric of each finished trial of a phase."""
    scores = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if (score := (record.get("metrics") or {}).get(metric)) is not None:
            scores[record["trial_id"]] = float(score)
    return scores


def _arms(summary: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for phase in summary["phases"]:
        for arm in phase["arms"]:
            yield phase, arm


def _read_summary(results: Path) -> Mapping[str, Any]:
    path = results / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not the summary of a campaign: {' '.join(str(error).split())}") from None
    if not isinstance(summary, dict):
        raise ConfigError(f"{path} is not the summary of a campaign")
    return summary


@contextmanager
def _as_summary(results: Path) -> Iterator[None]:
    """Turns what a summary lacks into one line that names its file."""
    try:
        yield
    except ConfigError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{results / SUMMARY} is not the summary of a campaign ({what})") from None
