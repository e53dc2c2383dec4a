"""Ray may die in any of its parts, and its workers may hang: the campaign goes on in the same command."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import Heartbeat, stop_requested
from tests.helpers.real_run import Run, left_over, start
from tests.helpers.tiny_campaign import begun, drive, losses, pretend, records, session_on, train_all, write_file
from tune.executors import ray_supervisor as keeping
from tune.executors.orphans import mark_children
from tune.executors.ray_process import DriverExited, RayReady
from tune.executors.ray_supervisor import OVER, Driver, RaySupervisor
from tune.session.session import ExecutorLost, Session
from tune.spec.schema import Resources
from tune.storage.journal import read_journal
from tune.trials.retries import RETRY_RULES

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


# ---- one message after the other, from a driver that is played here --------------------------------------------------


@pytest.fixture
def session(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    with session_on(write_file(tmp_path, corpus), tmp_path / "tiny") as session:
        session.lines = []  # type: ignore[attr-defined]
        session.message = session.lines.append  # type: ignore[attr-defined]
        yield begun(session)


@pytest.fixture
def ray() -> Iterator[subprocess.Popen[bytes]]:
    """What stands for a process of Ray's own."""
    with subprocess.Popen(SLEEP) as process:
        yield process
        process.kill()


class Played(RaySupervisor):
    """A keeper whose driver is played by the test, at the other end of a real line."""

    def __init__(self, session: Session, ray: subprocess.Popen[bytes], **resources: Any) -> None:
        super().__init__(session, Resources.model_validate(resources))
        self.ray, self.starts = ray, 0

    def _start(self) -> None:
        ours, self.theirs = multiprocessing.Pipe()
        process = SimpleNamespace(join=lambda *_: None, kill=lambda: None, exitcode=1)
        self._driver = Driver(process, ours, time.monotonic())
        self.starts += 1

    def hear(self, message: Any) -> str | None:
        self.theirs.send(message)
        return self._serve_one()

    def ask(self, *question: Any) -> Any:
        assert self.hear(question) is None
        answer, self.stop_requested = self.theirs.recv()
        return answer

    def next_trial(self) -> Any:
        return next(iter(self.ask("ask")), None)

    def greet(self) -> None:
        assert self.hear(RayReady(2, 2, "http://127.0.0.1:8265", (self.ray.pid,))) is None


def greeted(keeper: Played) -> Played:
    """Its driver has started, and Ray is there."""
    keeper._start()
    keeper.greet()
    return keeper


@pytest.fixture
def played(session: Session, ray: subprocess.Popen[bytes]) -> Played:
    return greeted(Played(session, ray))


@pytest.fixture
def impatient(session: Session, ray: subprocess.Popen[bytes]) -> Played:
    """A worker that has made no step for 5 seconds hangs."""
    return greeted(Played(session, ray, stall_timeout=5.0))


def test_it_hands_trials_out_and_results_in(played: Played, session: Session) -> None:
    while (spec := played.next_trial()) is not None:
        assert played.ask("should_stop", spec.trial_id, pretend(spec)) is False
        played.ask("tell", spec.trial_id, pretend(spec))
    assert played.ask("is_over") and played.stop_requested is False
    assert len(session.state.results) == 6
    assert played.hear(DriverExited()) is OVER


def test_a_driver_may_ask_for_nothing_else(played: Played) -> None:
    with pytest.raises(AssertionError, match="end"):
        played.hear(("end",))


def test_a_dead_process_of_ray_is_noticed_and_what_its_workers_suffer_is_not_their_fault(
    played: Played, session: Session
) -> None:
    spec = played.next_trial()
    played.ray.kill()
    played.ray.wait()
    assert "is gone" in str(played.hear(("worker_died", spec.trial_id, "killed")))
    assert not any(event["event"] == "worker_died" for event in session.journal.events)


def test_a_driver_that_ends_or_gives_up_too_early_is_a_lost_ray(played: Played) -> None:
    assert played.hear(DriverExited()) == "it ended before the campaign was over"
    played.theirs.close()
    assert played._serve_one() == "its driver ended with code 1"


def test_an_error_of_the_driver_is_raised_here_as_what_it_is(played: Played) -> None:
    with pytest.raises(ConfigError, match="a trial asks for 9 CPUs"):
        played.hear(DriverExited("a trial asks for 9 CPUs", is_users=True))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        played.hear(DriverExited("Traceback\nKeyError: 'x'"))


def test_a_ray_that_does_not_start_is_no_error_of_ours_and_later_on_replaced(
    played: Played, session: Session, ray: subprocess.Popen[bytes]
) -> None:
    failed = DriverExited("the current node timed out during startup", is_rays=True)
    assert played.hear(failed) == "the current node timed out during startup"
    first = Played(session, ray)
    first._start()
    first.theirs.send(failed)
    with pytest.raises(ExecutorLost, match=r"(?s)Ray did not start: the current node timed out.*doctor.*--inline"):
        first.wait()


