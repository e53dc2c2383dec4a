"""Reads the progress of a campaign from its files, for the live view and for `status`."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from ngpt.system.heartbeat import read_heartbeat
from ngpt.training.tracker import read_metrics
from tune.analysis.importance import is_number
from tune.analysis.sequential import look_text
from tune.results.eta import seconds_left
from tune.results.phase_summary import summarize_phase
from tune.results.snapshot import Running, Snapshot
from tune.storage.events import MAX_NUMBER
from tune.storage.lock import is_locked
from tune.storage.state import CampaignState, PhaseState, read_state
from tune.storage.summaries import PhaseSummary


def take_snapshot(
    root: Path,
    state: CampaignState,
    *,
    running: bool,
    finished_phases: Sequence[PhaseSummary],
    dashboard_url: str | None = None,
) -> Snapshot:
    """Returns the current progress; `finished_phases` are the summaries of the phases that have a winner."""
    expected: dict[str, int] = state.campaign["expected_trials"]
    totals = expected | {phase.name: len(phase.trial_ids) for phase in state.phases.values()}
    limits = expected | state.campaign.get("most_trials", {})
    limits |= {
        name: len(phase.trial_ids) if phase.winner else phase.most_trials for name, phase in state.phases.items()
    }
    planned = [trial_id for phase in state.phases.values() for trial_id in phase.trial_ids]
    results = [state.results[trial_id] for trial_id in planned if trial_id in state.results]
    current = next((phase for phase in state.phases.values() if phase.winner is None), None)
    session_seconds = (datetime.now(UTC) - datetime.fromisoformat(state.campaign["time"])).total_seconds()
    training = tuple(_running(root, event) for event in state.running.values()) if running else ()
    return Snapshot(
        campaign=state.campaign["campaign"],
        status="running" if running else state.status,
        phase=current.name if current else None,
        phase_number=list(state.phases).index(current.name) + 1 if current else len(state.phases),
        n_phases=len(expected),
        done=len(results),
        total=sum(totals.values()),
        total_is_final=len(state.phases) == len(expected) and limits == totals,
        reused=sum(result["seq"] < state.campaign["seq"] for result in results),
        unsuccessful=sum(result["status"] in ("failed", "diverged") for result in results),
        elapsed=state.seconds + (session_seconds if running else state.session_seconds()),
        eta=seconds_left(state, training) if running else None,
        running=training,
        best=_best(state, current) if current else None,
        metric=state.campaign["metric"]["name"],
        dashboard_url=dashboard_url,
        phases=tuple(finished_phases),
        most=sum(limits.values()) if limits != totals else None,
        look=look_text(current.looks[-1]) if current and current.looks else None,
        smoke=state.is_smoke,
    )


def _running(root: Path, event: Mapping[str, Any]) -> Running:
    folder = root / "trials" / event["trial_id"]
    rows, beat = read_metrics(folder / "metrics.jsonl"), read_heartbeat(folder)

    def newest(name: str) -> Any:
        numbers = (row[name] for row in reversed(rows) if is_number(row.get(name)))
        return next((number for number in numbers if abs(number) <= MAX_NUMBER), None)

    return Running(
        **{name: event[name] for name in ("trial_id", "phase", "arm", "seed", "steps")},
        step=max(newest("step") or 0, beat.step if beat else 0),
        **{name: newest(name) for name in ("train_loss", "val_loss", "tokens_per_second")},
    )


def _best(state: CampaignState, phase: PhaseState) -> tuple[str, float, int] | None:
    """Returns name, mean score and number of seeds of the best arm among those with the most finished seeds."""
    scores = []
    for arm in phase.arms:
        values = [state.outcome(trial_id).value for trial_id in arm.trial_ids.values()]
        if known := [value for value in values if value is not None]:
            scores.append((arm.name, fmean(known), len(known)))
    sign = 1 if state.campaign["metric"]["goal"] == "minimize" else -1
    return min(scores, key=lambda score: (-score[2], sign * score[1]), default=None)


def read_snapshot(root: Path) -> Snapshot:
    """Returns the progress of the campaign in a results directory; works from any process.

    Raises:
        ConfigError: there is no campaign in `root`.
    """
    state = read_state(root)
    finished = [phase for phase in state.phases.values() if phase.winner is not None]
    summaries = [summarize_phase(state, phase) for phase in finished]
    running = is_locked(root)
    url = state.campaign.get("dashboard_url") if running else None
    return take_snapshot(root, state, running=running, finished_phases=summaries, dashboard_url=url)
