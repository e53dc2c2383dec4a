"""Runs Ray in a child process, serves it the session's trials, and restarts it when it dies.

When a part of Ray dies, `Tuner.fit` may hang, and Ray may kill the process that runs it. So the child holds no state:
for every trial and every result it calls this process, which holds the lock, the journal and the signal handlers. To
restart Ray, this process kills everything that the child has started; the trials then resume from their checkpoints.
"""

import multiprocessing
import multiprocessing.resource_tracker
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import psutil

from ngpt.code.plugins import loaded_sources
from ngpt.code.version import command
from ngpt.config.base import ConfigError, UserError
from ngpt.system.cli import print_line
from ngpt.system.heartbeat import Heartbeat
from tune.cluster.node_data import ExpectedCorpus
from tune.executors.orphans import is_alive, kill_marked, mark_children, marked_processes
from tune.executors.ray_folder import RayFolder
from tune.executors.ray_process import CodeToRun, RayExited, RayNote, RayReady, run_ray
from tune.executors.signals import StoppedEarly, interrupt_blocked, stop_on_signal
from tune.executors.watchdog import Heartbeats, OomKiller, Watchdog
from tune.machine.ray_limits import limit_hint
from tune.machine.spawn import hide_main_module
from tune.remote.uri import Uri
from tune.remote.worker import WorkerUploads
from tune.session.executor_info import ExecutorLost
from tune.session.session import Session
from tune.spec.schema import Resources

HEALTH_CHECK_SECONDS = 1.0  # between checks of Ray's processes and the heartbeats
START_TIMEOUT = 300.0  # seconds for Ray to start
RESPONSE_TIMEOUT = 60.0  # seconds for Ray to notice a dead worker, or to ask for work when it has none
SAVE_TIMEOUT = 60.0  # seconds for running trials to save after a stop was requested
EXIT_TIMEOUT = 20.0  # seconds for the child process to exit
MAX_STARTS = 3  # attempts to start the first private Ray of a run
MAX_REPLACEMENTS = 3  # of Ray, in one run
WAIT_FOR_NODES = 600.0  # seconds to wait for a node in place of the last one, if the campaign says nothing

