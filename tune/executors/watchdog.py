"""Which running trials hang: their processes live, and they do no more steps.

A deadlock, a file system that does not answer, a GPU that fell off the bus: nothing dies, and nothing goes on. So each
trial leaves a heartbeat (ngpt/system/heartbeat.py), and one whose heartbeat stands still for too long is ended and tried again.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from ngpt.system.heartbeat import Beat

AT_LEAST = 600.0  # seconds: compilation, a long evaluation, a slow disk
STEPS = 20  # or the time of so many steps, where that is longer


@dataclass
class _Watched:
    attempt: int
    since: float  # when the heartbeat was last seen to change
    beat: Beat | None = None
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # seconds each


class Watchdog:
    """Told the heartbeats of all running trials now and then, it says which of them stand still for too long.

    Args:
        stall_timeout: seconds; None: 20 times the median step of the trial, and no less than ten minutes. Before the
            first heartbeat a process has to be started, which always has ten minutes.
    """

    def __init__(self, stall_timeout: float | None = None) -> None:
        self._timeout = stall_timeout
        self._trials: dict[str, _Watched] = {}

    def look(self, beats: Mapping[str, tuple[int, Beat | None]], now: float) -> dict[str, float]:
        """The trials that hang, with the seconds since their last sign of life.

        Args:
            beats: the attempt and the newest heartbeat of every trial that is running.
            now: of a clock that does not jump, seconds.
        """
        self._trials = {trial_id: watched for trial_id, watched in self._trials.items() if trial_id in beats}
        for trial_id, (attempt, beat) in beats.items():
            watched = self._trials.get(trial_id)
            if watched is None or watched.attempt != attempt:
                self._trials[trial_id] = _Watched(attempt, now, beat)
            elif beat != watched.beat:
                _take(watched, beat, now)
        silent = {trial_id: now - watched.since for trial_id, watched in self._trials.items()}
        return {trial_id: seconds for trial_id, seconds in silent.items() if seconds > self.bound(trial_id)}

    def bound(self, trial_id: str) -> float:
        """Seconds that a trial may be silent."""
        watched = self._trials[trial_id]
        if self._timeout is not None:
            return self._timeout if watched.beat else max(self._timeout, AT_LEAST)
        return max(AT_LEAST, STEPS * median(watched.steps)) if watched.steps else AT_LEAST


def _take(watched: _Watched, beat: Beat | None, now: float) -> None:
    before = watched.beat
    if beat and before and beat.pid == before.pid and beat.step > before.step:
        watched.steps.append((now - watched.since) / (beat.step - before.step))
    watched.beat, watched.since = beat, now
