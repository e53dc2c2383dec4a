"""The campaign's side of Ray: starts it in a process of its own, serves it trials, watches it, and replaces it.

When a part of Ray dies, `Tuner.fit` may hang, and Ray may end the process that runs it. So that one holds nothing: it
asks this one, which has the lock, the journal and the signals, for each trial and hands over each result. Whatever
happens over there, everything of it is ended here and started anew; the trials go on from their checkpoints.
"""

import multiprocessing
import multiprocessing.resource_tracker
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil

from ngpt.config.base import ConfigError
from tune.executors.local import stop_on_signal
from tune.executors.orphans import is_alive, kill_marked, mark_children, marked_processes
from tune.executors.ray_process import DriverExited, RayReady, drive
from tune.executors.watchdog import Watchdog
from tune.session.session import ExecutorLost, Session
from tune.spec.schema import Resources
from tune.trials.retries import oom_kill_count

LOOK = 1.0  # seconds between two looks at Ray's processes and the heartbeats
START = 300.0  # seconds for Ray to start
SILENCE = 60.0  # seconds in which Ray must notice that a worker has died, or ask for work when it has none
GRACE = 60.0  # seconds for running trials to save when the run is asked to stop
GOODBYE = 20.0  # seconds for Ray to end by itself
RECENT = 30.0  # seconds: a worker that dies so soon after a kill by the kernel for lack of memory was that one
REPLACEMENTS = 3  # of Ray in one run

OVER = "over"  # said instead of a reason when all is done

# What the driver may ask for, all of it methods of the session.
SERVED = ("ask", "is_over", "tell", "should_stop", "worker_died")


@dataclass
class Driver:
    """A process that runs Ray (tune/executors/ray_process.py), and the line to it."""

    process: Any  # of multiprocessing, which has no public type for one that is spawned
    line: Connection
    started: float
    ready: RayReady | None = None
    shares: bool = False  # whether it was told how many trials share a GPU
    parts: dict[str, psutil.Process] = field(default_factory=dict)  # of Ray itself, by name, where it is ours


