"""How far the workers of a cluster are, and what they are told, through Ray instead of through files of the results.

Another host sees a file late, or never. So an actor beside the driver, the relay, knows the heartbeat of every trial
and which trials shall save and stop. A thread of each worker asks it once a second, and a thread of the process that
runs Ray connects it with the campaign's process (tune/executors/ray_supervisor.py), which decides. A private Ray needs
none of this: its workers share the machine with the campaign.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ngpt.config.base import printable
from ngpt.config.secrets import redact
from ngpt.system.heartbeat import Heartbeat, read_heartbeat, request_stop
from tune.trials.trial import TrialSpec

RELAY_SECONDS = 1.0  # between two exchanges
ANSWER_TIMEOUT = 30.0  # seconds; a longer silence is one exchange less

MAX_REASON = 300  # characters
ANSI = re.compile(r"\x1b\[[0-9;]*m")
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")
NODE_ADDRESS = re.compile(r"\bip[=:] ?([0-9a-fA-F.:]+)")

Beats = dict[str, tuple[int, Heartbeat]]  # by trial: its attempt and its newest heartbeat
Attempts = Iterable[tuple[str, int]]  # trials and the numbers of their attempts


class Relay:
    """Actor that workers report their heartbeats to. It may be restarted, since each side repeats what it says."""

    def __init__(self) -> None:
        self._beats: Beats = {}
        self._to_stop = frozenset[tuple[str, int]]()

    def report(self, beats: Beats) -> frozenset[tuple[str, int]]:
        """Takes the heartbeats of a worker's trials; returns all attempts that shall save and stop."""
        self._beats |= beats
        return self._to_stop

    def exchange(self, to_stop: Attempts) -> Beats:
        """Takes the attempts that shall save and stop; returns the heartbeats reported since the last call."""
        beats, self._beats, self._to_stop = self._beats, {}, frozenset(to_stop)
        return beats


def start_error(error: str) -> str:
    """The reason in Ray's long error for a worker that could not start: its last exception, in one line."""
    lines = [ANSI.sub("", line).strip() for line in error.splitlines()]
    found = [line for line in lines if EXCEPTION.match(line)] or [line for line in lines if line] or ["no reason given"]
    return printable(redact(found[-1]), MAX_REASON)


def address_in(error: str) -> str | None:
    """The IP address of the node of a worker, according to Ray's error for it; None if it says nothing."""
    found = NODE_ADDRESS.search(error)
    return found[1] if found else None


def start_relay() -> Any:
    """Starts the relay on the node of this process and returns its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Relay).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


class WorkerLink:
    """Thread of a worker that tells the relay how far its trials are, and passes their stop requests on to them.

    Without an answer it goes on asking. If the process that runs Ray is gone, Ray ends the worker.
    """

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._trials: Sequence[TrialSpec] = ()
        threading.Thread(target=self._run, daemon=True, name="relay").start()

    def follow(self, trials: Sequence[TrialSpec]) -> None:
        """Reports on these trials from now on."""
        self._trials = trials

    def _run(self) -> None:
        while True:
            time.sleep(RELAY_SECONDS)
            trials = self._trials
            beats: Beats = {}
            for trial in trials:
                if beat := read_heartbeat(trial.folder):
                    beats[trial.trial_id] = trial.attempt, beat
            try:
                to_stop = ray.get(self._relay.report.remote(beats), timeout=ANSWER_TIMEOUT)
            except Exception:  # of many types: the network or the node of the driver is away for a while
                continue
            for trial in trials:
                is_training = trial.trial_id in beats  # otherwise the request would outlive the trial
                if is_training and (trial.trial_id, trial.attempt) in to_stop:
                    with contextlib.suppress(OSError):
                        request_stop(trial.folder)


class DriverLink(threading.Thread):
    """Thread of the process that runs Ray: tells the session what workers report, and carries out what it asks for.

    Args:
        session: the session in the parent process; its method `exchange` takes heartbeats, and returns the ids of
            the trials whose workers shall be killed, and the attempts that shall save and stop.
        kill: kills the worker of a trial.
    """

    def __init__(self, session: Any, relay: Any, kill: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name="relay")
        self._session, self._relay, self._kill = session, relay, kill
        self._to_stop = set[tuple[str, int]]()

    def request_stop(self, trial: TrialSpec) -> None:
        """Lets the worker of a trial save and stop it."""
        self._to_stop.add((trial.trial_id, trial.attempt))

    def run(self) -> None:
        """Exchanges once a second, until the parent process has closed the connection."""
        asked: Attempts = ()  # by the session
        while True:
            beats: Mapping[str, Any] = {}
            with contextlib.suppress(Exception):  # the relay is starting again, or Ray is shut down
                beats = ray.get(self._relay.exchange.remote({*asked, *self._to_stop}), timeout=ANSWER_TIMEOUT)
            try:
                to_kill, asked = self._session.exchange(beats)
            except (EOFError, OSError):
                return
            for trial_id in to_kill:
                self._kill(trial_id)
            time.sleep(RELAY_SECONDS)
