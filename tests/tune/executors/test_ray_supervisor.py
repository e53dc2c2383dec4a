"""Ray may lose any of its parts and its workers may hang: the same command still finishes the campaign."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import Heartbeat, HeartbeatWriter, read_heartbeat, stop_requested
from tests.helpers.real_run import Run, left_over, start
from tests.helpers.tiny_campaign import begun, losses, pretend, records, session_on, train_all, write_file
from tune.executors import watchdog
from tune.executors.orphans import mark_children
from tune.executors.ray_process import RayExited, RayReady
from tune.executors.ray_supervisor import (
    FINISHED,
    RESPONSE_TIMEOUT,
    SAVE_TIMEOUT,
    START_TIMEOUT,
    WAIT_FOR_NODES,
    RayProcess,
    RaySupervisor,
)
from tune.executors.signals import StoppedEarly
from tune.session.executor_info import ExecutorLost
from tune.session.session import Session
from tune.spec.schema import Resources
from tune.storage.journal import read_journal
from tune.trials.retries import RETRY_RULES

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


# ---- message by message, with the test in the place of Ray's process -------------------------------------------------


@pytest.fixture
def lines() -> list[str]:
    """The messages of the session."""
    return []


@pytest.fixture
def session(tmp_path: Path, corpus: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    with session_on(write_file(tmp_path, corpus), tmp_path / "tiny") as session:
        session.message = lines.append
        yield begun(session)


@pytest.fixture
def sleepers() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts processes that sleep; none of them outlives the test, also if it fails."""
    processes: list[subprocess.Popen[bytes]] = []

    def sleeper() -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(SLEEP))
        return processes[-1]

    yield sleeper
    for process in processes:
        process.kill()
        process.wait()


class Clock:
    """A clock that moves by hand, in whole seconds."""

    now = 1000

    def __call__(self) -> float:
        return float(self.now)


class PlayedSupervisor(RaySupervisor):
    """A supervisor whose child process is played by the test, at the other end of a real pipe."""

    def __init__(self, session: Session, raylet: subprocess.Popen[bytes], **resources: Any) -> None:
        self.clock, self.raylet, self.starts = Clock(), raylet, 0
        super().__init__(session, Resources.model_validate(resources), clock=self.clock)

    def _start(self) -> None:
        ours, self.theirs = multiprocessing.Pipe()
        process = SimpleNamespace(join=lambda *_: None, kill=lambda: None, exitcode=1)
        self._ray = RayProcess(process, ours)
        self.starts += 1

    def receive(self, message: Any) -> str | None:
        self.theirs.send(message)
        return self._handle_next()

    def call(self, *message: Any) -> Any:
        assert self.receive(message) is None
        answer, self.stop_requested = self.theirs.recv()
        return answer

    def next_trial(self) -> Any:
        return next(iter(self.call("ask")), None)

    def report_ready(self) -> None:
        assert self.receive(RayReady(2, 2, "http://127.0.0.1:8265", (self.raylet.pid,))) is None

    def health_after(self, seconds: int) -> str | None:
        self.clock.now += seconds
        return self._check_health()


def ready(supervisor: PlayedSupervisor) -> PlayedSupervisor:
    """Its Ray has started."""
    supervisor._start()
    supervisor.report_ready()
    return supervisor


@pytest.fixture
def supervisor(session: Session, sleepers: Callable[[], subprocess.Popen[bytes]]) -> PlayedSupervisor:
    return ready(PlayedSupervisor(session, sleepers()))


@pytest.fixture
def impatient(session: Session, sleepers: Callable[[], subprocess.Popen[bytes]]) -> PlayedSupervisor:
    """A trial without a step for 5 seconds hangs."""
    return ready(PlayedSupervisor(session, sleepers(), stall_timeout=5.0))


def test_trials_are_handed_out_and_results_recorded(supervisor: PlayedSupervisor, session: Session) -> None:
    while (spec := supervisor.next_trial()) is not None:
        assert supervisor.call("should_stop", spec.trial_id, pretend(spec)) is False
        supervisor.call("tell", spec.trial_id, pretend(spec))
    assert supervisor.call("is_over") and supervisor.stop_requested is False
    assert len(session.state.results) == 6
    assert supervisor.receive(RayExited()) is FINISHED


def test_other_methods_of_the_session_cannot_be_called(supervisor: PlayedSupervisor) -> None:
    with pytest.raises(AssertionError, match="end"):
        supervisor.receive(("end",))


