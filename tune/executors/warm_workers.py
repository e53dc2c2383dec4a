"""The scheduler of Ray Tune that keeps workers warm, and follows which nodes they and their trials are on.

Tune has no public interface for most of this, so it reads the controller's own tables.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.util import placement_group_table

from tune.executors.ray_trainable import GPU, UNUSABLE

WAITING_AFTER = 5.0  # seconds without a place in the cluster after which a trial counts as waiting


class TrialSource(Protocol):
    """What the scheduler needs of the searcher."""

    @property
    def workers(self) -> int:
        """The number of trials or groups that can run concurrently."""
        ...

    @property
    def node_ids(self) -> Set[str] | None:
        """The nodes on which trials may stay; None if Ray is private, so that they never change."""
        ...

    @property
    def stops(self) -> bool:
        """Whether no trial starts any more."""
        ...

    def set_waiting(self, trial_ids: Set[str]) -> None:
        """Tells which Tune trials Ray has queued for a while without finding a place for them."""
        ...

    def leave_node(self, trial_id: str) -> None:
        """Asks the trials of a Tune trial to save and stop, to continue on another node."""
        ...

    def worker_died(self, trial_id: str, error: str, nodes: Sequence[str], *, started: bool) -> None:
        """Tells Ray's error for a dead worker, the nodes that it was on, and whether it has ever been ready."""
        ...


