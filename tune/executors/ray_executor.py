"""The executor on Ray: trials in parallel on warm workers. It runs in its own process (tune/executors/ray_process.py).

The whole campaign is a single `Tuner.fit` whose searcher asks the session for the next trial. So workers stay warm from
the first trial to the last, across phases. Ray's files go to a temporary folder: only the journal is needed to resume.
"""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.ray_constants
import ray._private.worker
import ray.tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from ngpt.system import gpus
from ngpt.system.heartbeat import request_stop
from tune.executors.gpu_slots import GpuSlots
from tune.executors.ray_folder import TEMPORARY, TOKEN_FILE, TOKEN_PATH_VARIABLE, TOKEN_VARIABLE
from tune.executors.ray_trainable import GPU, PAUSED, UNUSABLE, UPDATES, TrialWorker
from tune.machine.placement import place, this_machine
from tune.machine.ray_limits import OBJECT_STORE, ray_root
from tune.spec.schema import Resources
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import GpuUnusable

# Turns off the loggers and snapshots of Ray Tune, and its signal handler (tune/executors/signals.py replaces it).
RAY_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_prestart_worker_first_driver": "0",  # it would start idle workers that no trial uses
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
OUT_OF_MEMORY = "due to the node running low on memory"  # in Ray's error when its memory monitor kills a worker
SCRATCH_PREFIX = ".tune-"  # names Tune's temporary folder in the results directory


class RayNotStarted(Exception):
    """Ray did not start; the message is Ray's own."""


def current_umask() -> int:
    """The modes that this process takes from new files, which can only be read by changing it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


class RemoteSession:
    """Forwards method calls to the `Session` in the parent process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.stop_requested = False  # as of the latest reply

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):  # looked up by Python itself, for example to pickle
            raise AttributeError(method)
        return partial(self._call, method)

    def _call(self, *message: Any) -> Any:
        self._connection.send(message)
        value, self.stop_requested = self._connection.recv()
        return value


