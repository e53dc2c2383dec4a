"""Tune's scheduler as this project extends it: warm workers, trials without a place, nodes that come and go."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.utils.object_cache import _ObjectCache

from tests.helpers.tiny_campaign import begun, pretend, session_on, write_file
from tests.helpers.tune_in_process import fixed_cluster, run_in_process
from tune.executors.ray_executor import SessionSearcher
from tune.executors.ray_trainable import GPU, UNUSABLE, UPDATES, TrialWorker
from tune.executors.warm_workers import WAITING_AFTER, WarmWorkerScheduler
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import Updates


@pytest.fixture
def small(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    return write_file(tmp_path, corpus)


def source(**fields: Any) -> Any:
    """A searcher for the scheduler, which keeps what it is told in `waiting`, `left` and `died`."""
    told: dict[str, Any] = {"workers": 2, "node_ids": None, "stops": False, "waiting": set(), "left": [], "died": []}
    about = SimpleNamespace(**(told | fields))
    about.set_waiting = lambda trial_ids: setattr(about, "waiting", trial_ids)
    about.leave_node = about.left.append
    about.worker_died = lambda *death, started: about.died.append((*death, started))
    return about


def controller(*idle: str, **trials: str) -> Any:
    """The parts of Tune's controller that the scheduler changes: idle workers, and busy ones by their trials."""
    cache = _ObjectCache()
    cache.increase_max("resources", by=len(idle))
    for worker in idle:
        cache.cache_object("resources", worker)
    workers = {worker: trial for trial, worker in trials.items()}
    started = {*idle, *workers}
    return SimpleNamespace(
        get_trials=list,
        _actor_cache=cache,
        _actor_to_trial=workers,
        _trial_to_actor=trials,
        _started_actors=started,
        _pending_trials=set(),
        _actor_manager=None,
    )


@pytest.mark.parametrize("unusable", [False, True])
def test_a_worker_that_can_run_no_further_trial_is_not_kept(unusable: bool) -> None:
    scheduler: Any = WarmWorkerScheduler(source())
    tune = controller(trial="worker", other="another")
    scheduler.on_trial_complete(tune, "trial", {UPDATES: Updates()} | ({UNUSABLE: True} if unusable else {}))
    assert tune._started_actors == ({"another"} if unusable else {"worker", "another"})


