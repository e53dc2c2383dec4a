"""Runs Ray in a child process, serves it the session's trials, and restarts it when it dies.

When a part of Ray dies, `Tuner.fit` may hang, and Ray may kill the process that runs it. So the child holds no state:
for every trial and every result it calls this process, which holds the lock, the journal and the signal handlers. To
restart Ray, this process kills everything that the child has started; the trials then resume from their checkpoints.
"""

import math
import multiprocessing
import multiprocessing.resource_tracker
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import psutil

from ngpt.config.base import ConfigError, UserError
from ngpt.system.cli import print_line
from tune.executors.orphans import is_alive, kill_marked, mark_children, marked_processes
from tune.executors.ray_folder import RayFolder
from tune.executors.ray_process import RayExited, RayReady, run_ray
from tune.executors.signals import StoppedEarly, stop_on_signal
from tune.executors.watchdog import Watchdog
from tune.machine.ray_limits import limit_hint
from tune.machine.spawn import hide_main_module
from tune.session.session import ExecutorLost, Session
from tune.spec.schema import Resources
from tune.trials.retries import oom_kill_count

HEALTH_CHECK_SECONDS = 1.0  # between checks of Ray's processes and the heartbeats
START_TIMEOUT = 300.0  # seconds for Ray to start
RESPONSE_TIMEOUT = 60.0  # seconds for Ray to notice a dead worker, or to ask for work when it has none
SAVE_TIMEOUT = 60.0  # seconds for running trials to save after a stop was requested
EXIT_TIMEOUT = 20.0  # seconds for the child process to exit
OOM_KILL_SECONDS = 30.0  # a worker that dies this soon after an OOM kill counts as its victim
MAX_REPLACEMENTS = 3  # of Ray, in one run

FINISHED = "finished"  # returned instead of a reason why Ray must be replaced
SESSION_METHODS = ("ask", "is_over", "tell", "should_stop", "worker_died")  # the methods that the child may call


@dataclass
class RayProcess:
    """The child that runs Ray (tune/executors/ray_process.py), and the connection to it."""

    process: Any  # multiprocessing has no public type for spawned processes
    connection: Connection
    ready: RayReady | None = None
    folder: RayFolder | None = None  # of a private Ray
    shares_gpus: bool = False  # whether it has received the "share" command
    services: dict[str, psutil.Process] = field(default_factory=dict)  # raylet and GCS server of a private Ray, by name


