"""Decides which unfinished trials may start now, which train as a group, and which must run alone."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping

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
    """Unfinished trials in start order, within the budget of the campaign.

    `seconds_used` returns the time spent on the campaign in all sessions. `heartbeats` returns the attempt number and
    newest heartbeat of every running trial that has a worker.

    Attributes:
        waiting: trials that have to start or restart.
        unfinished: all trials without a result, by id.
        deaths: the worker deaths of each trial in this session, by id.
    """

    def __init__(
        self,
        campaign: Campaign,
        state: CampaignState,
        *,
        seconds_used: Callable[[], float],
        heartbeats: Callable[[], Mapping[str, tuple[int, Heartbeat | None]]],
    ) -> None:
        self._budget, self._max_group_size = campaign.budget, campaign.resources.vectorise
        self._state, self._seconds_used, self._heartbeats = state, seconds_used, heartbeats
        self.waiting = deque[PlannedTrial]()
        self.unfinished: dict[str, PlannedTrial] = {}
        self.deaths = defaultdict[str, list[WorkerDeath]](list)
        self._leaders: dict[str, str] = {}  # trial id -> id of the first trial in its group

    def add(self, trials: Iterable[PlannedTrial]) -> None:
        """Appends trials that have not started yet."""
        for trial in trials:
            self.unfinished[trial.trial_id] = trial
            self.waiting.append(trial)

    def start_next(self, start: Callable[[PlannedTrial], TrialSpec], *, workers: int) -> list[TrialSpec]:
        """Starts the next trial, or group of trials to train in one process, and returns its specs.

        Groups are sized to divide the waiting trials equally among the free workers. A trial whose worker has died
        runs in a process of its own, so that it cannot crash other trials.

        Args:
            start: journals a trial as started, so that the budget counts it before the next trial is considered.
            workers: number of trials or groups that can run concurrently.
        """
        first = next(filter(self._may_start, self.waiting), None)
        if first is None:
            return []
        companions: list[PlannedTrial] = []
        size = 1
        if self._max_group_size > 1 and self._may_join(first):
            companions = [trial for trial in self.waiting if trial is not first and self._may_join(trial)]
            size = group_size(len(companions) + 1, self._free_workers(workers), max_size=self._max_group_size)
        started: list[TrialSpec] = []
        for trial in (first, *companions):
            if len(started) == size:
                break
            configs = [first.config, trial.config]
            if trial is first or (self._may_start(trial) and ensemble_incompatibility(configs) is None):
                self.waiting.remove(trial)
                self._leaders[trial.trial_id] = first.trial_id
                started.append(start(trial))
        return started

    def _may_join(self, trial: PlannedTrial) -> bool:
        """Whether a trial may train in a group; one that is trained only runs its downstream tasks."""
        result = self._state.results.get(trial.trial_id)
        return trial.trial_id not in self.deaths and (result is None or result["status"] != "finished")

    def is_blocked(self) -> bool:
        """Returns whether trials are waiting, none is running and the budget allows none to start."""
        return bool(self.waiting) and not self._state.running and not any(map(self._may_start, self.waiting))

    def _free_workers(self, workers: int) -> int:
        """Returns the number of workers that are idle or at least halfway through their trials; at least 1."""
        beats = {trial_id: beat for trial_id, (_, beat) in self._heartbeats().items()}
        steps = {trial_id: event["steps"] for trial_id, event in self._state.running.items()}
        # A trial without a heartbeat is about to start, or waits for room and takes the next free worker.
        early = [i for i, n_steps in steps.items() if (beat := beats.get(i)) is None or 2 * beat.step < n_steps]
        return max(1, workers - len({self._leaders[trial_id] for trial_id in early}))

    def _may_start(self, trial: PlannedTrial) -> bool:
        if not self._has_room(trial):
            return False
        is_restart = trial.trial_id in self.deaths  # the budget allowed its first start
        return is_restart or budget_allows(self._budget, self._state, trial.trial_id, self._seconds_used())

    def _has_room(self, trial: PlannedTrial) -> bool:
        """Returns whether a trial may run now; one that ran out of host memory runs alone, before the other trials."""
        if any(map(self._must_run_alone, self._state.running)):
            return False
        if self._must_run_alone(trial.trial_id):
            return not self._state.running
        # Without a death, thousands of waiting trials need no look.
        return not self.deaths or not any(self._must_run_alone(other.trial_id) for other in self.waiting)

    def _must_run_alone(self, trial_id: str) -> bool:
        return trial_id in self.deaths and must_run_alone(self.deaths[trial_id])