def test_workers_that_die_with_ray_are_not_counted_as_deaths(supervisor: PlayedSupervisor, session: Session) -> None:
    spec = supervisor.next_trial()
    supervisor.raylet.kill()
    supervisor.raylet.wait()
    assert "is gone" in str(supervisor.receive(("worker_died", spec.trial_id, "killed")))
    assert not any(event["event"] == "worker_died" for event in session.journal.events)


def test_a_trial_without_a_place_in_the_cluster_does_not_hang(supervisor: PlayedSupervisor) -> None:
    spec = supervisor.next_trial()
    supervisor.call("set_waiting", [spec.trial_id])
    assert supervisor.health_after(100_000) is None


def test_a_cluster_without_room_is_waited_for_with_a_limit(supervisor: PlayedSupervisor, lines: list[str]) -> None:
    spec = supervisor.next_trial()
    supervisor.call("resize", 0, 1, 0, "node b left the cluster or is about to; workers 0")
    supervisor.call("worker_died", spec.trial_id, "node_lost")

    def wait(seconds: float) -> None:
        for _ in range(int(seconds / 50)):
            supervisor.clock.now += 50
            supervisor.call("set_waiting", [])  # Ray's process calls every few seconds

    wait(WAIT_FOR_NODES)
    assert lines[-1] == "no node has room for a trial: waiting up to 600 s for one"
    supervisor.call("resize", 1, 1, 0, "node c joined the cluster; workers 1")
    wait(50)
    supervisor.call("resize", 0, 1, 0, "node c left the cluster or is about to; workers 0")
    wait(WAIT_FOR_NODES)
    with pytest.raises(ExecutorLost, match=r"has had room for a trial for 600 s; add nodes, then run the same command"):
        wait(100)


def test_ray_is_lost_when_its_process_exits_too_early(supervisor: PlayedSupervisor) -> None:
    assert supervisor.receive(RayExited()) == "it ended before the campaign was over"
    supervisor.theirs.close()
    assert supervisor._handle_next() == "its driver ended with code 1"


def test_an_error_in_the_ray_process_is_raised_with_its_own_type(supervisor: PlayedSupervisor) -> None:
    with pytest.raises(ConfigError, match="a trial needs 9 CPUs"):
        supervisor.receive(RayExited("a trial needs 9 CPUs", is_config_error=True))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        supervisor.receive(RayExited("Traceback\nKeyError: 'x'"))


class SlowStarter(PlayedSupervisor):
    """A supervisor whose Ray does not start the first `failures` times."""

    failures = 1

    def _start(self) -> None:
        super()._start()
        failed = RayExited("the current node timed out during startup", is_start_error=True)
        self.theirs.send(failed if self.starts <= self.failures else RayReady(2, 2, None, (self.raylet.pid,)))


def test_a_start_of_ray_that_takes_too_long_is_tried_again(
    supervisor: PlayedSupervisor, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = RayExited("the current node timed out during startup", is_start_error=True)
    assert supervisor.receive(failed) == "the current node timed out during startup"
    first = SlowStarter(session, supervisor.raylet)
    first._start()
    assert first.wait().workers == 2 and first.starts == 2
    assert capsys.readouterr().err == (
        "Ray did not start (the current node timed out during startup); trying again, 2 of at most 3\n"
    )


def test_a_ray_that_never_starts_is_reported_with_advice(supervisor: PlayedSupervisor, session: Session) -> None:
    first = SlowStarter(session, supervisor.raylet)
    first.failures = 9
    first._start()
    with pytest.raises(ExecutorLost, match=r"(?s)Ray did not start: the current node timed out.*doctor.*--inline"):
        first.wait()
    assert first.starts == 3


def test_a_stop_while_ray_starts_is_no_failed_start(
    session: Session, sleepers: Callable[[], subprocess.Popen[bytes]]
) -> None:
    supervisor = PlayedSupervisor(session, sleepers())
    supervisor._start()
    session.request_stop()
    supervisor.clock.now += 2
    with pytest.raises(StoppedEarly):
        supervisor.wait()


def test_ray_is_replaced_three_times_and_then_the_run_ends_with_advice(
    supervisor: PlayedSupervisor, lines: list[str]
) -> None:
    trial = supervisor.next_trial().trial_id
    for replacement in (1, 2, 3):
        supervisor._replace("its process raylet is gone")
        supervisor.report_ready()
        assert supervisor.starts == replacement + 1
        assert (again := supervisor.next_trial()).trial_id == trial and again.attempt == replacement + 1
    with pytest.raises(ExecutorLost, match=r"Ray died 4 times .*raylet is gone.*the same command again to resume"):
        supervisor._replace("its process raylet is gone")
    assert supervisor.starts == 4
    assert "Ray died (its process raylet is gone); starting a new one, 3 of at most 3" in lines


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path | None]:
    """Folders given to the processes that a supervisor starts; none of them runs."""
    folders: list[Path | None] = []

    def process(*, args: tuple[Any, ...], **_: Any) -> Any:
        *_, folder, _remote = args
        folders.append(folder)
        return SimpleNamespace(start=lambda: None, kill=lambda: None, join=lambda *_: None, exitcode=0)

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folders


