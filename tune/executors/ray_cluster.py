"""The Ray that trials run on, a private one or a running cluster, and how many trials it has room for."""

import logging
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.auto_init_hook
import ray._private.ray_constants
import ray._private.worker
from ray.job_config import JobConfig

from ngpt.system import gpus
from tune.cluster.connection import forget_surroundings, join_cluster
from tune.cluster.relay import start_relay
from tune.cluster.shipping import code_environment
from tune.executors.ray_folder import TEMPORARY, TOKEN_FILE, TOKEN_PATH_VARIABLE, TOKEN_VARIABLE
from tune.executors.ray_nodes import NodeChange, NodeWatch, wait_for_room
from tune.machine import placement
from tune.machine.gpu_slots import GpuSlots
from tune.machine.placement import Placement, cpu_reason, place, this_machine
from tune.machine.ray_limits import OBJECT_STORE, ray_root
from tune.remote.worker import WorkerUploads
from tune.spec.schema import Resources

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
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in a job that was submitted


class RayNotStarted(Exception):
    """Ray did not start; the message is Ray's own."""


def brief_reason(text: str) -> str:
    """Returns Ray's own reason why it did not start, or the name of a log in the place of its last lines."""
    log = re.match(r"The last \d+ lines of (\S+) ", text)
    return f"its {Path(log[1]).stem} did not start in time, see {log[1]}" if log else text


def job_naming(results: Path | None) -> dict[str, Any]:
    """Arguments of `ray.init` that name the job and its actors after the campaign, in the dashboard and `ray list`.

    Ray takes the entry point that it lists from the command line of the process, which cannot be set. A job that was
    submitted (`ray job submit`) keeps its own metadata.
    """
    if results is None:
        return {}
    namespace = {"namespace": f"campaign-{results.name}"}
    if JOB_VARIABLE in os.environ:
        return namespace
    metadata = {"job_name": results.name, "campaign": results.name, "results": str(results)}
    return namespace | {"job_config": JobConfig(metadata=metadata)}