class WarmWorkerScheduler(FIFOScheduler):
    """First in, first out; keeps idle workers alive while a phase waits for the last trials of another.

    By default Tune keeps an idle worker only if another trial is already waiting, so all but one would exit at the end
    of each phase, and a new worker takes seconds to import torch. No public setting changes that.

    It also ends workers that can run no further trial, ends idle workers and moves trials on nodes that are going away,
    and gives trials to idle workers on the least busy GPUs.
    """

    def __init__(self, source: TrialSource, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._source, self._clock = source, clock
        self._controller: Any = None  # of Tune, once the first trial was added
        self._reserved = Counter[Any]()  # places for idle workers in Tune's cache, by the resources of a worker
        self._gpus: dict[Any, str] = {}  # of each worker that has chosen one
        # The nodes of a worker are those of its ranks, in their order; it is on the first. Empty if not known.
        self._nodes_of_worker: dict[Any, Sequence[str]] = {}
        self._nodes_of_trial: dict[str, Sequence[str]] = {}
        self._queued_at: dict[str, float] = {}  # by Tune trial without a place: when it was first seen
        self._leaving: set[str] = set()  # Tune trials that were asked to leave their node

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Reserves room for idle workers, since Tune keeps them by their resources and the nodes that they avoid."""
        self._controller = tune_controller
        resources: Any = trial.placement_group_factory
        if resources not in self._reserved:  # the first trial, or the nodes to avoid have changed
            for others, reserved in self._reserved.items():
                tune_controller._actor_cache.increase_max(others, by=-reserved)
            self._reserved = Counter({resources: 0})
        self._resize_cache(tune_controller)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Follows the cluster at each step of Tune, and orders the idle workers, since Tune takes the first ones."""
        self._resize_cache(tune_controller)
        self._find_waiting(tune_controller)
        if self._source.node_ids is not None:
            self._note_nodes(tune_controller)
            self._leave_nodes(tune_controller, self._source.node_ids)
        self._order_idle(tune_controller)
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Notes the GPU of the worker."""
        self._note_gpu(tune_controller, trial, result)
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Ends a worker that can run no further trial. Tune would reuse it, and abort the next trial if it refuses."""
        self._note_gpu(tune_controller, trial, result)
        if result.get(UNUSABLE):
            # Tune keeps only workers that it knows to have started; no public setting makes it end a single one.
            tune_controller._started_actors.discard(tune_controller._trial_to_actor.get(trial))

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Passes Ray's error for a dead worker to the searcher, before Tune calls its `on_trial_complete`."""
        # Tune keeps the exception only for some deaths; an out-of-memory kill is described only in this file.
        error = Path(trial.error_file).read_text() if trial.error_file else ""
        worker = tune_controller._trial_to_actor.get(trial)  # Tune has forgotten it already if it was ready once
        started = worker is None or worker in tune_controller._started_actors
        self._source.worker_died(trial.trial_id, error, self._nodes_of_trial.get(trial.trial_id, ()), started=started)

    def kill_worker(self, trial_id: str | None) -> None:
        """Kills the worker of a Tune trial, wherever it runs; other threads may call this.

        Ray asks the process to exit; one that does not, because it is stopped or hangs, gets a SIGKILL from the Ray of
        its node after 5 s. Tune hears of the death at once.
        """
        trial = next((each for each in self._controller.get_trials() if each.trial_id == trial_id), None)
        worker = self._controller._trial_to_actor.get(trial)
        actor, _ = self._controller._actor_manager._live_actors_to_ray_actors_resources.get(worker, (None, None))
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def _resize_cache(self, tune_controller: Any) -> None:
        """Lets Tune keep as many idle workers as the cluster has room for."""
        for resources, reserved in self._reserved.items():
            tune_controller._actor_cache.increase_max(resources, by=self._source.workers - reserved)
            self._reserved[resources] = self._source.workers

    def _find_waiting(self, tune_controller: Any) -> None:
        """Tells which trials Ray has queued but not placed; once no trial starts any more, takes them back."""
        manager = tune_controller._actor_manager

        def has_place(trial: Trial) -> bool:
            worker = tune_controller._trial_to_actor.get(trial)
            return worker is not None and (manager.is_actor_started(worker) or manager.is_actor_failed(worker))

        queued = [trial for trial in tune_controller._pending_trials if not has_place(trial)]
        now = self._clock()
        self._queued_at = {trial.trial_id: self._queued_at.get(trial.trial_id, now) for trial in queued}
        self._source.set_waiting({name for name, since in self._queued_at.items() if now - since >= WAITING_AFTER})
        for trial in queued if self._source.stops else ():
            tune_controller.stop_trial(trial)

    def _note_nodes(self, tune_controller: Any) -> None:
        """Notes the nodes of each worker, as soon as it has a place, and of the trial that it runs."""
        live = tune_controller._actor_manager._live_actors_to_ray_actors_resources
        self._nodes_of_worker = {worker: nodes for worker, nodes in self._nodes_of_worker.items() if worker in live}
        of_trial = dict[str, Sequence[str]]()
        for worker, trial in tune_controller._actor_to_trial.items():
            if worker in live:
                if worker not in self._nodes_of_worker:
                    bundles = placement_group_table(live[worker][1].placement_group).get("bundles_to_node_id", {})
                    self._nodes_of_worker[worker] = [bundles[index] for index in sorted(bundles)]
                of_trial[trial.trial_id] = self._nodes_of_worker[worker]
        # A failed worker is removed before its trial is known to have failed.
        unfinished = {trial.trial_id for trial in tune_controller._running_trials | tune_controller._pending_trials}
        kept = {name: nodes for name, nodes in self._nodes_of_trial.items() if name in unfinished}
        self._nodes_of_trial = kept | of_trial

    def _leave_nodes(self, tune_controller: Any, usable: Set[str]) -> None:
        """Moves the trials and ends the idle workers of nodes that are being taken away."""
        self._leaving &= self._nodes_of_trial.keys()
        for trial_id, nodes in self._nodes_of_trial.items():
            if not usable >= {*nodes} and trial_id not in self._leaving:
                self._leaving.add(trial_id)
                self._source.leave_node(trial_id)
        cache = tune_controller._actor_cache
        for idle in cache._cached_objects.values():
            for worker in [each for each in idle if not usable >= {*self._nodes_of_worker.get(each, ())}]:
                idle.remove(worker)
                cache._num_cached_objects -= 1
                worker.set_on_stop(None)  # as Tune does for idle workers that it ends
                worker.set_on_error(None)
                with contextlib.suppress(ValueError):  # it has died and is forgotten
                    tune_controller._remove_actor(tracked_actor=worker)

    def _order_idle(self, tune_controller: Any) -> None:
        busy = Counter(self._gpus.get(worker) for worker in tune_controller._actor_to_trial)
        for idle in tune_controller._actor_cache._cached_objects.values():
            left = list(idle)
            idle.clear()
            while left:
                worker = min(left, key=lambda each: busy[self._gpus.get(each)])
                busy[self._gpus.get(worker)] += 1
                left.remove(worker)
                idle.append(worker)

    def _note_gpu(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if result.get(GPU) is not None:
            self._gpus[tune_controller._trial_to_actor[trial]] = result[GPU]