FINISHED = "finished"  # returned instead of a reason why Ray must be replaced
# The methods of the session that the child may call.
SESSION_METHODS = ("ask", "is_over", "tell", "should_stop", "worker_died", "set_waiting", "resize", "deliver")


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
        remote: tuple[Uri, WorkerUploads] | None = None,
        compiles: bool = False,
        owns_process: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._resources, self._address, self._clock = session, resources, address, clock
        self._compiles = compiles  # whether a trial has `compile: true`
        self._remote = remote  # the address of the results and how workers reach it
        self._owns_process = owns_process  # whether a second signal exits this process
        self._watchdog = Watchdog(resources.stall_timeout)
        self._replacements = 0
        self._starts = 1  # attempts to start the first Ray
        self._trials_per_gpu: int | None = None  # set once Ray has started
        self._is_running = False
        self._killed_at: dict[str, float] = {}  # by trial: when its hung worker was killed; until Ray reports it
        self._to_kill: set[str] = set()  # trials whose hung workers Ray shall kill
        self._beats = Heartbeats(session)
        self._oom_killer = OomKiller()
        self._checked_at = self._heard_at = clock()
        self._save_deadline: float | None = None
        self._no_room_since: float | None = None  # when the last node with room for a trial was lost

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
                self._retry_start(reason)
        return self._ray.ready

    def _retry_start(self, reason: str) -> None:
        """Starts a private Ray once more: on a busy machine its start exceeds Ray's own limit of 30 s.

        Raises:
            ExecutorLost: it was tried too often, or another attempt cannot help.
        """
        hint = limit_hint()
        if self._address or self._starts == MAX_STARTS or self._trials_per_gpu is not None or hint:
            advice = f"run `{command()} doctor` to find out why; --inline runs without Ray"
            logs = f"its logs are in {self._ray.folder.path} until the next start; " if self._ray.folder else ""
            raise ExecutorLost(f"Ray did not start: {reason}{hint}\n{logs}{advice}")
        self._starts += 1
        self._report(f"Ray did not start ({reason.rstrip('.')}); trying again, {self._starts} of at most {MAX_STARTS}")
        self._kill(marked_processes(self._session.root))
        self._remove_folder()
        self._start()

    @property
    def token_command(self) -> str | None:
        """The command that prints the token for the dashboard of a private Ray."""
        return self._ray.folder.token_command if self._ray.folder else None

    def share(self, trials_per_gpu: int) -> RayReady:
        """Lets trials share each GPU, also whenever Ray is replaced later; raises the same errors as `wait`."""
        self._trials_per_gpu = trials_per_gpu
        self._send_command()
        return self.wait()

    def prepare_nodes(self, corpora: Sequence[ExpectedCorpus]) -> None:
        """Prepares the corpora on all nodes of a cluster; raises ConfigError if a node cannot have them, as `wait`."""
        self._ray.ready = None
        self._ray.connection.send(("prepare", corpora))
        self.wait()

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
        folder = None if self._address else RayFolder(report=self._report)
        code, device = self._session.code, self._session.campaign.base.device
        files = code.files_to_send() if self._address else {}
        sent = CodeToRun(code.digest, loaded_sources(), files, device if self._compiles else None)
        where = self._address, self._session.root, sent, folder.path if folder else None
        arguments = (child_end, self._resources, device, *where, self._remote)
        process = context.Process(target=run_ray, args=arguments, name="ray driver", daemon=True)
        with mark_children(self._session.root), hide_main_module(), interrupt_blocked():
            process.start()
        child_end.close()
        self._heard_at = self._clock()
        self._ray = RayProcess(process, parent_end, folder=folder)

    def _report(self, text: str) -> None:
        self._session.message(text) if self._is_running else print_line(text)

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
            advice = f"run `{command()} doctor` to find out why, and the same command again to resume"
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
        match message:
            case ("exchange", beats):
                self._exchange(beats)
                return None
        self._heard_at = self._clock()
        match message:
            case RayNote():
                self._report(message.text)
                return None
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
            _, beat = self._beats.newest().get(arguments[0], (0, None))
            self._session.worker_died(*self._correct_cause(*arguments), beat=beat)
            value = None
        else:
            value = getattr(self._session, name)(*arguments)
        self._ray.connection.send((value, self._session.stop_requested))
        return None

    def _exchange(self, beats: Mapping[str, tuple[int, Heartbeat]]) -> None:
        """Takes the newest heartbeats of a cluster; answers which workers to kill, and which attempts shall stop."""
        self._beats.receive(beats)
        running, stops = self._session.state.running, self._session.stop_requested
        to_stop = [(name, event["attempt"]) for name, event in running.items()] if stops else []
        self._ray.connection.send(((self._to_kill, to_stop), stops))
        self._to_kill = set()

    def _on_ready(self, ready: RayReady) -> str | None:
        try:
            services = [psutil.Process(pid) for pid in ready.process_ids]
            self._ray.services = {service.name(): service for service in services}
        except psutil.NoSuchProcess as error:
            return f"its process {error.pid} is gone"
        self._ray.ready = ready
        names = ("workers", "trials_per_device", "n_gpus", "dashboard_url", "notes")
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

    def _correct_cause(self, trial_id: str, cause: str, reason: str | None = None) -> tuple[str, str, str | None]:
        """Corrects the cause of death if the watchdog or the kernel killed the worker."""
        has_run_out = self._oom_killer.has_killed(self._clock())
        if self._killed_at.pop(trial_id, None) is not None:
            cause, reason = "hung", None
        elif cause == "killed" and has_run_out:
            cause, reason = "host_oom", None
        return trial_id, cause, reason

    def _on_exit(self, message: RayExited) -> str | None:
        if message.error is None:
            if self._session.is_over() or self._session.stop_requested:
                return FINISHED
            return self._dead_service() or "it ended before the campaign was over"
        if message.is_config_error:
            raise ConfigError(message.error)
        if message.is_start_error:
            return message.error
        if message.has_no_nodes:
            text = f"{message.error} in the cluster at {self._address}"
            raise ExecutorLost(f"{text}; repair it, then run the same command again to resume")
        if reason := self._dead_service():
            return reason
        raise RuntimeError(f"the driver of Ray failed:\n{message.error}")

    def _check_health(self) -> str | None:
        now = self._clock()
        self._oom_killer.has_killed(now)  # counted every second, since Ray reports a death later
        if reason := self._dead_service():
            return reason
        if self._ray.ready is None:
            if self._session.stop_requested:
                return FINISHED
            timeout = START_TIMEOUT + (self._resources.wait_for_nodes or 0)
            return "it did not start in time" if now - self._heard_at > timeout else None
        if self._session.stop_requested:
            return self._stop_trials(now)
        if not self._session.state.running and now - self._heard_at > RESPONSE_TIMEOUT:
            return "it has stopped asking for work"
        self._check_room(now)
        return self._kill_hung_workers(now)

    def _check_room(self, now: float) -> None:
        """Raises ExecutorLost if no node has had room for a trial for too long."""
        state, limit = self._session.state, self._resources.wait_for_nodes or WAIT_FOR_NODES
        if self._session.executor.workers or state.running.keys() - state.waiting:
            self._no_room_since = None
            return
        if self._no_room_since is None:
            self._no_room_since = now
            self._session.message(f"no node has room for a trial: waiting up to {limit:g} s for one")
        elif now - self._no_room_since > limit:
            text = f"no node of the cluster at {self._address} has had room for a trial for {limit:g} s"
            raise ExecutorLost(f"{text}; add nodes, then run the same command again to resume")

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
        beats = self._beats.newest()
        self._killed_at = {trial_id: at for trial_id, at in self._killed_at.items() if trial_id in beats}
        hung, killed = self._watchdog.find_hung(beats, now), set[tuple[str, int]]()
        # Trials that train together share a process: none of them hangs as long as one of them makes progress.
        busy = {beat.process for trial_id, (_, beat) in beats.items() if beat and trial_id not in hung}
        for trial_id, seconds in hung.items():
            beat = beats[trial_id][1]
            if beat and beat.process in busy:
                continue
            if trial_id in self._killed_at:
                if now - self._killed_at[trial_id] > RESPONSE_TIMEOUT:
                    return f"it has not noticed that the worker of {trial_id} died"
                continue
            self._killed_at[trial_id] = now
            if beat and beat.process in killed:
                continue
            if not self._kill_worker(trial_id, beat):
                return f"{trial_id} has made no progress for {seconds:.0f} s, and its worker was not found"
            where = f" on {beat.host}" if self._address and beat else ""
            self._session.message(f"{trial_id} has made no progress for {seconds:.0f} s: killing its worker{where}")
            killed |= {beat.process} if beat else set()
        return None

    def _kill_worker(self, trial_id: str, beat: Heartbeat | None) -> bool:
        """Kills the process that trains a trial: on a cluster through Ray, else by its id. Returns whether it can."""
        if self._address:
            self._to_kill.add(trial_id)
            return True
        workers = [process for process in marked_processes(self._session.root) if beat and process.pid == beat.pid]
        for worker in workers:
            worker.kill()
        return bool(workers)
