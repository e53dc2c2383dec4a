"""The executor on Ray: trials in parallel on warm workers.

The whole campaign is a single `Tuner.fit`, fed by a searcher that asks the session for the next trial. So the
workers stay warm from the first trial to the last, across phases. Ray remembers nothing: its files go to a temporary
folder, and what it would restore from them is in our journal.
"""

import logging
import os
import tempfile
from typing import Any

import ray
import ray.tune
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tune.campaign import Resources
from tune.inline import stop_on_signal
from tune.session import Session
from tune.trainable import RESULT, TrialWorker

# Ray Tune writes nothing of value for us: no loggers, no snapshots; and signals are ours (see inline.py).
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run_on_ray(session: Session, cluster: "RayCluster") -> None:
    """Runs every trial on a started cluster, as many at once as it has room for.

    Raises:
        RuntimeError: Ray stopped before the campaign was over.
    """
    with tempfile.TemporaryDirectory(prefix="ngpt-tune-") as scratch, stop_on_signal(session):
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(TrialWorker, cluster.per_trial),
            tune_config=ray.tune.TuneConfig(
                search_alg=Feeder(session, cluster.workers), num_samples=-1, reuse_actors=True
            ),
            run_config=ray.tune.RunConfig(
                name="campaign",
                storage_path=scratch,
                verbose=0,
                stop=StopRequested(session),
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    if not session.is_over() and not session.stop_requested:
        raise RuntimeError("Ray ended before the campaign was over; give the same command again to go on")


class Unpickled:
    """Tune pickles what it is given, to restore from it; we never do, and a session holds locks and open files."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Feeder(Unpickled, Searcher):
    """Tune's source of trials: hands out what the session says is next, and tells it what came of it.

    It returns None while a phase waits for another one's winner, and FINISHED after the last phase.
    """

    def __init__(self, session: Session, workers: int) -> None:
        super().__init__(metric="training_iteration", mode="max")
        self._session, self._workers = session, workers
        self._given: dict[str, str] = {}  # our trial id by Tune's

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._session.stop_requested:
            return Searcher.FINISHED
        if len(self._given) >= self._workers:
            return None
        spec = self._session.next_trial()
        if spec is None:
            return Searcher.FINISHED if self._session.is_over() else None
        self._given[trial_id] = spec.trial_id
        return {"spec": spec}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        ours = self._given.pop(trial_id)
        if result and RESULT in result:
            self._session.trial_ended(ours, result[RESULT])
        elif not self._session.stop_requested:
            self._session.worker_died(ours, "it was killed or crashed" if error else "it stopped without a result")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the memory."""


class StopRequested(Unpickled, Stopper):
    """Ends the experiment when the session was asked to stop."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._session.stop_requested

    def stop_all(self) -> bool:
        return self._session.stop_requested


class RayCluster:
    """A private Ray on this machine, or a running one by address, for as long as the block lasts."""

    def __init__(self, resources: Resources, *, address: str | None = None) -> None:
        self.resources, self.address = resources, address
        self.dashboard_url: str | None = None

    def __enter__(self) -> "RayCluster":
        os.environ.update(QUIET)
        local = {"num_cpus": self._cpus(), "include_dashboard": True, "dashboard_host": "127.0.0.1"}
        previous = os.umask(0o077)  # Ray writes an authentication token
        try:
            context = ray.init(
                address=self.address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **({} if self.address else local),
            )
        finally:
            os.umask(previous)
        url = context.dashboard_url
        self.dashboard_url = f"http://{url}" if url else None
        self.per_trial = self._per_trial(ray.cluster_resources())
        self.workers = self._fit(ray.cluster_resources())
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def _cpus(self) -> int:
        """As many as there are, or enough for the workers that were asked for."""
        here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = (self.resources.workers or 1) * self.resources.cpus_per_trial
        return max(here, wanted)

    def _per_trial(self, cluster: dict[str, float]) -> dict[str, float]:
        share = self.resources.gpus_per_trial
        gpus = (1.0 if cluster.get("GPU") else 0.0) if share == "auto" else float(share)
        # Always said, even when it is none: a trial that asks for nothing sees every GPU.
        return {"cpu": float(self.resources.cpus_per_trial), "gpu": gpus}

    def _fit(self, cluster: dict[str, float]) -> int:
        rooms = [cluster.get("CPU", 1) // self.per_trial["cpu"]]
        if self.per_trial["gpu"]:
            rooms.append(cluster.get("GPU", 0) // self.per_trial["gpu"])
        return max(1, min(int(min(rooms)), self.resources.workers or 1_000_000))