class RaySupervisor:
    """Context manager that runs the trials of a session on a private Ray, or on the cluster at `address`."""

    def __init__(
        self,
        session: Session,
        resources: Resources,
        *,
        address: str | None = None,
        owns_process: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._resources, self._address, self._clock = session, resources, address, clock
        self._owns_process = owns_process  # whether a second signal exits this process
        self._watchdog = Watchdog(resources.stall_timeout)
        self._replacements = 0
        self._trials_per_gpu: int | None = None  # set once Ray has started
        self._is_running = False
        self._killed_at: dict[str, float] = {}  # by trial: when its hung worker was killed; until Ray reports it
        self._oom_kills = oom_kill_count()
        self._oom_killed_at = -math.inf
        self._checked_at = self._heard_at = clock()
        self._save_deadline: float | None = None

    def __enter__(self) -> "RaySupervisor":
        self._start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        started = marked_processes(self._session.root)  # found now, while their parents are alive
        self._ray.connection.close()  # the child then shuts Ray down
        if kind is None:
            self._ray.process.join(EXIT_TIMEOUT)
        self._kill(started)
        if kind in (None, StoppedEarly):
            self._remove_folder()
        elif self._ray.folder:  # after an error, Ray's logs may explain it; the next start removes them
            self._ray.folder.release()

    def wait(self) -> RayReady:
        """Waits until Ray has started.

        Raises:
            ConfigError: the cluster has no room for even one trial.
            ExecutorLost: Ray does not start.
            StoppedEarly: a stop was requested.
        """
        while self._ray.ready is None:
            if reason := self._handle_next():
                if self._session.stop_requested:
                    raise StoppedEarly
                advice = "run `python run_campaign.py doctor` to find out why; --inline runs without Ray"
                logs = f"its logs are in {self._ray.folder.path} until the next start; " if self._ray.folder else ""
                raise ExecutorLost(f"Ray did not start: {reason}{limit_hint()}\n{logs}{advice}")
        return self._ray.ready

    @property
    def token_command(self) -> str | None:
        """The command that prints the token for the dashboard of a private Ray."""
        return self._ray.folder.token_command if self._ray.folder else None

    def share(self, trials_per_gpu: int) -> RayReady:
        """Lets trials share each GPU, also whenever Ray is replaced later; raises the same errors as `wait`."""
        self._trials_per_gpu = trials_per_gpu
        self._send_command()
        return self.wait()

    def run(self) -> None:
        """Runs every trial; replaces Ray when it dies.

        Raises:
            ExecutorLost: Ray died too often, or the cluster at `address` is lost.
        """
        with stop_on_signal(self._session, before_exit=self._end_at_once, owns_process=self._owns_process):
            self._is_running = True
            self._send_command()
            while (reason := self._handle_next()) is not FINISHED:
                if reason and self._session.stop_requested:
                    return
                if reason:
                    self._replace(reason)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        parent_end, child_end = context.Pipe()
        multiprocessing.resource_tracker.ensure_running()  # started before `mark_children`, so that it is not marked
        report = self._session.message if self._is_running else print_line
        folder = None if self._address else RayFolder(report=report)
        where = self._address, self._session.root, folder.path if folder else None
        arguments = (child_end, self._resources, self._session.campaign.base.device, *where)
        process = context.Process(target=run_ray, args=arguments, name="ray driver", daemon=True)
        with mark_children(self._session.root), hide_main_module():
            process.start()
        child_end.close()
        self._heard_at = self._clock()
        self._ray = RayProcess(process, parent_end, folder=folder)

    def _kill(self, started: Sequence[psutil.Process]) -> None:
        """Kills the child, `started`, and every process marked with the results: Ray and the workers."""
        self._ray.connection.close()
        self._ray.process.kill()
        self._ray.process.join(EXIT_TIMEOUT)
        kill_marked(self._session.root, started)

    def _end_at_once(self) -> None:
        kill_marked(self._session.root)
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._ray.folder:
            self._ray.folder.remove()

    def _replace(self, reason: str) -> None:
        if self._address:
            text = f"the Ray cluster at {self._address} is lost ({reason}), and this run did not start it"
            raise ExecutorLost(f"{text}; repair it, then run the same command again to resume")
        self._kill(marked_processes(self._session.root))
        self._remove_folder()
        self._session.executor_lost(reason)
        self._killed_at.clear()
        if self._replacements == MAX_REPLACEMENTS:
            advice = "run `python run_campaign.py doctor` to find out why, and the same command again to resume"
            raise ExecutorLost(f"Ray died {MAX_REPLACEMENTS + 1} times ({reason}{limit_hint()}); {advice}")
        self._replacements += 1
        count = f"{self._replacements} of at most {MAX_REPLACEMENTS}"
        self._session.message(f"Ray died ({reason}); starting a new one, {count}")
        try:
            self._start()
        except (UserError, OSError) as error:
            raise ExecutorLost(f"Ray died ({reason}), and no new one can start: {error}") from error

    def _handle_next(self) -> str | None:
        """Handles the next message; returns why Ray must be replaced, FINISHED at the end, or None."""
        now = self._clock()
        if now - self._checked_at >= HEALTH_CHECK_SECONDS:
            self._checked_at = now
            if reason := self._check_health():
                return reason
        try:
            if not self._ray.connection.poll(HEALTH_CHECK_SECONDS / 2):
                return None
            message = self._ray.connection.recv()
        except (EOFError, OSError):
            self._ray.process.join(EXIT_TIMEOUT)
            return f"its driver ended with code {self._ray.process.exitcode}"
        self._heard_at = self._clock()
        match message:
            case RayReady():
                return self._on_ready(message)
            case RayExited():
                return self._on_exit(message)
        return self._call_session(*message)

    def _call_session(self, name: str, *arguments: Any) -> str | None:
        assert name in SESSION_METHODS, name
        if name == "worker_died":
            if reason := self._dead_service():
                return reason  # the worker died because Ray did
            arguments = self._correct_cause(*arguments)
        value = getattr(self._session, name)(*arguments)
        self._ray.connection.send((value, self._session.stop_requested))
        return None

    def _on_ready(self, ready: RayReady) -> str | None:
        try:
            services = [psutil.Process(pid) for pid in ready.process_ids]
            self._ray.services = {service.name(): service for service in services}
        except psutil.NoSuchProcess as error:
            return f"its process {error.pid} is gone"
        self._ray.ready = ready
        names = ("workers", "trials_per_device", "n_gpus", "dashboard_url")
        properties = {name: getattr(ready, name) for name in names}
        self._session.executor = replace(self._session.executor, **properties)
        if self._is_running:
            self._send_command()
        return None

    def _send_command(self) -> None:
        """Sends a child that is ready its next command: "share" once, if GPUs are to be shared, then "run"."""
        self._heard_at = self._clock()  # the child was waiting for this command
        if self._trials_per_gpu is not None and not self._ray.shares_gpus:
            self._ray.shares_gpus, self._ray.ready = True, None
            self._ray.connection.send(("share", self._trials_per_gpu))
        else:
            self._ray.connection.send(("run",))

    def _correct_cause(self, trial_id: str, cause: str) -> tuple[str, str]:
        """Corrects the cause of death if the watchdog or the kernel killed the worker."""
        self._count_oom_kills()
        if self._killed_at.pop(trial_id, None) is not None:
            cause = "hung"
        elif cause == "killed" and self._clock() - self._oom_killed_at < OOM_KILL_SECONDS:
            cause = "host_oom"
        return trial_id, cause

    def _on_exit(self, message: RayExited) -> str | None:
        if message.error is None:
            if self._session.is_over() or self._session.stop_requested:
                return FINISHED
            return self._dead_service() or "it ended before the campaign was over"
        if message.is_config_error:
            raise ConfigError(message.error)
        if message.is_start_error:
            return message.error
        if reason := self._dead_service():
            return reason
        raise RuntimeError(f"the driver of Ray failed:\n{message.error}")

    def _check_health(self) -> str | None:
        now = self._clock()
        self._count_oom_kills()
        if reason := self._dead_service():
            return reason
        if self._ray.ready is None:
            if self._session.stop_requested:
                return FINISHED
            return "it did not start in time" if now - self._heard_at > START_TIMEOUT else None
        if self._session.stop_requested:
            return self._stop_trials(now)
        if not self._session.state.running and now - self._heard_at > RESPONSE_TIMEOUT:
            return "it has stopped asking for work"
        return self._kill_hung_workers(now)

    def _dead_service(self) -> str | None:
        dead = next((name for name, service in self._ray.services.items() if not is_alive(service)), None)
        return None if dead is None else f"its process {dead} is gone"

    def _stop_trials(self, now: float) -> str | None:
        """Asks running trials to save and stop; returns a reason if they take too long."""
        if self._save_deadline is None:
            self._save_deadline = now + SAVE_TIMEOUT
            self._session.message("stopping: running trials save their progress; a second signal stops them at once")
        self._session.request_stop()
        return "not all trials have saved in time" if now > self._save_deadline else None

    def _kill_hung_workers(self, now: float) -> str | None:
        """Kills the workers of hung trials; returns why Ray must be replaced if this fails or Ray does not notice."""
        beats = self._session.heartbeats()
        self._killed_at = {trial_id: at for trial_id, at in self._killed_at.items() if trial_id in beats}
        hung, killed_pids = self._watchdog.find_hung(beats, now), set[int]()
        # Trials that train together share a process: none of them hangs as long as one of them makes progress.
        busy_pids = {beat.pid for trial_id, (_, beat) in beats.items() if beat and trial_id not in hung}
        for trial_id, seconds in hung.items():
            beat = beats[trial_id][1]
            if beat and beat.pid in busy_pids:
                continue
            if trial_id in self._killed_at:
                if now - self._killed_at[trial_id] > RESPONSE_TIMEOUT:
                    return f"it has not noticed that the worker of {trial_id} died"
                continue
            self._killed_at[trial_id] = now
            if beat and beat.pid in killed_pids:
                continue
            workers = [process for process in marked_processes(self._session.root) if beat and process.pid == beat.pid]
            if not workers:
                return f"{trial_id} has made no progress for {seconds:.0f} s, and its worker was not found"
            self._session.message(f"{trial_id} has made no progress for {seconds:.0f} s: killing its worker")
            workers[0].kill()
            killed_pids.add(workers[0].pid)
        return None

    def _count_oom_kills(self) -> None:
        kills = oom_kill_count()
        if kills > self._oom_kills:
            self._oom_kills, self._oom_killed_at = kills, self._clock()
