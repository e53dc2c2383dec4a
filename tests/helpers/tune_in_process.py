"""Ray Tune's own controller with workers in this process, to test how it treats them without starting Ray."""

import itertools
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.tune.execution import tune_controller
from ray.tune.experiment import Experiment
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from tune.executors.ray_nodes import NodeChange

MOST_EVENTS = 2_000  # of a run that is taken to hang


class _Handle:
    """A worker as Tune sees it."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.get_auto_filled_metrics = SimpleNamespace(remote=worker.get_auto_filled_metrics)


class InProcessActors:
    """What Tune's controller uses of Ray's actor manager. Each call of `next` handles one event."""

    slots = 2
    created: list[Any]  # the workers, in the order in which they started

    def __init__(self, resource_manager: Any = None) -> None:
        self.created = []
        self._ids = itertools.count()
        self._live_actors_to_ray_actors_resources: dict[TrackedActor, tuple[Any, None]] = {}
        self._pending = deque[tuple[TrackedActor, Any, dict[str, Any]]]()
        self._tasks = deque[tuple[TrackedActor, Callable[[], object]]]()

    def next(self, timeout: float | None = None) -> bool:
        live = self._live_actors_to_ray_actors_resources
        if self._pending and len(live) < self.slots:
            actor, cls, arguments = self._pending.popleft()
            worker = cls.__ray_metadata__.modified_class(**arguments)
            self.created.append(worker)
            live[actor] = _Handle(worker), None
            if actor._on_start:
                actor._on_start(actor)
            return True
        if self._tasks:
            self._tasks.popleft()[1]()
            return True
        return False

    def add_actor(self, cls: Any, resource_request: Any, kwargs: dict[str, Any], **callbacks: Any) -> TrackedActor:
        actor = TrackedActor(next(self._ids), **callbacks)
        self._pending.append((actor, cls, kwargs))
        return actor

    def remove_actor(self, tracked_actor: TrackedActor, kill: bool = False, stop_future: Any = None) -> bool:
        if tracked_actor not in self._live_actors_to_ray_actors_resources:
            self._pending = deque(entry for entry in self._pending if entry[0] != tracked_actor)
            return False

        def stop() -> None:
            self._live_actors_to_ray_actors_resources.pop(tracked_actor)[0].worker.stop()
            if tracked_actor._on_stop:
                tracked_actor._on_stop(tracked_actor)

        self._tasks.append((tracked_actor, stop))
        return True

    def schedule_actor_task(
        self,
        tracked_actor: TrackedActor,
        method_name: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        on_result: Callable[..., object] | None = None,
        on_error: Callable[..., object] | None = None,
        _return_future: bool = False,
    ) -> None:
        if _return_future:  # of `stop`, which `remove_actor` calls
            return
        worker = self._live_actors_to_ray_actors_resources[tracked_actor][0].worker

        def run() -> None:
            try:
                value = getattr(worker, method_name)(*args, **(kwargs or {}))
            except Exception as error:
                if on_error:
                    on_error(tracked_actor, error)
                return
            if on_result:
                on_result(tracked_actor, value)

        self._tasks.append((tracked_actor, run))

    def clear_actor_task_futures(self, tracked_actor: TrackedActor) -> None:
        self._tasks = deque(task for task in self._tasks if task[0] != tracked_actor)

    def is_actor_started(self, tracked_actor: TrackedActor) -> bool:
        return tracked_actor in self._live_actors_to_ray_actors_resources

    def is_actor_failed(self, tracked_actor: TrackedActor) -> bool:
        return False

    def get_live_actors_resources(self) -> dict[str, float]:
        return {}

    @property
    def num_live_actors(self) -> int:
        return len(self._live_actors_to_ray_actors_resources)

    @property
    def num_pending_actors(self) -> int:
        return len(self._pending)

    @property
    def num_actor_tasks(self) -> int:
        return len(self._tasks)


def run_in_process(
    trainable: type, searcher: Searcher, scheduler: Any, folder: Path, *, should_stop: Callable[..., bool]
) -> list[Any]:
    """Runs every trial of the searcher; returns the workers in the order in which they started. Fails if Tune hangs."""
    search = SearchGenerator(searcher)
    experiment = Experiment("campaign", trainable, stop=should_stop, storage_path=str(folder), num_samples=sys.maxsize)
    search.add_configurations(experiment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_controller, "RayActorManager", InProcessActors)
        patch.setattr(tune_controller.TuneController, "checkpoint", lambda *_, **__: None)
        patch.setattr("ray.train._internal.storage._get_ray_train_session_dir", lambda: str(folder / "session"))
        patch.setenv("TUNE_MAX_PENDING_TRIALS_PG", str(InProcessActors.slots))
        controller = tune_controller.TuneController(
            search_alg=search,
            scheduler=scheduler,
            stopper=experiment.stopper,
            storage=experiment.storage,
            reuse_actors=True,
            resource_manager_factory=partial(object),
        )
        for _ in range(MOST_EVENTS):
            if controller.is_finished():
                return controller._actor_manager.created
            controller.step()
    pytest.fail("Tune did not finish")


def fixed_cluster(workers: int, *, per_trial: dict[str, float] | None = None) -> Any:
    """What the searcher uses of a cluster whose nodes never change."""
    about: dict[str, Any] = {"workers": workers, "most_queued": workers, "per_trial": per_trial or {}, "avoided": []}
    about |= dict.fromkeys(("gpu_slots", "node_ids", "address", "relay", "uploads"))
    about["ranks"] = {}
    return SimpleNamespace(**about, look=lambda **_: NodeChange())