def test_each_private_ray_has_a_new_folder_which_is_removed_when_it_ends_or_dies(
    session: Session, started: list[Path | None]
) -> None:
    with RaySupervisor(session, Resources()) as supervisor:
        (first,) = started
        assert first is not None and first.stat().st_mode & 0o777 == 0o700 and supervisor.token_command
        supervisor._replace("its process raylet is gone")
        second = started[1]
        assert second is not None and second.exists() and not first.exists()
    assert not second.exists()


def test_the_folder_of_a_ray_that_failed_keeps_its_logs_until_the_next_start(
    session: Session, started: list[Path | None]
) -> None:
    with pytest.raises(ExecutorLost), RaySupervisor(session, Resources()):
        raise ExecutorLost
    assert started[0] is not None and started[0].exists()
    with RaySupervisor(session, Resources()):
        assert not started[0].exists()


def test_a_cluster_joined_by_address_gets_no_folder(session: Session, started: list[Path | None]) -> None:
    with RaySupervisor(session, Resources(), address="10.0.0.7:6379") as supervisor:
        assert started == [None] and supervisor.token_command is None


def test_a_cluster_joined_by_address_is_not_replaced(supervisor: PlayedSupervisor) -> None:
    supervisor._address = "10.0.0.7:6379"
    with pytest.raises(ExecutorLost, match=r"the Ray cluster at 10\.0\.0\.7:6379 is lost \(so\), and this run did not"):
        supervisor._replace("so")
    assert supervisor.starts == 1


def test_every_replacement_of_ray_shares_the_gpus_before_it_runs(supervisor: PlayedSupervisor) -> None:
    supervisor._is_running = True
    supervisor._trials_per_gpu = 3
    supervisor._replace("so")
    supervisor.report_ready()
    assert supervisor.theirs.recv() == ("share", 3) and supervisor._ray.ready is None
    supervisor.report_ready()
    assert supervisor.theirs.recv() == ("run",)


def test_the_live_view_shows_the_dashboard_of_the_newest_ray(supervisor: PlayedSupervisor, session: Session) -> None:
    assert session.snapshot().dashboard_url == "http://127.0.0.1:8265"
    supervisor._replace("so")
    supervisor.receive(RayReady(2, 2, "http://127.0.0.1:8266", (supervisor.raylet.pid,)))
    assert session.snapshot().dashboard_url == "http://127.0.0.1:8266"


def test_a_long_calibration_takes_no_time_from_ray_to_share_the_gpus(supervisor: PlayedSupervisor) -> None:
    supervisor.clock.now += 2 * int(START_TIMEOUT)
    supervisor._trials_per_gpu = 3
    supervisor._send_command()
    assert supervisor.health_after(5) is None
    assert supervisor.health_after(int(START_TIMEOUT)) == "it did not start in time"


Worker = Callable[[Any], subprocess.Popen[bytes]]


@pytest.fixture
def worker(session: Session, sleepers: Callable[[], subprocess.Popen[bytes]]) -> Worker:
    """Starts a process that hangs in step 3 of a trial, according to the heartbeat."""

    def start_worker(spec: Any) -> subprocess.Popen[bytes]:
        with mark_children(session.root):
            process = sleepers()
        spec.folder.mkdir(parents=True, exist_ok=True)
        HeartbeatWriter(spec.folder).close()
        write_beat(spec.folder, process.pid, step=3)
        return process

    return start_worker


