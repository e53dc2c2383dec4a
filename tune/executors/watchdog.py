"""Finds trials that hang, whose process is alive but makes no progress, and those that the kernel has killed.

A deadlock, an unresponsive file system or a GPU that fell off the bus does not end the process. So every trial writes a
heartbeat (ngpt/system/heartbeat.py), and a trial whose heartbeat does not change for too long is killed and retried.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from ngpt.system.heartbeat import Heartbeat
from tune.session.session import Session
from tune.trials.retries import oom_kill_count

MIN_TIMEOUT = 600.0  # seconds, to allow for compilation, a long evaluation or a slow disk
OOM_KILL_SECONDS = 30.0  # a worker that dies this soon after an OOM kill counts as its victim
TIMEOUT_STEPS = 20  # a timeout of this many median steps, if that is longer


@dataclass
class _Watched:
    attempt: int
    changed_at: float  # when the heartbeat was last seen to change
    beat: Heartbeat | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=50))


class Watchdog:
    """Compares the heartbeats of all running trials with those of the previous call.

    A trial hangs if it makes no step for `stall_timeout` seconds. The default timeout is 20 times its median step time,
    and at least ten minutes. A process always has at least ten minutes to make its first step.
    """

    def __init__(self, stall_timeout: float | None = None) -> None:
        self._stall_timeout = stall_timeout
        self._trials: dict[str, _Watched] = {}

    def find_hung(self, beats: Mapping[str, tuple[int, Heartbeat | None]], now: float) -> dict[str, float]:
        """Returns the seconds since the last change of the heartbeat for every trial that hangs, by trial id.

        `beats` holds the attempt number and newest heartbeat of every running trial.
        """
        self._trials = {trial_id: watched for trial_id, watched in self._trials.items() if trial_id in beats}
        for trial_id, (attempt, beat) in beats.items():
            watched = self._trials.get(trial_id)
            if watched is None or watched.attempt != attempt:
                self._trials[trial_id] = _Watched(attempt, now, beat)
            elif beat != (before := watched.beat):
                if beat and before and beat.pid == before.pid and beat.step > before.step:
                    watched.step_seconds.append((now - watched.changed_at) / (beat.step - before.step))
                watched.beat, watched.changed_at = beat, now
        silent = {trial_id: now - watched.changed_at for trial_id, watched in self._trials.items()}
        return {trial_id: seconds for trial_id, seconds in silent.items() if seconds > self.timeout(trial_id)}

    def timeout(self, trial_id: str) -> float:
        """Returns how many seconds the heartbeat of a watched trial may stay unchanged."""
        watched = self._trials[trial_id]
        if self._stall_timeout is not None:
            has_trained = watched.beat is not None and watched.beat.step > watched.beat.began
            return self._stall_timeout if has_trained else max(self._stall_timeout, MIN_TIMEOUT)
        return max(MIN_TIMEOUT, TIMEOUT_STEPS * median(watched.step_seconds)) if watched.step_seconds else MIN_TIMEOUT


class Heartbeats:
    """The heartbeats of running trials: from their files, and as workers of a cluster report them through Ray."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._relayed: dict[str, tuple[int, Heartbeat]] = {}  # attempt and heartbeat, by trial
        self._copied: set[str] = set()  # trials whose own files are not seen here

    def receive(self, beats: Mapping[str, tuple[int, Heartbeat]]) -> None:
        """Takes what workers have reported, and writes the files that are not seen here."""
        seen = self._session.heartbeats() if beats else {}
        for trial_id, (attempt, beat) in beats.items():
            running_attempt, own = seen.get(trial_id, (None, None))
            if attempt == running_attempt:
                self._relayed[trial_id] = attempt, beat
                if own is None or own.process != beat.process or trial_id in self._copied:
                    self._copied.add(trial_id)
                    self._session.copy_heartbeat(trial_id, beat)

    def newest(self) -> dict[str, tuple[int, Heartbeat | None]]:
        """Returns the attempt and the newest heartbeat of every running trial, by trial id."""
        beats = self._session.heartbeats()
        self._relayed = {trial_id: each for trial_id, each in self._relayed.items() if trial_id in beats}
        for trial_id, (attempt, beat) in self._relayed.items():
            running, seen = beats[trial_id]
            if attempt == running and (seen is None or seen.step < beat.step):
                beats[trial_id] = attempt, beat
        return beats


class OomKiller:
    """The kills of the kernel's OOM killer since this was made."""

    def __init__(self) -> None:
        self._count = oom_kill_count()
        self._killed_at = -math.inf

    def has_killed(self, now: float) -> bool:
        """Returns whether it has killed a process within `OOM_KILL_SECONDS`, as far as these calls have seen it."""
        count = oom_kill_count()
        if count > self._count:
            self._count, self._killed_at = count, now
        return now - self._killed_at < OOM_KILL_SECONDS