def test_ray_is_replaced_three_times_and_then_the_run_ends_with_what_to_do(played: Played, session: Session) -> None:
    trial = played.next_trial().trial_id
    for time_ in (1, 2, 3):
        played._replace("its process raylet is gone")
        played.greet()
        assert played.starts == time_ + 1
        assert (again := played.next_trial()).trial_id == trial and again.attempt == time_ + 1
    with pytest.raises(ExecutorLost, match=r"Ray died 4 times .*raylet is gone.*give the same command again"):
        played._replace("its process raylet is gone")
    assert played.starts == 4
    assert "Ray died (its process raylet is gone); starting a new one, 3 of at most 3" in session.lines  # type: ignore


def test_a_cluster_that_is_not_ours_is_not_replaced(session: Session, ray: subprocess.Popen[bytes]) -> None:
    keeper = Played(session, ray)
    keeper._address = "10.0.0.7:6379"
    keeper._start()
    with pytest.raises(ExecutorLost, match=r"the Ray cluster at 10\.0\.0\.7:6379 is lost \(so\); it is not ours"):
        keeper._replace("so")
    assert keeper.starts == 1


def test_a_share_of_the_gpus_is_told_to_every_driver_before_it_runs(played: Played) -> None:
    played._is_running = True
    played._share = 3
    played._replace("so")
    played.greet()
    assert played.theirs.recv() == ("share", 3) and played._driver.ready is None
    played.greet()
    assert played.theirs.recv() == ("run",)


def worker(root: Path, trial_id: str) -> psutil.Process:
    """A process that has a trial and sleeps over it, as its heartbeat says."""
    with mark_children(root):
        process = subprocess.Popen(SLEEP)
    folder = root / "trials" / trial_id
    folder.mkdir(parents=True, exist_ok=True)
    Heartbeat(folder).close()
    (folder / "heartbeat").write_text(f'{{"pid": {process.pid}, "began": 0, "step": 3}}')
    return process  # type: ignore[return-value]


def test_a_worker_that_hangs_is_ended_and_its_trial_tried_again_as_hung(impatient: Played, session: Session) -> None:
    spec = impatient.next_trial()
    asleep: Any = worker(session.root, spec.trial_id)
    now = time.monotonic()
    assert impatient._check_health(now) is None and impatient._check_health(now + 4.9) is None and asleep.poll() is None
    assert impatient._check_health(now + 5.1) is None
    assert asleep.wait(30) == -9
    impatient.ask("worker_died", spec.trial_id, "killed")
    (died,) = [event for event in session.journal.events if event["event"] == "worker_died"]
    assert (died["cause"], died["step"], died["attempt"]) == ("hung", 3, 1)
    assert impatient.next_trial().attempt == 2


def test_trials_of_one_process_hang_together_and_it_is_ended_once(impatient: Played, session: Session) -> None:
    first, second = impatient.next_trial(), impatient.next_trial()
    asleep: Any = worker(session.root, first.trial_id)
    beat = (first.folder / "heartbeat").read_text()
    second.folder.mkdir(parents=True)
    (second.folder / "heartbeat").write_text(beat)
    now = time.monotonic()
    assert impatient._check_health(now) is None
    (second.folder / "heartbeat").write_text(beat.replace('"step": 3', '"step": 4'))
    assert impatient._check_health(now + 4.0) is None and impatient._check_health(now + 8.0) is None
    assert asleep.poll() is None, "the first one stands still, but its process works on the second"
    assert impatient._check_health(now + 9.1) is None
    assert asleep.wait(30) == -9
    assert sum("ending its worker" in line for line in session.lines) == 1  # type: ignore[attr-defined]
    for spec in (first, second):
        impatient.ask("worker_died", spec.trial_id, "killed")
    died = [event["cause"] for event in session.journal.events if event["event"] == "worker_died"]
    assert died == ["hung", "hung"]


def test_a_ray_that_does_not_notice_a_dead_worker_is_lost(impatient: Played, session: Session) -> None:
    asleep: Any = worker(session.root, impatient.next_trial().trial_id)
    now = time.monotonic()
    assert [impatient._check_health(now + after) for after in (0.0, 6.0, 6.0 + keeping.SILENCE)] == [None] * 3
    assert "has not noticed" in str(impatient._check_health(now + 7.0 + keeping.SILENCE))
    asleep.wait(30)


def test_a_ray_that_has_no_trials_and_does_not_ask_for_any_is_lost(played: Played) -> None:
    now = time.monotonic()
    assert played._check_health(now + keeping.SILENCE - 1) is None
    assert played._check_health(now + keeping.SILENCE + 1) == "it has stopped asking for work"