class RayCluster:
    """Context manager that starts a private Ray with files in `folder`, or joins the running cluster at `address`."""

    def __init__(
        self,
        resources: Resources,
        *,
        device: str = "auto",
        address: str | None = None,
        folder: Path | None = None,
        report: Callable[[str], object] = lambda text: None,
        plugins: Mapping[str, Mapping[str, Path]] | None = None,
        results: Path | None = None,
    ) -> None:
        self._results = results  # names the job
        self.resources, self.device, self.address, self.folder = resources, device, address, folder
        self._report = report  # prints a line for the user
        self._plugins = plugins  # files that other hosts need, see tune/cluster/shipping.py
        self.dashboard_url: str | None = None
        self.process_ids: tuple[int, ...] = ()  # raylet and GCS server of a private Ray
        self.relay: Any = None  # between this process and workers on other hosts
        self.notes: tuple[str, ...] = ()  # on where trials train, for the warnings of the report
        self.uploads: WorkerUploads | None = None  # of workers that share no folder with the run

    def __enter__(self) -> "RayCluster":
        os.environ.update(RAY_ENVIRONMENT | {"TMPDIR": str(ray_root())})
        if not self.address:
            forget_surroundings()
        if self.folder:
            os.environ.pop(TOKEN_VARIABLE, None)
            os.environ[TOKEN_PATH_VARIABLE] = str(self.folder / TOKEN_FILE)
        # Where Ray may span machines, no public setting binds its own processes to the loopback interface.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = bool(self.address)
        # A call after the end, by a thread that does not know of it yet, would join or start a Ray.
        ray._private.auto_init_hook.enable_auto_connect = False
        context = self._init_ray()
        # Silences tracebacks of dead workers; those from the raylet would go to stdout.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        ray._private.worker._worker_logs_enabled = False
        if not self.address:
            children = psutil.Process().children()
            self.process_ids = tuple(child.pid for child in children if child.name() in ("raylet", "gcs_server"))
        self.dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else None
        try:
            self.nodes = NodeWatch()
            if self.address:
                wait_for_room(self.nodes, self.resources, device=self.device, report=self._report)
                reason = cpu_reason(self.resources, self.nodes.offers, device=self.device)
                self.notes = () if reason is None else (f"trained on the CPU by a run that was not told to: {reason}",)
            self._count_workers(self.nodes.offers)
            self.relay = start_relay() if self.address else None
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def _init_ray(self) -> Any:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if not self.address:
                return self._start_private()
            with tempfile.TemporaryDirectory(prefix="ngpt-code-") as staged:
                sent = code_environment(Path(staged), self._plugins)
                return join_cluster(self.address, sent, naming=job_naming(self._results))
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray's own handler would exit silently
                signal.signal(signal.SIGTERM, on_sigterm)

    def _start_private(self) -> Any:
        here = this_machine(self.resources, device=self.device)
        folder: dict[str, Any] = {"_temp_dir": str(self.folder / TEMPORARY)} if self.folder else {}
        try:
            return ray.init(
                address="local",
                num_cpus=here["CPU"],
                num_gpus=here["GPU"],
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE,
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=True,
                **job_naming(self._results),
                **folder,
            )
        except Exception as error:  # many types: no disk space, no home directory, a busy machine
            raise RayNotStarted(brief_reason(str(error).strip())) from error

    @property
    def workers(self) -> int:
        """The number of trials or groups that the cluster can run concurrently."""
        return self.placement.workers

    @property
    def most_queued(self) -> int:
        """The number of trials or groups that Ray may have; those without a place ask its autoscaler for nodes."""
        waits = self.address and self.resources.wait_for_nodes
        return max(self.workers, self.resources.workers or 1) if waits else self.workers

    @property
    def avoided(self) -> Sequence[str]:
        """The ids of nodes that are set aside, on which Ray must not place trials."""
        return sorted(self.nodes.excluded)

    @property
    def node_ids(self) -> Set[str] | None:
        """The nodes on which trials may stay; None for a private Ray, whose one node does not change."""
        return {node.node_id for node in self.nodes.nodes} | self.nodes.pending if self.address else None

    def has_node(self, node_id: str) -> bool:
        """Whether a node is in use and answers."""
        return any(node.node_id == node_id and node.is_reachable() for node in self.nodes.nodes)

    def share_gpus(self, trials_per_gpu: int) -> None:
        """Lets trials share each GPU."""
        self._count_workers(self.nodes.offers, trials_per_gpu)

    def look(self, *, now: bool = False) -> NodeChange:
        """Reads the nodes of a running cluster every few seconds, or `now`. A change also changes `workers`."""
        if not self.address:
            return NodeChange()
        if change := self.nodes.poll(now=now):
            # Each trial keeps its share of a node: after the last GPU is gone, there is room for none.
            self.placement = self.placement.on(self.nodes.offers, most=self.resources.workers, spread=False)
        return change

    def _count_workers(self, nodes: Sequence[Mapping[str, float]], trials_per_gpu: int | None = None) -> None:
        """Sets the resources per trial and the number of trials that the nodes can run concurrently.

        Raises:
            ConfigError: no node has room for even one trial; Ray would wait forever.
        """
        self.placement: Placement = place(
            self.resources, nodes, device=self.device, trials_per_gpu=trials_per_gpu, spread=not self.address
        )
        # An explicit 0, since without a GPU entry a trial sees all GPUs.
        self.per_trial = {"CPU": self.placement.cpus, "GPU": self.placement.gpus}  # or per rank
        n_ranks = self.resources.ranks_per_trial
        self.ranks = {"ranks": n_ranks, "placement": placement.ray_strategy(self.resources)} if n_ranks > 1 else {}
        self.gpu_slots: GpuSlots | None = None
        if self.folder and 0 < self.placement.gpus < 1:  # in another cluster, only Ray knows which GPUs are free
            self.gpu_slots = GpuSlots(self.folder / "gpu_slots", gpus.visible_ids(), self.workers)