def write_beat(folder: Path, pid: int, *, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heartbeat").write_text(f'{{"pid": {pid}, "began": 0, "step": {step}}}')


def causes(session: Session) -> list[str]:
    return [event["cause"] for event in session.journal.events if event["event"] == "worker_died"]


def test_a_hung_worker_is_killed_and_its_trial_retried(
    impatient: PlayedSupervisor, session: Session, worker: Worker
) -> None:
    spec = impatient.next_trial()
    process = worker(spec)
    assert impatient.health_after(0) is None and impatient.health_after(4) is None and process.poll() is None
    assert impatient.health_after(2) is None
    assert process.wait(30) == -signal.SIGKILL
    impatient.call("worker_died", spec.trial_id, "killed")
    (died,) = [event for event in session.journal.events if event["event"] == "worker_died"]
    assert (died["cause"], died["step"], died["attempt"]) == ("hung", 3, 1)
    assert impatient.next_trial().attempt == 2


def test_a_process_with_several_trials_is_killed_once_all_of_them_hang(
    impatient: PlayedSupervisor, session: Session, worker: Worker, lines: list[str]
) -> None:
    first, second = impatient.next_trial(), impatient.next_trial()
    process = worker(first)
    write_beat(second.folder, process.pid, step=3)
    assert impatient.health_after(0) is None
    write_beat(second.folder, process.pid, step=4)
    assert impatient.health_after(4) is None and impatient.health_after(4) is None
    assert process.poll() is None, "the first trial makes no step, but its process works on the second"
    assert impatient.health_after(4) is None
    assert process.wait(30) == -signal.SIGKILL
    assert sum("killing its worker" in line for line in lines) == 1
    for spec in (first, second):
        impatient.call("worker_died", spec.trial_id, "killed")
    assert causes(session) == ["hung", "hung"]


def test_a_hung_worker_on_another_host_is_killed_through_ray(impatient: PlayedSupervisor, session: Session) -> None:
    impatient._address = "10.0.0.7:6379"
    first, second = impatient.next_trial(), impatient.next_trial()
    beats = {first.trial_id: (1, Heartbeat(7, 0, 3, "a")), second.trial_id: (1, Heartbeat(7, 0, 3, "b"))}
    assert impatient.call("exchange", beats) == (set(), [])
    assert impatient.health_after(0) is None
    moving = {second.trial_id: (1, Heartbeat(7, 0, 4, "b")), first.trial_id: (0, Heartbeat(9, 0, 9, "c"))}
    assert impatient.call("exchange", moving) == (set(), []), "the second has the same id, the third is an old attempt"
    assert impatient.health_after(4) is None and impatient.health_after(2) is None
    assert impatient.call("exchange", {}) == ({first.trial_id}, [])
    assert impatient.call("exchange", {}) == (set(), [])
    impatient.call("worker_died", first.trial_id, "killed")
    (died,) = [event for event in session.journal.events if event["event"] == "worker_died"]
    assert (died["cause"], died["step"]) == ("hung", 3)
    assert read_heartbeat(second.folder) == Heartbeat(7, 0, 4, "b"), "for the status of the campaign"


def test_workers_on_other_hosts_are_told_to_stop_through_ray(supervisor: PlayedSupervisor, session: Session) -> None:
    spec = supervisor.next_trial()
    session.stop_requested = True
    assert supervisor.call("exchange", {}) == (set(), [(spec.trial_id, 1)])


def test_ray_is_replaced_when_it_misses_a_dead_worker(impatient: PlayedSupervisor, worker: Worker) -> None:
    process = worker(impatient.next_trial())
    assert [impatient.health_after(seconds) for seconds in (0, 10, int(RESPONSE_TIMEOUT) - 5)] == [None] * 3
    assert process.wait(30) == -signal.SIGKILL
    assert "has not noticed" in str(impatient.health_after(10))


def test_ray_is_replaced_when_it_has_no_trials_and_asks_for_none(supervisor: PlayedSupervisor) -> None:
    assert supervisor.health_after(int(RESPONSE_TIMEOUT) - 5) is None
    assert supervisor.health_after(10) == "it has stopped asking for work"


def test_a_worker_killed_by_the_kernel_for_lack_of_memory_has_its_own_cause(
    supervisor: PlayedSupervisor, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = watchdog.oom_kill_count()
    monkeypatch.setattr(watchdog, "oom_kill_count", lambda: kills)
    supervisor._oom_killer = watchdog.OomKiller()
    first, second, third = supervisor.next_trial(), supervisor.next_trial(), supervisor.next_trial()
    supervisor.call("worker_died", first.trial_id, "killed")
    monkeypatch.setattr(watchdog, "oom_kill_count", lambda: kills + 1)
    supervisor.call("worker_died", second.trial_id, "killed")
    supervisor.clock.now += 60
    supervisor.call("worker_died", third.trial_id, "killed")
    assert causes(session) == ["killed", "host_oom", "killed"]


def test_trials_save_on_a_stop_and_are_given_up_after_a_minute(supervisor: PlayedSupervisor, session: Session) -> None:
    spec = supervisor.next_trial()
    spec.folder.mkdir(parents=True)
    session.stop_requested = True
    assert supervisor.health_after(0) is None and stop_requested(spec.folder)
    assert supervisor.next_trial() is None and supervisor.stop_requested
    assert supervisor.health_after(int(SAVE_TIMEOUT) - 5) is None
    assert supervisor.health_after(10) == "not all trials have saved in time"


# ---- real processes, really killed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("supervisor")


ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


@pytest.fixture(scope="module")
def file(folder: Path, corpus: Path) -> Path:
    """Two trials that take some seconds; no checkpoint is due before the end."""
    rarely = "{every: 100000}"
    path = write_file(folder, corpus, phases=ONE_PHASE, seeds="[1]", steps=400, every=50, checkpoint=rarely)
    path.write_text(path.read_text().replace("workers: 2}", "workers: 2, stall_timeout: 20}"))
    return path


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, file: Path) -> dict[Any, Any]:
    train_all(file, folder / "inline")
    return losses(folder / "inline")


def both_training(run: Run) -> None:
    run.until(lambda: sum(beat["step"] > 50 for beat in run.beats().values()) == 2)


def service(name: str) -> Callable[[Run], psutil.Process]:
    return lambda run: next(process for process in run.family() if process.name() == name)


VICTIMS = {"raylet": service("raylet"), "gcs_server": service("gcs_server"), "driver": Run.ray_process}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_dead_part_of_ray_is_replaced_within_the_same_command(
    folder: Path, file: Path, uninterrupted: dict[Any, Any], victim: str
) -> None:
    run = start(file, folder / victim)
    try:
        both_training(run)
        old = {beat["pid"] for beat in run.beats().values()}
        family = run.family()
        VICTIMS[victim](run).kill()
        run.until(lambda: any(beat["pid"] not in old and beat["step"] > 0 for beat in run.beats().values()))
        assert left_over(family) == []
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.end()
    assert losses(run.root) == uninterrupted
    assert run.err.read_text().count("starting a new one, 1 of at most 3") == 1
    assert "Traceback" not in run.err.read_text()
    assert {event["cause"] for event in run.events("worker_died")} == {"ray_lost"}
    assert len(run.events("trial_finished")) == 2 == len(run.events("executor_lost")) + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hung_worker_is_killed_within_its_timeout_and_its_trial_continues(
    folder: Path, file: Path, uninterrupted: dict[Any, Any]
) -> None:
    run = start(file, folder / "hung")
    try:
        both_training(run)
        trial_id, beat = next(iter(run.beats().items()))
        psutil.Process(beat["pid"]).suspend()
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.end()
    (died,) = run.events("worker_died")
    assert (died["trial_id"], died["cause"]) == (trial_id, "hung")
    assert f"{trial_id} has made no progress for 2" in run.err.read_text()
    assert losses(run.root) == uninterrupted
    assert {record["trial_id"]: record["attempt"] for record in records(run.root)}[trial_id] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_every_trial_and_a_killed_run_leaves_no_processes(
    folder: Path, file: Path, uninterrupted: dict[Any, Any], number: int
) -> None:
    runs = [start(file, folder / f"signal{number}")]
    try:
        both_training(runs[0])
        at = {trial_id: beat["step"] for trial_id, beat in runs[0].beats().items()}
        os.kill(runs[0].process.pid, number)
        assert runs[0].wait() == 128 + number, runs[0].err.read_text()
        saved = {path.parents[1].name: int(path.name[5:]) for path in runs[0].root.glob("trials/*/checkpoints/step_*")}
        assert saved.keys() == at.keys() and all(saved[trial_id] >= step for trial_id, step in at.items())

        runs.append(run := start(file, folder / f"signal{number}"))
        began: dict[str, int] = {}

        def all_have_resumed() -> bool:  # while a trial is being set up it has not resumed yet
            began.update({name: beat["began"] for name, beat in run.beats().items() if beat["step"] > beat["began"]})
            return began.keys() == saved.keys()

        run.until(all_have_resumed)
        assert began == saved
        family, ray_process = run.family(), run.ray_process()
        ray_process.suspend()  # it cannot clean up after its parent
        run.process.kill()
        run.wait()

        runs.append(run := start(file, folder / f"signal{number}"))
        assert run.wait() == 0, run.err.read_text()
        assert "processes left over from a killed run" in run.err.read_text()
        assert left_over(family) == []
    finally:
        for run in runs:
            run.end()
    assert losses(runs[0].root) == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_that_ray_kills_for_lack_of_memory_is_retried_once_alone(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    run = start(file, folder / "memory")
    try:
        assert run.wait() == 4, run.err.read_text()
    finally:
        run.end()
    assert {event["cause"] for event in run.events("worker_died")} == {"host_oom"}
    assert RETRY_RULES["host_oom"].retries == 1 and len(run.events("worker_died")) == 4
    assert all(record["error"].startswith("host_oom: ") for record in records(run.root))
    assert read_journal(run.root / "journal.jsonl")[-1]["status"] == "finished"
