"""Finds running trials that hang: their processes live, but make no more steps.

A deadlock, a file system that does not answer or a GPU that fell off the bus kills nothing. So every trial writes a
heartbeat (ngpt/system/heartbeat.py), and a trial whose heartbeat does not change for too long is killed and retried.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from ngpt.system.heartbeat import Heartbeat

MIN_TIMEOUT = 600.0  # seconds: compilation, a long evaluation, a slow disk
TIMEOUT_STEPS = 20  # median steps after which a trial hangs, if they take longer than that


@dataclass
class _Watched:
    attempt: int
    changed_at: float  # when the heartbeat was last seen to change
    beat: Heartbeat | None = None
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=50))


class Watchdog:
    """Compares the heartbeats of all running trials with those it saw before.

    A trial hangs after `stall_timeout` seconds without a step; None: 20 times its median step, and at least ten
    minutes. A process always has ten minutes to start.
    """

    def __init__(self, stall_timeout: float | None = None) -> None:
        self._stall_timeout = stall_timeout
        self._trials: dict[str, _Watched] = {}

    def find_hung(self, beats: Mapping[str, tuple[int, Heartbeat | None]], now: float) -> dict[str, float]:
        """The trials that hang, with the seconds since their heartbeat last changed.

        `beats` holds the attempt and the newest heartbeat of every running trial.
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
        """Seconds that a watched trial may go without a change of its heartbeat."""
        watched = self._trials[trial_id]
        if self._stall_timeout is not None:
            return self._stall_timeout if watched.beat else max(self._stall_timeout, MIN_TIMEOUT)
        return max(MIN_TIMEOUT, TIMEOUT_STEPS * median(watched.step_seconds)) if watched.step_seconds else MIN_TIMEOUT
