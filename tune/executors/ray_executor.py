"""The executor on Ray: trials in parallel on warm workers. All of it runs in a process of its own (tune/executors/ray_process.py).

The whole campaign is a single `Tuner.fit`, fed by a searcher that asks the session for the next trial. So the
workers stay warm from the first trial to the last, across phases. Ray remembers nothing: its files go to a temporary
folder, and what it would restore from them is in our journal.
"""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Mapping
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
from ray.tune.stopper import Stopper

from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import request_stop
from tune.executors.ray_trainable import PAUSED, UPDATES, TrialWorker
from tune.machine.environment import short_temporary, usable_cpus
from tune.spec.schema import Resources
from tune.trials.trial import TrialResult, TrialSpec

# Ray Tune writes nothing of value for us: no loggers, no snapshots; and signals are ours (see inline.py).
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_prestart_worker_first_driver": "0",  # idle workers that no trial would use
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
SHORT_OF_MEMORY = "due to the node running low on memory"  # what Ray's memory monitor says of a worker it has killed
SCRATCH = ".tune-"  # start of the name of Tune's own folder, in the results directory while it runs


class NotStarted(Exception):
    """Ray did not start; the message is its own."""


class RemoteSession:
    """The session, as it is seen from this process: it lives in the one that started this one.

    Each method asks the one of the same name in tune/session/session.py, and waits for the answer.
    """

    def __init__(self, line: Connection) -> None:
        self._line = line
        self.stop_requested = False  # as of the newest answer

    def ask(self) -> list[TrialSpec]:
        return self._ask("ask")

    def is_over(self) -> bool:
        return self._ask("is_over")

    def should_stop(self, trial_id: str, interim: TrialResult) -> bool:
        return self._ask("should_stop", trial_id, interim)

    def tell(self, trial_id: str, result: TrialResult) -> None:
        self._ask("tell", trial_id, result)

    def worker_died(self, trial_id: str, cause: str) -> None:
        self._ask("worker_died", trial_id, cause)

    def _ask(self, *question: Any) -> Any:
        self._line.send(question)
        answer, self.stop_requested = self._line.recv()
        return answer