def test_a_trial_that_fails_on_a_gpu_costs_its_worker_and_no_other_trial(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's own controller. If a worker refused a trial, Tune would abort it, and the campaign would wait for ever."""
    monkeypatch.setattr("ray._private.worker._changeproctitle", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("ngpt.system.gpus.is_available", lambda: True)
    monkeypatch.setattr("ngpt.system.gpus.is_in_use", lambda: True)
    monkeypatch.setattr("ngpt.system.gpus.release_unused", lambda: None)
    trained: list[TrialSpec] = []

    def run_trials(specs: Sequence[TrialSpec]) -> Iterator[Updates]:
        (spec,) = specs
        trained.append(spec)
        yield Updates(ended={spec.trial_id: pretend(spec, status="failed" if len(trained) == 1 else "finished")})

    monkeypatch.setattr("tune.executors.ray_trainable.run_trials", run_trials)
    cluster = fixed_cluster(2, per_trial={"CPU": 1.0, "GPU": 1.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session, workers=2), cluster)
        scheduler = WarmWorkerScheduler(searcher)
        workers = run_in_process(TrialWorker, searcher, scheduler, tmp_path / "tune", should_stop=searcher.should_stop)
        statuses = sorted(result["status"] for result in session.state.results.values())
        assert statuses == ["failed"] + ["finished"] * 5
        assert not any(event["event"] == "worker_died" for event in session.journal.events)
    assert len(workers) == 3
    assert {spec.attempt for spec in trained} == {1}


def test_idle_workers_on_the_least_busy_gpus_get_the_next_trials() -> None:
    scheduler: Any = WarmWorkerScheduler(source())
    for worker, gpu in {"a": "0", "b": "0", "c": "1", "d": "1", "busy": "0"}.items():
        scheduler.on_trial_result(controller(trial=worker), "trial", {GPU: gpu})
    tune = controller("a", "b", "c", "d", trial="busy")
    scheduler.choose_trial_to_run(tune)
    assert [tune._actor_cache.pop_cached_object("resources") for _ in range(4)] == ["c", "a", "d", "b"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Queued:
    """A trial of Tune."""

    trial_id: str
    error_file: str | None = None


class Cluster:
    """A controller of Tune with trials on workers, each with a place on a node, and trials without a place."""

    def __init__(self, placed: dict[str, str], queued: Sequence[str] = (), idle: dict[str, str] | None = None) -> None:
        self.nodes = {f"worker of {name}": node for name, node in placed.items()} | (idle or {})
        live = {worker: (None, SimpleNamespace(placement_group=node)) for worker, node in self.nodes.items()}
        self.trials = {name: Queued(name) for name in (*placed, *queued)}
        self.ended: list[str] = []
        self.tune = controller(*(idle or {}), **{name: f"worker of {name}" for name in self.trials})
        self.tune._trial_to_actor = {self.trials[name]: worker for name, worker in self.tune._trial_to_actor.items()}
        self.tune._actor_to_trial = {worker: trial for trial, worker in self.tune._trial_to_actor.items()}
        self.tune._pending_trials = {self.trials[name] for name in queued}
        self.tune._running_trials = {self.trials[name] for name in placed}
        self.tune._actor_manager = SimpleNamespace(
            _live_actors_to_ray_actors_resources=live,
            is_actor_started=live.__contains__,
            is_actor_failed=lambda _: False,
        )
        self.tune._remove_actor = lambda tracked_actor: self.ended.append(tracked_actor)
        self.tune.stop_trial = lambda trial: self.ended.append(trial.trial_id)


def test_a_trial_that_ray_cannot_place_is_waiting_until_it_has_a_place() -> None:
    clock, about = Clock(), source()
    scheduler, cluster = WarmWorkerScheduler(about, clock=clock), Cluster({"a": "n1"}, ["b"])
    scheduler.choose_trial_to_run(cluster.tune)
    clock.now = WAITING_AFTER / 2
    scheduler.choose_trial_to_run(cluster.tune)
    assert about.waiting == set(), "it may have just been handed over"
    clock.now = WAITING_AFTER
    scheduler.choose_trial_to_run(cluster.tune)
    assert about.waiting == {"b"} and cluster.ended == []
    cluster.tune._actor_manager._live_actors_to_ray_actors_resources["worker of b"] = (None, None)
    scheduler.choose_trial_to_run(cluster.tune)
    assert about.waiting == set(), "its worker is starting"


def test_after_a_stop_trials_without_a_place_are_taken_back() -> None:
    scheduler, cluster = WarmWorkerScheduler(source(stops=True)), Cluster({"a": "n1"}, ["b", "c"])
    scheduler.choose_trial_to_run(cluster.tune)
    assert sorted(cluster.ended) == ["b", "c"]


def test_as_many_idle_workers_are_kept_as_the_cluster_has_room_for() -> None:
    about = source(workers=2)
    scheduler, tune = WarmWorkerScheduler(about), controller()
    scheduler.on_trial_add(tune, SimpleNamespace(placement_group_factory="one CPU"))  # type: ignore[arg-type]
    kept = []
    for about.workers in (2, 5, 0, 3):
        scheduler.on_trial_add(tune, SimpleNamespace(placement_group_factory="one CPU"))  # type: ignore[arg-type]
        kept.append(tune._actor_cache.total_max_objects)
    assert kept == [2, 5, 0, 3]


def test_trials_and_idle_workers_leave_a_node_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker(str):
        def set_on_stop(self, _: None) -> None: ...

        def set_on_error(self, _: None) -> None: ...

    def table(at: str) -> dict[str, Any]:  # in any order
        return {"bundles_to_node_id": dict(reversed([*enumerate(at.split())]))}

    monkeypatch.setattr("tune.executors.warm_workers.placement_group_table", table)
    about = source(node_ids={"n1", "n2"})
    scheduler = WarmWorkerScheduler(about)
    idle = {Worker("idle1"): "n1", Worker("idle2"): "n2"}
    cluster = Cluster({"a": "n1", "b": "n1 n2"}, ["c"], idle)  # type: ignore[arg-type]
    scheduler._nodes_of_worker = {worker: [node] for worker, node in idle.items()}
    scheduler.choose_trial_to_run(cluster.tune)
    assert (about.left, cluster.ended) == ([], [])
    about.node_ids = {"n1"}
    for _ in range(2):
        scheduler.choose_trial_to_run(cluster.tune)
    assert (about.left, cluster.ended) == (["b"], ["idle2"])
    assert cluster.tune._actor_cache.num_cached_objects == 1
    scheduler.on_trial_error(cluster.tune, cluster.trials["b"])  # type: ignore[arg-type]
    assert about.died == [("b", "", ["n1", "n2"], True)]