def run_tuner(session: RemoteSession, cluster: "RayCluster", root: Path) -> None:
    """Runs every trial of the session, as many concurrently as the cluster has room for."""
    # Tune would pass AWS credentials to workers in a way that Ray logs. Workers inherit the environment anyway.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(cluster.workers)  # lets all workers start at once
    for stale in root.glob(f"{SCRATCH_PREFIX}*"):  # left over from a killed run, since this run holds the lock
        shutil.rmtree(stale)
    searcher = SessionSearcher(session, cluster)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=root, ignore_cleanup_errors=True) as scratch:
        tuner = ray.tune.Tuner(
            TrialWorker,
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=WarmWorkerScheduler(cluster.workers, searcher),
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

    def __init__(self, session: RemoteSession, cluster: "RayCluster") -> None:
        super().__init__(metric="training_iteration", mode="max")
        self._session, self._cluster = session, cluster
        self._unfinished: dict[str, dict[str, TrialSpec]] = {}  # by Tune trial id, then by campaign trial id
        self._death_causes: dict[str, str] = {}  # by Tune trial id
        self._umask = current_umask()

    def __getstate__(self) -> dict[str, Any]:
        """Returns nothing: Tune pickles its searcher to restore it, but only the journal restores a campaign."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """Returns the config of the next trial or group, which Tune runs as `trial_id`.

        Returns None if no trial can start yet, and FINISHED if none will start any more.
        """
        if self._session.stop_requested:
            return Searcher.FINISHED
        if len(self._unfinished) >= self._cluster.workers:
            return None
        specs = self._session.ask()
        if not specs:
            return Searcher.FINISHED if self._session.is_over() or self._session.stop_requested else None
        self._unfinished[trial_id] = {spec.trial_id: spec for spec in specs}
        config = {"specs": specs, "resources": self._cluster.per_trial, "umask": self._umask}
        return config | {"gpu_slots": self._cluster.gpu_slots}

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
                with contextlib.suppress(OSError):  # on a full disk the trial runs to its end; its result is ignored
                    request_stop(spec.folder)
        return not unfinished

    def _tell(self, unfinished: dict[str, TrialSpec], report: Mapping[str, Any]) -> None:
        for name, result in report[UPDATES].ended.items():
            if unfinished.pop(name, None):
                self._session.tell(name, result)

    def worker_died(self, trial_id: str, error: str) -> None:
        """Stores the cause of a worker's death, given Ray's error; Tune calls `on_trial_complete` next."""
        causes = {OUT_OF_MEMORY: "host_oom", GpuUnusable.__name__: "gpu_error"}
        self._death_causes[trial_id] = next((cause for text, cause in causes.items() if text in error), "killed")

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Reports the trials that died with their worker: those without a result that were not asked to stop."""
        unfinished, cause = self._unfinished.pop(trial_id), self._death_causes.pop(trial_id, "killed")
        if result and UPDATES in result:
            self._tell(unfinished, result)
        if not self._session.stop_requested and not (result and PAUSED in result):
            for name in reversed(unfinished):  # each goes to the front of the queue
                self._session.worker_died(name, cause)

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing, like `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Restores nothing."""


class WarmWorkerScheduler(FIFOScheduler):
    """First in, first out; keeps idle workers alive while a phase waits for the last trials of another.

    By default Tune keeps an idle worker only if another trial is already waiting, so all but one would exit at the end
    of each phase, and a new worker takes seconds to import torch. No public setting changes that.

    It also ends workers that can run no further trial, and gives trials to idle workers on the least busy GPUs.
    """

    def __init__(self, workers: int, searcher: SessionSearcher) -> None:
        super().__init__()
        self._unreserved_workers, self._searcher = workers, searcher
        self._gpus: dict[Any, str] = {}  # of each worker that has chosen one

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Reserves all workers when the first trial is added, since Tune caches workers by their resources."""
        tune_controller._actor_cache.increase_max(trial.placement_group_factory, by=self._unreserved_workers)
        self._unreserved_workers = 0

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Orders the idle workers, since Tune takes the first ones for the next trials."""
        busy = Counter(self._gpus.get(worker) for worker in tune_controller._actor_to_trial)
        for idle in tune_controller._actor_cache._cached_objects.values():
            left = list(idle)
            idle.clear()
            while left:
                worker = min(left, key=lambda each: busy[self._gpus.get(each)])
                busy[self._gpus.get(worker)] += 1
                left.remove(worker)
                idle.append(worker)
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

    def _note_gpu(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if result.get(GPU) is not None:
            self._gpus[tune_controller._trial_to_actor[trial]] = result[GPU]

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Passes Ray's error for a dead worker to the searcher, before Tune calls its `on_trial_complete`."""
        # Tune keeps the exception only for some deaths; an out-of-memory kill is described only in this file.
        self._searcher.worker_died(trial.trial_id, Path(trial.error_file).read_text() if trial.error_file else "")


class RayCluster:
    """Context manager that starts a private Ray with files in `folder`, or joins the running cluster at `address`."""

    def __init__(
        self, resources: Resources, *, device: str = "auto", address: str | None = None, folder: Path | None = None
    ) -> None:
        self.resources, self.device, self.address, self.folder = resources, device, address, folder
        self.dashboard_url: str | None = None
        self.process_ids: tuple[int, ...] = ()  # raylet and GCS server of a private Ray

    def __enter__(self) -> "RayCluster":
        os.environ.update(RAY_ENVIRONMENT | {"TMPDIR": str(ray_root())})
        if not self.address:
            # With this variable unset, a new Ray requires its token; the shell may have turned that off.
            os.environ.pop("RAY_AUTH_MODE", None)
        if self.folder:
            os.environ.pop(TOKEN_VARIABLE, None)
            os.environ[TOKEN_PATH_VARIABLE] = str(self.folder / TOKEN_FILE)
        # Where Ray may span machines, no public setting binds its own processes to the loopback interface.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = bool(self.address)
        context = self._init_ray()
        # Silences tracebacks of dead workers; those from the raylet would go to stdout.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        ray._private.worker._worker_logs_enabled = False
        if not self.address:
            children = psutil.Process().children()
            self.process_ids = tuple(child.pid for child in children if child.name() in ("raylet", "gcs_server"))
        self.dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else None
        try:
            self._count_workers(ray.cluster_resources())
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def _init_ray(self) -> Any:
        here = this_machine(self.resources, device=self.device)
        private: dict[str, Any] = {"num_cpus": here["CPU"], "num_gpus": here["GPU"]}
        private |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "object_store_memory": OBJECT_STORE}
        if self.folder:
            private["_temp_dir"] = str(self.folder / TEMPORARY)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            return ray.init(
                address=self.address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **({} if self.address else private),
            )
        except Exception as error:  # many types: no disk space, no home directory, a busy machine
            raise RayNotStarted(str(error).strip()) from error
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray's own handler would exit silently
                signal.signal(signal.SIGTERM, on_sigterm)

    def share_gpus(self, trials_per_gpu: int) -> None:
        """Lets trials share each GPU."""
        self._count_workers(ray.cluster_resources(), trials_per_gpu)

    def _count_workers(self, cluster: Mapping[str, float], trials_per_gpu: int | None = None) -> None:
        """Sets the resources per trial and the number of trials that the cluster can run concurrently.

        Raises:
            ConfigError: the cluster has no room for even one trial; Ray would wait forever.
        """
        self.placement = place(self.resources, [cluster], device=self.device, trials_per_gpu=trials_per_gpu)
        self.workers = self.placement.workers
        # An explicit 0, since without a GPU entry a trial sees all GPUs.
        self.per_trial = {"CPU": self.placement.cpus, "GPU": self.placement.gpus}
        self.gpu_slots: GpuSlots | None = None
        if self.folder and 0 < self.placement.gpus < 1:  # in another cluster, only Ray knows which GPUs are free
            self.gpu_slots = GpuSlots(self.folder / "gpu_slots", gpus.visible_ids(), self.workers)