class RaySupervisor:
    """Ray for a session, from `__enter__` to `__exit__`."""

    def __init__(self, session: Session, resources: Resources, *, address: str | None = None) -> None:
        self._session, self._resources, self._address = session, resources, address
        self._replaced = 0
        self._share: int | None = None  # trials that share a GPU, where that was chosen once Ray had started
        self._is_running = False
        self._watchdog = Watchdog(resources.stall_timeout)
        self._killed: dict[str, float] = {}  # when a trial that hung was ended, until Ray says that it is
        self._kernel_kills, self._short_of_memory = oom_kill_count(), -RECENT
        self._looked = self._heard = 0.0
        self._deadline: float | None = None  # for trials to save

    def __enter__(self) -> "RaySupervisor":
        self._start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        started = marked_processes(self._session.root)  # before any of it has lost its parent
        self._driver.line.close()  # which tells the driver to end Ray
        if kind is None:
            self._driver.process.join(GOODBYE)
        self._end(started)
        ready = self._driver.ready
        # Once nobody can write there any more; after an error its logs may say why.
        if kind is None and ready and ready.folder:
            shutil.rmtree(ready.folder, ignore_errors=True)

    def wait(self) -> RayReady:
        """What Ray has started with, once it has.

        Raises:
            ConfigError: a trial fits nowhere.
            ExecutorLost: it does not start.
        """
        while self._driver.ready is None:
            if why := self._serve_one():
                text = "see what `python run_campaign.py doctor` says; --inline runs without Ray"
                raise ExecutorLost(f"Ray did not start: {why}\n{text}")
        return self._driver.ready

    def share(self, trials_per_device: int) -> RayReady:
        """Lets so many trials share each GPU, now and on every Ray that replaces this one; raises as `wait`."""
        self._share = trials_per_device
        self._send_command()
        return self.wait()

    def run(self) -> None:
        """Runs every trial; replaces Ray where it dies.

        Raises:
            ExecutorLost: it died too often, or it is not ours to replace.
        """
        with stop_on_signal(self._session, at_once=lambda: kill_marked(self._session.root)):
            self._is_running, self._heard = True, time.monotonic()
            self._send_command()
            while (why := self._serve_one()) is not OVER:
                if why and self._session.stop_requested:
                    return
                if why:
                    self._replace(why)

    # ---- the driver ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        multiprocessing.resource_tracker.ensure_running()  # a helper of this process, which must not carry the mark
        arguments = (theirs, self._resources, self._address, self._session.root)
        process = context.Process(target=drive, args=arguments, name="ray driver", daemon=True)
        with mark_children(self._session.root):
            process.start()
        theirs.close()
        self._driver = Driver(process, ours, time.monotonic())
        self._heard = time.monotonic()

    def _end(self, started: Sequence[psutil.Process]) -> None:
        """Ends the driver, Ray and the workers, as far as they are there: what was `started`, and what carries the mark."""
        self._driver.line.close()
        self._driver.process.kill()
        self._driver.process.join(GOODBYE)  # before others could take its end for a stranger's
        kill_marked(self._session.root, started)

    def _replace(self, why: str) -> None:
        if self._address:
            text = f"the Ray cluster at {self._address} is lost ({why}); it is not ours to start again: see to it, and"
            raise ExecutorLost(f"{text} give the same command again to go on")
        self._end(marked_processes(self._session.root))
        self._session.executor_lost(why)
        self._killed.clear()
        if self._replaced == REPLACEMENTS:
            text = f"Ray died {REPLACEMENTS + 1} times ({why}): see what `python run_campaign.py doctor` says, and"
            raise ExecutorLost(f"{text} give the same command again to go on")
        self._replaced += 1
        self._session.message(f"Ray died ({why}); starting a new one, {self._replaced} of at most {REPLACEMENTS}")
        self._start()

    # ---- what it asks for ------------------------------------------------------------------------------------------

    def _serve_one(self) -> str | None:
        """Answers the driver, or looks whether all is well; returns why Ray is lost, if it is, and OVER at the end."""
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            if why := self._check_health(now):
                return why
        try:
            if not self._driver.line.poll(LOOK / 2):
                return None
            message = self._driver.line.recv()
        except (EOFError, OSError):
            self._driver.process.join(GOODBYE)
            return f"its driver ended with code {self._driver.process.exitcode}"
        self._heard = time.monotonic()
        match message:
            case RayReady():
                return self._on_ready(message)
            case DriverExited():
                return self._is_over(message)
        name, *arguments = message
        if name == "worker_died" and (why := self._dead_process()):
            return why  # it is Ray that died, and its workers with it
        value = self._served(name)(*arguments)
        self._driver.line.send((value, self._session.stop_requested))
        return None

    def _on_ready(self, ready: RayReady) -> str | None:
        try:
            parts = [psutil.Process(pid) for pid in ready.process_ids]
            self._driver.parts = {part.name(): part for part in parts}
        except psutil.NoSuchProcess as gone:
            return f"its process {gone.pid} is gone"
        self._driver.ready = ready
        if self._is_running:
            self._send_command()
        return None

    def _send_command(self) -> None:
        """Tells a driver that is ready what to do: to share the GPUs as was chosen, then to run."""
        if self._share is not None and not self._driver.shares:
            self._driver.shares, self._driver.ready = True, None
            self._driver.line.send(("share", self._share))
        else:
            self._driver.line.send(("run",))

    def _served(self, name: str) -> Callable[..., Any]:
        assert name in SERVED, name
        return self._worker_died if name == "worker_died" else getattr(self._session, name)

    def _worker_died(self, trial_id: str, cause: str) -> None:
        """What the driver cannot know of a dead worker: that we ended it, or that the kernel did."""
        since = self._killed.pop(trial_id, None)
        self._count_kernel_kills()
        if since is not None:
            cause = "hung"
        elif cause == "killed" and time.monotonic() - self._short_of_memory < RECENT:
            cause = "host_oom"
        self._session.worker_died(trial_id, cause)

    def _is_over(self, message: DriverExited) -> str | None:
        if message.error is None:
            is_over = self._session.is_over() or self._session.stop_requested
            return OVER if is_over else self._dead_process() or "it ended before the campaign was over"
        if message.is_users:
            raise ConfigError(message.error)
        if message.is_rays:
            return message.error
        if why := self._dead_process():
            return why
        raise RuntimeError(f"the driver of Ray failed:\n{message.error}")

    # ---- whether all is well ---------------------------------------------------------------------------------------

    def _check_health(self, now: float) -> str | None:
        self._count_kernel_kills()
        if why := self._dead_process():
            return why
        if self._driver.ready is None:
            if self._session.stop_requested:
                return OVER
            return "it did not start in time" if now - self._driver.started > START else None
        if self._session.stop_requested:
            return self._stop_trials(now)
        if not self._session.state.running and now - self._heard > SILENCE:
            return "it has stopped asking for work"
        return self._end_hung(now)

    def _dead_process(self) -> str | None:
        dead = next((name for name, part in self._driver.parts.items() if not is_alive(part)), None)
        return None if dead is None else f"its process {dead} is gone"

    def _stop_trials(self, now: float) -> str | None:
        """Lets the trials save; those that have not done so in time are ended as they are."""
        if self._deadline is None:
            self._deadline = now + GRACE
            self._session.message("stopping: running trials save where they are; a second signal ends them at once")
        self._session.request_stop()
        return "not all trials have saved in time" if now > self._deadline else None

    def _end_hung(self, now: float) -> str | None:
        beats = self._session.heartbeats()
        self._killed = {trial_id: since for trial_id, since in self._killed.items() if trial_id in beats}
        silent, ended = self._watchdog.look(beats, now), set[int]()
        # Trials that are trained together hang together; one that stands still beside others only waits for its turn.
        lively = {beat.pid for trial_id, (_, beat) in beats.items() if beat and trial_id not in silent}
        for trial_id, seconds in silent.items():
            if (beat := beats[trial_id][1]) and beat.pid in lively:
                continue
            if trial_id in self._killed:
                if now - self._killed[trial_id] > SILENCE:
                    return f"it has not noticed that the worker of {trial_id} is gone"
                continue
            self._killed[trial_id] = now
            if beat and beat.pid in ended:
                continue
            workers = [process for process in marked_processes(self._session.root) if beat and process.pid == beat.pid]
            if not workers:
                return f"{trial_id} has made no progress for {seconds:.0f} s, and its worker is not to be found"
            self._session.message(f"{trial_id} has made no progress for {seconds:.0f} s: ending its worker")
            workers[0].kill()
            ended.add(workers[0].pid)
        return None

    def _count_kernel_kills(self) -> None:
        kills = oom_kill_count()
        if kills > self._kernel_kills:
            self._kernel_kills, self._short_of_memory = kills, time.monotonic()