def fit(session: RemoteSession, cluster: "RayCluster", root: Path) -> None:
    """Runs every trial that the session has, as many at once as a started cluster has room for."""
    # Tune hands AWS credentials on to its workers by a way that Ray logs. They inherit the environment anyway.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(cluster.workers)  # all start at once, not one after the other
    for stale in root.glob(f"{SCRATCH}*"):  # of a run that was killed: a living one would have the lock
        shutil.rmtree(stale)
    searcher = SessionSearcher(session, cluster)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=root, ignore_cleanup_errors=True) as scratch:
        tuner = ray.tune.Tuner(
            TrialWorker,
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=Scheduler(cluster.workers, searcher),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=ray.tune.RunConfig(
                name="campaign",
                storage_path=scratch,
                verbose=0,
                stop=EarlyStopper(searcher),
                checkpoint_config=ray.tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()


class Unpickled:
    """Tune pickles what it is given, to restore from it; we never do, and a session holds locks and open files."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class SessionSearcher(Unpickled, Searcher):
    """Tune's source of trials: hands out what the session says is next, and tells it what came of it.

    A trial of Tune's is one of ours, or several that are trained together (tune/trials/trial_group.py). It returns None while a
    phase waits for another one's winner, and FINISHED after the last phase.
    """

    def __init__(self, session: RemoteSession, cluster: "RayCluster") -> None:
        super().__init__(metric="training_iteration", mode="max")
        self._session, self._cluster = session, cluster
        self._given: dict[str, dict[str, TrialSpec]] = {}  # those without a result, by Tune's id and ours
        self._causes: dict[str, str] = {}  # of the deaths of workers, by Tune's id

    def suggest(self, trial_id: str) -> Any:
        """The trials of one worker, and what it takes; Tune calls them `trial_id`. None: nothing yet."""
        if self._session.stop_requested:
            return Searcher.FINISHED
        if len(self._given) >= self._cluster.workers:
            return None
        specs = self._session.ask()
        if not specs:
            return Searcher.FINISHED if self._session.is_over() or self._session.stop_requested else None
        self._given[trial_id] = {spec.trial_id: spec for spec in specs}
        return {"specs": specs, "resources": self._cluster.per_trial}

    def should_stop(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the session has a result of all that was given out as one; those it ends here are recorded, too."""
        left = self._given[trial_id]
        self._record(left, result)
        news = result[UPDATES].interim.items()
        ended = [left.pop(ours) for ours, interim in news if ours in left and self._session.should_stop(ours, interim)]
        for spec in ended if left else ():  # the others go on, and the worker listens before it does
            with contextlib.suppress(OSError):  # no room for a wish: it trains to its end, and nobody listens
                request_stop(spec.folder)
        return not left

    def _record(self, left: dict[str, TrialSpec], result: dict[str, Any]) -> None:
        for ours, ended in result[UPDATES].ended.items():
            if left.pop(ours, None):
                self._session.tell(ours, ended)

    def worker_died(self, trial_id: str, said: str) -> None:
        """What Ray says of the death of a worker, before it says that the trial is over."""
        self._causes[trial_id] = "host_oom" if SHORT_OF_MEMORY in said else "killed"

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Those of the worker's trials that have no result died with it, unless they were to save and stop."""
        left, cause = self._given.pop(trial_id), self._causes.pop(trial_id, "killed")
        if result and UPDATES in result:
            self._record(left, result)
        if not self._session.stop_requested and not (result and PAUSED in result):
            for ours in reversed(left):  # the last one comes first in the queue
                self._session.worker_died(ours, cause)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the memory."""


class Scheduler(FIFOScheduler):
    """First come, first served; and every worker is kept while a phase waits for the last trials of another.

    On its own Tune keeps a worker only for a trial that is waiting already, so at the end of each phase all but one
    would die, and importing torch anew costs seconds. Its cache of workers has no public setting for that.
    """

    def __init__(self, workers: int, searcher: SessionSearcher) -> None:
        super().__init__()
        self._to_keep, self._searcher = workers, searcher

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Tune's cache counts workers by what they take, and that is known with the first trial."""
        tune_controller._actor_cache.increase_max(trial.placement_group_factory, by=self._to_keep)
        self._to_keep = 0

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Tells the searcher why a worker died; its `on_trial_complete` comes after this."""
        # Tune keeps the exception of some deaths only, and of a lack of memory just the text.
        self._searcher.worker_died(trial.trial_id, Path(trial.error_file).read_text() if trial.error_file else "")


class EarlyStopper(Unpickled, Stopper):
    """Ends a trial that early stopping drops. One that is to save and stop does so by itself."""

    def __init__(self, searcher: SessionSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._searcher.should_stop(trial_id, result)

    def stop_all(self) -> bool:
        """Never: the searcher says when there is nothing left."""
        return False


def protect_token() -> None:
    """Takes Ray's token from all but its owner: one that another program made may be open to everybody."""
    path = Path.home() / ".ray" / "auth_token"
    if path.is_file() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


class RayCluster:
    """A private Ray on this machine, or a running one by address, for as long as the block lasts."""

    def __init__(self, resources: Resources, *, address: str | None = None) -> None:
        self.resources, self.address = resources, address
        self.dashboard_url: str | None = None
        self.process_ids: tuple[int, ...] = ()  # of Ray itself, where it is ours
        self.folder: Path | None = None  # of Ray's logs and sockets, where it is ours

    def __enter__(self) -> "RayCluster":
        os.environ.update(QUIET | {"TMPDIR": short_temporary()})
        if not self.address:
            # A new Ray then asks everybody for its token, whatever the shell says.
            os.environ.pop("RAY_AUTH_MODE", None)
        # Ray has no setting for it where it may span machines: its own processes then listen on the loopback alone.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = bool(self.address)
        local = {"num_cpus": self._cpus(), "include_dashboard": True, "dashboard_host": "127.0.0.1"}
        previous = os.umask(0o077)  # Ray writes an authentication token
        on_main = threading.current_thread() is threading.main_thread()
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            context = ray.init(
                address=self.address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **({} if self.address else local),
            )
            protect_token()
        except Exception as error:  # of many kinds: no room, no home, a busy machine
            raise NotStarted(str(error).strip()) from error
        finally:
            os.umask(previous)
            if on_main:  # Ray has put its own handler there, which would end us without a word
                signal.signal(signal.SIGTERM, terminate)
        # Its reports on dead workers are tracebacks, and the raylet's go to stdout, where data belong; ours are lines.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        ray._private.worker._worker_logs_enabled = False
        if not self.address:
            children = psutil.Process().children()
            self.process_ids = tuple(child.pid for child in children if child.name() in ("raylet", "gcs_server"))
            assert isinstance(context, ray._private.worker.RayContext), "only ray:// gives another kind"
            folder = context.address_info["session_dir"]
            self.folder = Path(folder) if folder else None
        url = context.dashboard_url
        self.dashboard_url = f"http://{url}" if url else None
        try:
            self.per_trial = self._per_trial(ray.cluster_resources())
            self.workers = self._fit(ray.cluster_resources())
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def share(self, trials_per_device: int) -> None:
        """Lets so many trials share each GPU. Rounded down: Ray counts in ten-thousandths, and all must fit."""
        share = int(10_000 / trials_per_device) / 10_000
        self.resources = self.resources.model_copy(update={"gpus_per_trial": share})
        self.per_trial = self._per_trial(ray.cluster_resources())
        self.workers = self._fit(ray.cluster_resources())

    @property
    def packed(self) -> int:
        """How many trials share a device: a GPU, or on a CPU the machine as one."""
        share = self.per_trial["GPU"]
        return max(1, min(self.workers, int(1 / share + 1e-6))) if share else self.workers

    def _cpus(self) -> int:
        """As many as there are, or enough for the workers that were asked for."""
        wanted = (self.resources.workers or 1) * self.resources.cpus_per_trial
        return max(usable_cpus(), wanted)

    def _per_trial(self, cluster: Mapping[str, float]) -> dict[str, float]:
        share = self.resources.gpus_per_trial
        gpus = (1.0 if cluster.get("GPU") else 0.0) if share == "auto" else float(share)
        # Always said, even when it is none: a trial that asks for nothing sees every GPU.
        return {"CPU": float(self.resources.cpus_per_trial), "GPU": gpus}

    def _fit(self, cluster: Mapping[str, float]) -> int:
        rooms = [cluster.get("CPU", 1) // self.per_trial["CPU"]]
        if self.per_trial["GPU"]:
            share, gpus = self.per_trial["GPU"], cluster.get("GPU", 0)
            # A share of a GPU is of a single one: of two, 0.4 is there four times and not five.
            rooms.append(int(gpus) * int(1 / share + 1e-6) if share < 1 else gpus // share)
        if min(rooms) < 1:  # Ray would wait for ever
            here = f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs"
            asked = f"{self.per_trial['CPU']:g} CPUs and {self.per_trial['GPU']:g} GPUs"
            raise ConfigError(f"resources: a trial asks for {asked}, and this cluster has {here}")
        return min(int(min(rooms)), self.resources.workers or 1_000_000)
