"""The executor on Ray: trials in parallel on warm workers. It runs in its own process (tune/executors/ray_process.py).

The whole campaign is a single `Tuner.fit` whose searcher asks the session for the next trial. So workers stay warm from
the first trial to the last, across phases. Ray's files go to a temporary folder: only the journal is needed to resume.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.execution import class_cache
from ray.tune.search import Searcher

from ngpt.system.heartbeat import request_stop
from tune.cluster.relay import DriverLink, address_in, start_error
from tune.executors.ray_cluster import RayCluster
from tune.executors.ray_nodes import POLL_SECONDS, describe_change
from tune.executors.ray_trainable import PAUSED, UPDATES, NodeUnfit, TrialWorker
from tune.executors.warm_workers import WarmWorkerScheduler
from tune.machine import placement
from tune.remote.worker import StoreLost
from tune.session.remote import RemoteSession
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import GpuUnusable

OUT_OF_MEMORY = "due to the node running low on memory"  # in Ray's error when its memory monitor kills a worker
NODE_DIED = "its node has died"  # in Ray's error
SCRATCH_PREFIX = ".tune-"  # names Tune's temporary folder in the results directory


def current_umask() -> int:
    """The modes that this process takes from new files, which can only be read by changing it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def run_tuner(session: RemoteSession, cluster: RayCluster, root: Path) -> None:
    """Runs every trial of the session, as many concurrently as the cluster has room for."""
    # Tune would pass AWS credentials to workers in a way that Ray logs. Workers inherit the environment anyway.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(placement.MOST_WORKERS)  # the searcher limits the trials in flight
    for stale in root.glob(f"{SCRATCH_PREFIX}*"):  # left over from a killed run, since this run holds the lock
        shutil.rmtree(stale)
    searcher = SessionSearcher(session, cluster)
    scheduler = WarmWorkerScheduler(searcher)
    if cluster.relay is not None:

        def kill(name: str) -> None:
            scheduler.kill_worker(searcher.tune_trial(name))

        searcher.link = DriverLink(session, cluster.relay, kill)
        searcher.link.start()
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=root, ignore_cleanup_errors=True) as scratch:
        tuner = ray.tune.Tuner(
            TrialWorker,
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=ray.tune.RunConfig(
                name="campaign",
                storage_path=scratch,
                verbose=0,
                stop=searcher.should_stop,
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()


class SessionSearcher(Searcher):
    """Feeds the session's trials to Tune and reports their results to the session.

    A Tune trial is one trial of the campaign, or a group trained in one process (tune/trials/trial_group.py).
    """

    def __init__(
        self, session: RemoteSession, cluster: RayCluster, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(metric="training_iteration", mode="max")
        self._session, self._cluster, self._clock = session, cluster, clock
        self._polled_at = clock()
        self._waiting: Set[str] = frozenset()  # Tune trials
        self._leaving: set[str] = set()  # Tune trials that were asked to leave their node
        self._unfinished: dict[str, dict[str, TrialSpec]] = {}  # by Tune trial id, then by campaign trial id
        self._death_causes: dict[str, tuple[str, str | None]] = {}  # and Ray's reason, by Tune trial id
        self._umask = current_umask()
        self.link: DriverLink | None = None  # to workers on other hosts

    def __getstate__(self) -> dict[str, Any]:
        """Returns nothing: Tune pickles its searcher to restore it, but only the journal restores a campaign."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Returns the config of the next trial or group, which Tune runs as `trial_id`.

        Returns None if no trial can start yet, and FINISHED if none will start any more.
        """
        self.poll()
        if self._session.stop_requested:
            return Searcher.FINISHED
        if len(self._unfinished) >= self._cluster.most_queued:
            return None
        specs = self._session.ask()
        if not specs:
            return Searcher.FINISHED if self._session.is_over() or self._session.stop_requested else None
        self._unfinished[trial_id] = {spec.trial_id: spec for spec in specs}
        config = {"specs": specs, "resources": self._cluster.per_trial, "umask": self._umask}
        config |= {"gpu_slots": self._cluster.gpu_slots, "relay": self._cluster.relay}
        config |= {"uploads": self._cluster.uploads, **self._cluster.ranks}
        return config | {"avoid": self._cluster.avoided}

    def should_stop(self, trial_id: str, report: Mapping[str, Any]) -> bool:
        """Passes a worker's report to the session; returns whether all of the worker's trials have ended."""
        unfinished = self._unfinished[trial_id]
        self._tell(unfinished, report)
        stopped = []
        for name, interim in report[UPDATES].interim.items():
            if name in unfinished and self._session.should_stop(name, interim):
                stopped.append(unfinished.pop(name))
        if unfinished:
            for spec in stopped:  # the worker checks these requests before it continues the other trials
                self._request_stop(spec)  # on a full disk the trial runs to its end; its result is ignored
        return not unfinished

    def _request_stop(self, spec: TrialSpec) -> None:
        with contextlib.suppress(OSError):
            request_stop(spec.folder)
        if self.link is not None:
            self.link.request_stop(spec)

    def _tell(self, unfinished: dict[str, TrialSpec], report: Mapping[str, Any]) -> None:
        for name, parts in report[UPDATES].files.items():
            if name in unfinished:
                self._session.deliver(name, parts)
        for name, result in report[UPDATES].ended.items():
            if unfinished.pop(name, None):
                self._session.tell(name, result)

    @property
    def workers(self) -> int:
        """The number of trials or groups that can run concurrently."""
        return self._cluster.workers

    @property
    def node_ids(self) -> Set[str] | None:
        """The nodes on which trials may stay; None for a private Ray."""
        return self._cluster.node_ids

    @property
    def stops(self) -> bool:
        """Whether a stop was requested, as of the latest reply of the session."""
        return self._session.stop_requested

    def set_waiting(self, trial_ids: Set[str]) -> None:
        """Notes which Tune trials have no place in the cluster; the session is told at the next `poll`."""
        self._waiting = trial_ids

    def leave_node(self, trial_id: str) -> None:
        """Asks the trials of a Tune trial to save and stop, since their node is being taken away."""
        self._leaving.add(trial_id)
        for spec in self._unfinished.get(trial_id, {}).values():
            self._request_stop(spec)  # on a full disk it continues from its newest checkpoint

    def tune_trial(self, name: str) -> str | None:
        """The Tune trial that trains the trial `name` of the campaign, if there is one."""
        return next((trial_id for trial_id, names in list(self._unfinished.items()) if name in names), None)

    def poll(self, *, now: bool = False) -> None:
        """Every few seconds, or `now`, reports which trials wait for a place, and how the cluster has changed.

        The session hears that Ray is alive, and replies whether a stop was requested.
        """
        if not now and self._clock() - self._polled_at < POLL_SECONDS:
            return
        self._polled_at = self._clock()
        if change := self._cluster.look(now=now):
            placed = self._cluster.placement
            text = describe_change(change, placed.workers)
            self._session.resize(placed.workers, placed.trials_per_device, placed.n_gpus, text)
        waiting = (self._unfinished.get(trial_id, {}) for trial_id in sorted(self._waiting))
        self._session.set_waiting([name for specs in waiting for name in specs])

    def worker_died(self, trial_id: str, error: str, nodes: Sequence[str] = (), *, started: bool = True) -> None:
        """Stores the cause of a worker's death, given Ray's error; `on_trial_complete` is called next.

        `nodes` are the ids of those of its ranks, in their order, or of the one that it was on; empty if not known.

        Raises:
            NoUsableNode: no node is left on which workers can start.
        """
        causes = {OUT_OF_MEMORY: "host_oom", GpuUnusable.__name__: "gpu_error", NODE_DIED: "node_lost"}
        causes |= {NodeUnfit.__name__: "node_unfit", StoreLost.__name__: "store_lost"}
        cause = next((cause for text, cause in causes.items() if text in error), "killed")
        if cause == "node_unfit" and nodes:
            rank, reason = NodeUnfit.of_rank(error)
            self._cluster.nodes.set_aside(nodes[rank], reason)
            self._look_for_usable()
        elif cause == "killed" and nodes:
            self.poll(now=True)
            if not all(map(self._cluster.has_node, nodes)):
                cause = "node_lost"
        reason = None
        if not started and cause == "killed":
            reason = start_error(error)
            if self._cluster.address:
                cause = "cannot_start"
                self._cluster.nodes.note_start_failure(next(iter(nodes), address_in(error)), reason)
                self._look_for_usable()
        self._death_causes[trial_id] = cause, reason

    def _look_for_usable(self) -> None:
        self.poll(now=True)
        if self._cluster.resources.wait_for_nodes is None:
            self._cluster.nodes.check_usable()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Reports the trials that died with their worker: those without a result that were not asked to stop."""
        unfinished = self._unfinished.pop(trial_id)
        cause, reason = self._death_causes.pop(trial_id, ("killed", None))
        if result and UPDATES in result:
            self._tell(unfinished, result)
        has_saved, leaves = bool(result and PAUSED in result), trial_id in self._leaving
        self._leaving.discard(trial_id)
        if has_saved and leaves:
            self.poll(now=True)  # a stop may have been requested meanwhile
            cause, reason = "node_lost", None
        if not self._session.stop_requested and (leaves or not has_saved):
            for name in reversed(unfinished):  # each goes to the front of the queue
                self._session.worker_died(name, cause, reason)

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing, like `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Restores nothing."""
