"""Reads the progress of a campaign from its files, for the live view and for `status`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import naming
from ngpt.system.heartbeat import read_heartbeat
from ngpt.training.tracker import parse_rows
from tune.analysis.importance import is_number
from tune.analysis.sequential import look_text
from tune.results.eta import seconds_left
from tune.results.phase_summary import arms_so_far, summarize_phase
from tune.results.snapshot import ArmSoFar, Progress, Running, Snapshot, Waiting
from tune.storage.activity import RunActivity, read_activity
from tune.storage.event_fields import MAX_NUMBER
from tune.storage.links import NOT_FOLLOWED, refuse_links
from tune.storage.lock import is_locked
from tune.storage.state import CampaignState, PhaseState, added_trials, read_replayed
from tune.storage.summaries import RUNNING, PhaseSummary

KEPT_BYTES = 200  # by which a file is recognized
MOST_TAILS = 512  # files of running trials
STARTING = "starting"  # the status before the first trial may start


class ArmsSoFar:
    """Compares the arms of a phase, and again only once another trial has ended."""

    def __init__(self) -> None:
        self._key: object = None
        self._arms: tuple[ArmSoFar, ...] = ()

    def __call__(self, state: CampaignState, phase: PhaseState) -> tuple[ArmSoFar, ...]:
        """Returns what `arms_so_far` returns."""
        key = phase.name, len(phase.trial_ids), len(phase.looks), len(state.results)
        if key != self._key:
            self._key, self._arms = key, arms_so_far(state, phase)
        return self._arms


def take_snapshot(
    root: Path,
    state: CampaignState,
    *,
    running: bool,
    finished_phases: Sequence[PhaseSummary],
    dashboard_url: str | None = None,
    arms: Callable[[CampaignState, PhaseState], tuple[ArmSoFar, ...]] = arms_so_far,
    run: RunActivity | None = None,
) -> Snapshot:
    """Returns the current progress.

    Args:
        running: whether a session has begun and not ended, and its process is alive.
        finished_phases: the summaries of the phases that have a winner.
        arms: compares the arms of the current phase, if a running session wants to do that less often.
        run: the process and what it does, if that is known.
    """
    expected: dict[str, int] = state.campaign["expected_trials"]
    limits = _most_trials(state)
    planned = dict.fromkeys(trial_id for phase in state.phases.values() for trial_id in phase.trial_ids)
    results = [state.results[trial_id] for trial_id in planned if trial_id in state.results]
    current = next((phase for phase in state.phases.values() if phase.winner is None), None)
    session_seconds = (datetime.now(UTC) - datetime.fromisoformat(state.campaign["time"])).total_seconds()
    started = list(state.running.values()) if running else []
    training = tuple(_running(root, event) for event in started if event["trial_id"] not in state.waiting)
    queued = [event for event in started if event["trial_id"] in state.waiting]
    waiting = tuple(Waiting(*(event[name] for name in ("trial_id", "phase", "arm", "seed"))) for event in queued)
    return Snapshot(
        campaign=state.campaign["campaign"],
        status=RUNNING if running else state.status,
        phase=current.name if current else None,
        phase_number=list(state.phases).index(current.name) + 1 if current else len(state.phases),
        n_phases=len(expected),
        **vars(count_progress(state)),
        reused=sum(result["seq"] < state.campaign["seq"] for result in results),
        unsuccessful=sum(result["status"] in ("failed", "diverged") for result in results),
        elapsed=state.seconds + (session_seconds if running else state.session_seconds()),
        eta=seconds_left(state, training) if running else None,
        running=training,
        waiting=waiting,
        best=_best(state, current) if current else None,
        metric=state.campaign["metric"]["name"],
        dashboard_url=dashboard_url,
        phases=tuple(finished_phases),
        most=sum(limits.values()) if limits != _totals(state) else None,
        look=look_text(current.looks[-1]) if current and current.looks else None,
        smoke=state.is_smoke,
        arms=arms(state, current) if current else (),
        alive=running,
        run=run,
    )


def count_progress(state: CampaignState) -> Progress:
    """Returns how many trials have ended, of how many that are planned or expected.

    A trial that several phases share, such as their baseline, counts once.
    """
    totals = _totals(state)
    planned = {trial_id for phase in state.phases.values() for trial_id in phase.trial_ids}
    done = sum(map(state.results.__contains__, planned))
    return Progress(done, sum(totals.values()), len(state.phases) == len(totals) and _most_trials(state) == totals)


def _totals(state: CampaignState) -> dict[str, int]:
    """Returns the number of trials that each phase adds; those that are not planned yet add what was expected."""
    expected: dict[str, int] = state.campaign["expected_trials"]
    return expected | {name: len(ids) for name, ids in _added(state).items()}


def _most_trials(state: CampaignState) -> dict[str, int]:
    """Returns the largest number of trials that each phase adds."""
    limits = state.campaign["expected_trials"] | state.campaign.get("most_trials", {})
    later = {phase.name: 0 if phase.winner else phase.most_trials - phase.n_trials for phase in state.phases.values()}
    return limits | {name: len(ids) + later[name] for name, ids in _added(state).items()}


def _added(state: CampaignState) -> dict[str, set[str]]:
    return added_trials({phase.name: phase.trial_ids for phase in state.phases.values()})


def _running(root: Path, event: Mapping[str, Any]) -> Running:
    folder = root / "trials" / event["trial_id"]
    newest, beat = _metrics_tail(folder / "metrics.jsonl").read(), read_heartbeat(folder)
    return Running(
        **{name: event[name] for name in ("trial_id", "phase", "arm", "seed", "steps")},
        step=max(newest.get("step") or 0, beat.step if beat else 0),
        train_loss=newest.get("train_loss"),
        val_loss=newest.get("val_loss"),
        tokens_per_second=newest.get("tokens_per_second"),
    )


class MetricsTail:
    """The newest number of each metric in a file that grows. A long file is read once, and then what is new in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end, self._last = 0, b""  # up to which byte it was read, and the bytes before
        self._newest: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """Returns the newest numbers by name; without a file, none. A half-written last line is left for later."""
        try:
            with naming(self._path), self._path.open("rb") as file:
                file.seek(self._end - len(self._last))
                if file.read(len(self._last)) != self._last:  # another file, or one from which rows were dropped
                    self._end, self._last, self._newest = 0, b"", {}
                    file.seek(0)
                lines, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return {}
        if newline:
            self._end += len(lines) + 1
            self._last = (self._last + lines + newline)[-KEPT_BYTES:]
            for row in parse_rows(lines.decode(errors="replace").split("\n")):
                known = {name: value for name, value in row.items() if is_number(value) and abs(value) <= MAX_NUMBER}
                self._newest |= known
        return self._newest