def test_a_kill_by_the_kernel_for_lack_of_memory_is_told_from_another(
    played: Played, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = played.next_trial(), played.next_trial()
    played.ask("worker_died", first.trial_id, "killed")
    kills = keeping.oom_kill_count() + 1
    monkeypatch.setattr(keeping, "kernel_kills", lambda: kills)
    played.ask("worker_died", second.trial_id, "killed")
    causes = [event["cause"] for event in session.journal.events if event["event"] == "worker_died"]
    assert causes == ["killed", "host_oom"]


def test_asked_to_stop_it_lets_the_trials_save_and_ends_them_after_a_minute(played: Played, session: Session) -> None:
    spec = played.next_trial()
    spec.folder.mkdir(parents=True)
    session.stop_requested = True
    now = time.monotonic()
    assert played._check_health(now) is None and stop_requested(spec.folder)
    assert played._check_health(now + keeping.GRACE - 1) is None
    assert played._check_health(now + keeping.GRACE + 1) == "not all trials have saved in time"
    assert played.next_trial() is None and played.stop_requested
    assert drive(session) == []


# ---- real ones, really killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keeper")


ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


@pytest.fixture(scope="module")
def file(folder: Path, corpus: Path) -> Path:
    """Two trials of some seconds at a time; no checkpoint is due before the end."""
    rarely = "{every: 100000}"
    path = write_file(folder, corpus, phases=ONE_PHASE, seeds="[1]", steps=400, every=50, checkpoint=rarely)
    path.write_text(path.read_text().replace("workers: 2}", "workers: 2, stall_timeout: 20}"))
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path, file: Path) -> dict[Any, Any]:
    train_all(file, folder / "inline")
    return losses(folder / "inline")


def at_work(run: Run) -> None:
    run.until(lambda: sum(beat["step"] > 50 for beat in run.beats().values()) == 2)


def part(name: str) -> Callable[[Run], psutil.Process]:
    return lambda run: next(process for process in run.family() if process.name() == name)


VICTIMS = {"raylet": part("raylet"), "gcs_server": part("gcs_server"), "driver": Run.driver}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", VICTIMS)
def test_when_a_part_of_ray_dies_it_is_replaced_and_the_same_command_finishes(
    folder: Path, file: Path, undisturbed: dict[Any, Any], victim: str
) -> None:
    run = start(file, folder / victim)
    try:
        at_work(run)
        old = {beat["pid"] for beat in run.beats().values()}
        family = run.family()
        VICTIMS[victim](run).kill()
        run.until(lambda: any(beat["pid"] not in old and beat["step"] > 0 for beat in run.beats().values()))
        assert left_over(family) == []
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.process.kill()
    assert losses(run.root) == undisturbed
    assert run.err.read_text().count("starting a new one, 1 of at most 3") == 1
    assert "Traceback" not in run.err.read_text()
    assert {event["cause"] for event in run.events("worker_died")} == {"ray_lost"}
    assert len(run.events("trial_finished")) == 2 == len(run.events("executor_lost")) + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_hangs_is_ended_within_its_timeout_and_its_trial_goes_on(
    folder: Path, file: Path, undisturbed: dict[Any, Any]
) -> None:
    run = start(file, folder / "hung")
    try:
        at_work(run)
        trial_id, beat = next(iter(run.beats().items()))
        psutil.Process(beat["pid"]).suspend()
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.process.kill()
    (died,) = run.events("worker_died")
    assert (died["trial_id"], died["cause"]) == (trial_id, "hung")
    assert f"{trial_id} has made no progress for 2" in run.err.read_text()
    assert losses(run.root) == undisturbed
    assert {record["trial_id"]: record["attempt"] for record in records(run.root)}[trial_id] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_every_trial_save_where_it_is_and_a_killed_run_leaves_nothing_behind(
    folder: Path, file: Path, undisturbed: dict[Any, Any], number: int
) -> None:
    runs = [start(file, folder / f"signal{number}")]
    try:
        at_work(runs[0])
        at = {trial_id: beat["step"] for trial_id, beat in runs[0].beats().items()}
        os.kill(runs[0].process.pid, number)
        assert runs[0].wait() == 128 + number, runs[0].err.read_text()
        saved = {path.parents[1].name: int(path.name[5:]) for path in runs[0].root.glob("trials/*/checkpoints/step_*")}
        assert saved.keys() == at.keys() and all(saved[trial_id] >= step for trial_id, step in at.items())

        runs.append(run := start(file, folder / f"signal{number}"))
        began: dict[str, int] = {}

        def all_have_gone_on() -> bool:  # one that is being set up has no step to go on from yet
            began.update({name: beat["began"] for name, beat in run.beats().items() if beat["step"] > beat["began"]})
            return began.keys() == saved.keys()

        run.until(all_have_gone_on)
        assert began == saved
        family, driver = run.family(), run.driver()
        driver.suspend()  # it cannot clean up after its parent
        run.process.kill()
        run.wait()

        runs.append(run := start(file, folder / f"signal{number}"))
        assert run.wait() == 0, run.err.read_text()
        assert "processes left over from a killed run" in run.err.read_text()
        assert left_over(family) == []
    finally:
        for run in runs:
            run.process.kill()
    assert losses(runs[0].root) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_ray_kills_for_lack_of_memory_is_tried_once_more_alone_and_then_failed(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    run = start(file, folder / "memory")
    try:
        assert run.wait() == 4, run.err.read_text()
    finally:
        run.process.kill()
    assert {event["cause"] for event in run.events("worker_died")} == {"host_oom"}
    assert RETRY_RULES["host_oom"].retries == 1 and len(run.events("worker_died")) == 4
    assert all(record["error"].startswith("host_oom: ") for record in records(run.root))
    assert read_journal(run.root / "journal.jsonl")[-1]["status"] == "finished"
