"""The trials that are not finished yet: which of them may start now, which start together, and which must run alone."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from ngpt.ensemble.train import ensemble_incompatibility
from ngpt.system.heartbeat import Heartbeat
from tune.planning.budget import budget_allows
from tune.planning.plan import PlannedTrial
from tune.spec.schema import Campaign
from tune.storage.state import CampaignState
from tune.trials.retries import WorkerDeath, must_run_alone
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import group_size


class TrialQueue:
    """Trials in the order in which they start, within the budget of the campaign.

    Args:
        campaign: what runs; its budget and `resources.vectorise` apply here.
        state: what the journal holds.
        seconds_used: returns the time spent on the campaign in all sessions.
        heartbeats: returns the attempt and the newest heartbeat of every running trial.
    """

    def __init__(
        self,
        campaign: Campaign,
        state: CampaignState,
        *,
        seconds_used: Callable[[], float],
        heartbeats: Callable[[], Mapping[str, tuple[int, Heartbeat | None]]],
    ) -> None:
        self._budget, self._max_group = campaign.budget, campaign.resources.vectorise
        self._state, self._seconds_used, self._heartbeats = state, seconds_used, heartbeats
        self._waiting: deque[PlannedTrial] = deque()
        self._unfinished: dict[str, PlannedTrial] = {}  # waiting or running, by id
        self._deaths: defaultdict[str, list[WorkerDeath]] = defaultdict(list)  # of workers, by trial id
        self._leaders: dict[str, str] = {}  # the first trial of the group in which a trial was started

    @property
    def waiting(self) -> tuple[PlannedTrial, ...]:
        """Trials that have not started, or have to start again."""
        return tuple(self._waiting)

    def __contains__(self, trial_id: str) -> bool:
        """Whether a trial waits or runs."""
        return trial_id in self._unfinished

    def __getitem__(self, trial_id: str) -> PlannedTrial:
        """The waiting or running trial with this id."""
        return self._unfinished[trial_id]

    def add(self, trials: Iterable[PlannedTrial]) -> None:
        """Appends trials that wait for their first start."""
        for trial in trials:
            self._unfinished[trial.trial_id] = trial
            self._waiting.append(trial)

    def start_next(self, start: Callable[[PlannedTrial], TrialSpec], *, workers: int) -> list[TrialSpec]:
        """Starts the next trial, and those to train together with it, as many as an equal share of `workers` allows.

        A trial that has lost a worker runs in a process of its own, so that it cannot cost other trials theirs.

        Args:
            start: journals a trial as started. The budget counts it before the next one is considered.
            workers: trials or groups that can run at once.
        """
        first = next(filter(self._may_start, self._waiting), None)
        if first is None:
            return []
        unharmed = [trial for trial in self._waiting if trial is not first and trial.trial_id not in self._deaths]
        size = 1
        if self._max_group > 1 and first.trial_id not in self._deaths:
            size = group_size(len(unharmed) + 1, self._free_workers(workers), max_size=self._max_group)
        started = [self._start(first, first, start)]
        for trial in unharmed:
            if len(started) == size:
                break
            if self._may_start(trial) and ensemble_incompatibility([first.config, trial.config]) is None:
                started.append(self._start(trial, first, start))
        return started

    def start_again(self, trial: PlannedTrial) -> None:
        """Puts a running trial first in the queue."""
        self._waiting.appendleft(trial)

    def drop(self, trial: PlannedTrial) -> None:
        """Takes a waiting trial out of the queue; it is unfinished until `finish`."""
        self._waiting.remove(trial)

    def finish(self, trial_id: str) -> PlannedTrial:
        """Forgets a trial that has a result."""
        return self._unfinished.pop(trial_id)

    def record_death(self, trial_id: str, death: WorkerDeath) -> Sequence[WorkerDeath]:
        """Notes that a worker died under a trial; returns all such deaths of this session."""
        self._deaths[trial_id].append(death)
        return self._deaths[trial_id]

    def is_blocked(self) -> bool:
        """Whether trials wait, none runs and the budget lets none start."""
        return bool(self._waiting) and not self._state.running and not any(map(self._may_start, self._waiting))

    def _start(
        self, trial: PlannedTrial, leader: PlannedTrial, start: Callable[[PlannedTrial], TrialSpec]
    ) -> TrialSpec:
        self._waiting.remove(trial)
        self._leaders[trial.trial_id] = leader.trial_id
        return start(trial)

    def _free_workers(self, workers: int) -> int:
        """Workers without a trial, or at least halfway through theirs; at least 1."""
        beats = {trial_id: beat for trial_id, (_, beat) in self._heartbeats().items()}
        steps = {trial_id: event["steps"] for trial_id, event in self._state.running.items()}
        early = [trial_id for trial_id, beat in beats.items() if beat is None or 2 * beat.step < steps[trial_id]]
        return max(1, workers - len({self._leaders[trial_id] for trial_id in early}))

    def _may_start(self, trial: PlannedTrial) -> bool:
        if not self._has_room(trial):
            return False
        if trial.trial_id in self._deaths:  # it had started before the budget was used up
            return True
        return budget_allows(self._budget, self._state, trial.trial_id, self._seconds_used())

    def _has_room(self, trial: PlannedTrial) -> bool:
        """Whether a trial may run beside those that run; after the machine ran out of memory, a trial runs alone."""
        if any(map(self._is_alone, self._state.running)):
            return False
        if self._is_alone(trial.trial_id):
            return not self._state.running
        return not any(self._is_alone(other.trial_id) for other in self._waiting)

    def _is_alone(self, trial_id: str) -> bool:
        return trial_id in self._deaths and must_run_alone(self._deaths[trial_id])