_metrics_tail = lru_cache(maxsize=MOST_TAILS)(MetricsTail)


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
    """Returns the progress of the campaign in a results directory; works from any process, at any moment of a run.

    Raises:
        ConfigError: there is no campaign in `root`.
        OSError: a trial, or a file of one, is a link.
    """
    refuse_links(root, NOT_FOLLOWED)
    return read_progress(root)[0]


def read_progress(root: Path) -> tuple[Snapshot, CampaignState]:
    """As `read_snapshot`, with the state from which it is made; it is empty before the journal of a run has begun."""
    run = read_activity(root)
    is_alive = is_locked(root) or (run is not None and is_locked(root))  # twice, since another run may be starting
    state = read_replayed(root)
    if not state.campaign:
        return _snapshot_of_start(root, run, is_alive=is_alive), state
    finished = [phase for phase in state.phases.values() if phase.winner is not None]
    summaries = [summarize_phase(state, phase) for phase in finished]
    has_begun = run is None or run.begun
    running = is_alive and has_begun and not state.ended
    url = state.campaign.get("dashboard_url") if running else None
    snapshot = take_snapshot(root, state, running=running, finished_phases=summaries, dashboard_url=url, run=run)
    status = STARTING if is_alive and not has_begun else snapshot.status
    resume = state.campaign["command"] if status in ("interrupted", "incomplete") else None
    return replace(snapshot, alive=is_alive, status=status, resume=resume), state


def _snapshot_of_start(root: Path, run: RunActivity | None, *, is_alive: bool) -> Snapshot:
    """The progress of a run that has not written its journal yet: its data and Ray are being prepared."""
    if run is None:
        if is_alive:
            raise ConfigError(f"a run has just started in {root}: look again in a second")
        hint = "" if root.exists() else "; a run creates it a few seconds after its start, once it has read its file"
        raise ConfigError(f"{root} is not a results directory: it has no journal.jsonl with a campaign in it{hint}")
    until = datetime.now(UTC) if is_alive else datetime.fromisoformat(run.written)
    return Snapshot(
        campaign=run.campaign,
        status=STARTING if is_alive else "incomplete",
        phase=None,
        phase_number=0,
        n_phases=run.phases or 0,
        done=0,
        total=run.trials or 0,
        total_is_final=False,
        reused=0,
        unsuccessful=0,
        elapsed=max(0.0, (until - datetime.fromisoformat(run.started)).total_seconds()),
        eta=None,
        running=(),
        waiting=(),
        best=None,
        metric="",
        dashboard_url=None,
        phases=(),
        smoke=run.smoke,
        alive=is_alive,
        run=run,
    )
