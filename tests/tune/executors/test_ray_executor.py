"""Campaigns on Ray, as a user runs them: the numbers of `--inline`, warm workers, and every kind of kill."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.tune.search import Searcher

from ngpt.config.base import ConfigError
from ngpt.system.heartbeat import stop_requested
from tests.helpers.fake_gpus import GIB, FakeGpus
from tests.helpers.real_run import SCRIPT, Run, left_over, start
from tests.helpers.tiny_campaign import begun, losses, pretend, records, session_on, strict, train_all, write_file
from tests.helpers.tune_in_process import fixed_cluster
from tune.executors.ray_cluster import RayCluster
from tune.executors.ray_executor import SessionSearcher, current_umask
from tune.executors.ray_nodes import Node, NodeChange, NodeWatch, NoUsableNode
from tune.executors.ray_trainable import PAUSED, UPDATES
from tune.machine.placement import Placement
from tune.machine.ray_limits import ray_root
from tune.spec.schema import Resources
from tune.storage.journal import read_journal
from tune.trials.trial import TrialResult, TrialSpec
from tune.trials.trial_group import Updates

GPUS = {"CPU": 8.0, "GPU": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executor")


@pytest.fixture(scope="module")
def file(folder: Path, corpus: Path) -> Path:
    """Six trials of a second or two."""
    return write_file(folder, corpus, steps=300, every=20)


@pytest.fixture(scope="module")
def inline(folder: Path, file: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """The losses without Ray and without disturbance."""
    train_all(file, folder / "inline")
    return losses(folder / "inline")


# ---- one undisturbed run -------------------------------------------------------------------------------------------


@dataclass
class ObservedRun:
    """An undisturbed run as it looked from outside while it trained, and its exit code."""

    run: Run
    code: int
    family: list[psutil.Process]
    commands: list[list[str]]
    titles: list[str]
    listeners: list[tuple[str, int]]
    status: dict[str, Any]
    session: Path  # the folder of Ray's sockets and logs
    session_names: set[str]  # of what was in it, and of its sockets
    private_mode: int  # of the folder around it


@pytest.fixture(scope="module")
def observed(folder: Path, file: Path) -> Iterator[ObservedRun]:
    run = start(file, folder / "undisturbed", "--json")
    try:
        run.until_training(2)
        family = run.family()
        commands = [process.cmdline() for process in family]
        titles = [" ".join(process.cmdline()).strip() for process in run.workers()]
        sockets = [socket for process in family for socket in process.net_connections("tcp")]
        listeners = [(socket.laddr.ip, socket.laddr.port) for socket in sockets if socket.status == psutil.CONN_LISTEN]
        command = [sys.executable, str(SCRIPT), "status", str(run.root), "--json"]
        status = strict(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        options = {word for words in commands for word in words if word.startswith("--session-dir=")}
        (session,) = (Path(option.partition("=")[2]) for option in options)
        names = {path.name for path in (*session.iterdir(), *(session / "sockets").iterdir())}
        mode = session.parents[1].stat().st_mode & 0o7777
        yield ObservedRun(run, run.wait(), family, commands, titles, listeners, status, session, names, mode)
    finally:
        run.end()


def test_ray_and_inline_give_bit_identical_numbers(observed: ObservedRun, inline: dict[Any, Any]) -> None:
    assert observed.code == 0, observed.run.err.read_text()
    assert losses(observed.run.root) == inline


def test_two_workers_train_the_whole_campaign(observed: ObservedRun) -> None:
    assert len({record["provenance"]["pid"] for record in records(observed.run.root)}) == 2
    assert [record["attempt"] for record in records(observed.run.root)] == [1] * 8


def test_a_worker_is_titled_after_the_trial_it_trains(observed: ObservedRun) -> None:
    assert observed.titles
    for title in observed.titles:
        assert re.search(r"tiny (alpha/alpha|projection/project_every)=[\d.]+ seed [12]$", title)


STATE = """
import json, sys
from ray.util.state import list_actors, list_jobs

actors = [[actor.class_name, actor.ray_namespace, actor.repr_name] for actor in list_actors(sys.argv[1], detail=True)]
jobs = [[job.status.value, job.metadata] for job in list_jobs(sys.argv[1], detail=True)]
print(json.dumps({"actors": actors, "jobs": jobs}))
"""


@pytest.mark.slow
def test_ray_lists_the_job_and_its_workers_by_the_name_of_the_campaign(folder: Path, file: Path) -> None:
    run = start(file, folder / "listed")
    try:
        run.until_training(1)
        url = re.search(r"dashboard (http://127\.0\.0\.1:\d+)  workers 2", run.err.read_text())
        (raylet,) = (each for each in run.family() if each.name() == "raylet")
        token = {name: value for name, value in raylet.environ().items() if name.startswith("RAY_AUTH_")}
        command = [sys.executable, "-c", STATE, url[1] if url else ""]
        listed = subprocess.run(command, env=os.environ | token, capture_output=True, text=True)
        assert listed.returncode == 0, listed.stderr
    finally:
        run.end()
    found = strict(listed.stdout.splitlines()[-1])
    workers = [actor for actor in found["actors"] if actor[0] == "TrialWorker"]
    assert len(workers) == 2
    for _, namespace, name in workers:
        assert namespace == "campaign-tiny" and re.fullmatch(r"TrialWorker\(campaign=tiny, pid=\d+\)", name)
    metadata = {"job_name": "tiny", "campaign": "tiny", "results": str(run.root)}
    assert found["jobs"] == [["RUNNING", metadata]]


def test_every_process_listens_on_the_loopback_only(observed: ObservedRun) -> None:
    url = re.search(
        r"dashboard http://127\.0\.0\.1:(\d+)  workers 2 .*ray get-auth-token", observed.run.err.read_text()
    )
    assert url is not None and int(url[1]) in {port for _, port in observed.listeners}
    assert len(observed.listeners) > 8, "GCS, raylet, dashboard, agents, driver and workers"
    assert {address for address, _ in observed.listeners} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_rays_files_are_in_a_folder_that_only_its_user_can_enter(observed: ObservedRun) -> None:
    private = observed.session.parents[1]
    assert (private.parent, observed.private_mode) == (ray_root(), 0o700)
    assert {"sockets", "logs", "runtime_resources", "raylet", "plasma_store"} <= observed.session_names
    longest = max((name for name in observed.session_names if name.startswith("dash_")), key=len, default="")
    assert len(longest) <= len("dash_TaskEventsHead"), "the longest root of sockets is too long for this version of Ray"
    assert not private.exists()


def test_workers_give_files_the_modes_that_the_run_gives_its_own(observed: ObservedRun) -> None:
    umask = current_umask()
    wrong = {
        str(path.relative_to(observed.run.root)): f"{mode:04o}"
        for path in observed.run.root.rglob("*")
        if (mode := path.stat().st_mode & 0o7777) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_status_shows_the_run_from_another_terminal(observed: ObservedRun) -> None:
    assert (observed.status["status"], observed.status["campaign"], observed.status["metric"]) == (
        "running",
        "tiny",
        "val_loss",
    )
    assert 2 <= observed.status["done"] < observed.status["total"] == 6
    assert 1 <= len(observed.status["running"]) <= 2
    assert all(0 <= trial["step"] <= trial["steps"] == 300 for trial in observed.status["running"])
    assert observed.status["dashboard_url"] is None or observed.status["dashboard_url"].startswith("http://127.0.0.1:")


def test_stdout_is_the_summary_and_stderr_one_plain_line_per_event(observed: ObservedRun) -> None:
    assert strict(observed.run.out.read_text()) == strict((observed.run.root / "summary.json").read_text())
    lines = observed.run.err.read_text().splitlines()
    assert sum(line.startswith("[") and "val_loss" in line for line in lines) == 6
    known = ("topics: ", "starting Ray", "dashboard ", "phase ", "[", "warning: an evaluation scores 128 tokens")
    assert [line for line in lines if not line.startswith(known)] == []
    assert "\x1b" not in "".join(lines)


def test_no_process_or_file_is_left_over(observed: ObservedRun) -> None:
    assert left_over(observed.family) == []
    options = [word for command in observed.commands for word in command if word.startswith("--session-dir=")]
    assert options and not any(Path(option.partition("=")[2]).exists() for option in options)
    assert {path.name for path in observed.run.root.iterdir()} == {
        *(
            "campaign.yaml",
            "manifest.json",
            "journal.jsonl",
            "campaign.lock",
            "summary.json",
            "derived.json",
            "report.html",
            "report.md",
        ),
        *("trials", "alpha", "projection"),
    }


# ---- one run after the other, each killed in another way -----------------------------------------------------------


@dataclass
class DisturbedRun:
    root: Path
    interrupted: int
    stderr: str
    stdout: str
    after_interrupt: list[str]
    after_kill: list[str]
    code: int
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def disturbed(folder: Path, file: Path) -> Iterator[DisturbedRun]:
    """A worker is killed, then the run is interrupted; resumed, it is killed; resumed again, it finishes."""
    out, runs = folder / "disturbed", []
    try:
        runs.append(run := start(file, out))
        run.until_training(0)
        run.until(lambda: bool(run.workers()))
        run.workers()[0].kill()
        run.until(lambda: bool(run.events("worker_died")))
        run.until_training(1)
        family = run.family()
        os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        interrupted = run.wait()
        stderr, stdout, after_interrupt = run.err.read_text(), run.out.read_text(), left_over(family)

        runs.append(run := start(file, out))
        run.until_training(1)
        family = run.family()
        run.process.kill()
        run.wait()
        after_kill = left_over(family)

        runs.append(run := start(file, out, "--json"))
        code = run.wait()
        summary = strict(run.out.read_text())
        yield DisturbedRun(out / "tiny", interrupted, stderr, stdout, after_interrupt, after_kill, code, summary)
    finally:
        for run in runs:
            run.end()


@pytest.mark.slow
def test_the_losses_after_every_kind_of_kill_equal_those_of_an_undisturbed_run(
    disturbed: DisturbedRun, inline: dict[Any, Any]
) -> None:
    assert disturbed.code == 0
    assert losses(disturbed.root) == inline
    assert (disturbed.summary["status"], disturbed.summary["trials"]["finished"]) == ("finished", 6)


@pytest.mark.slow
def test_no_finished_trial_is_trained_again(disturbed: DisturbedRun) -> None:
    finished: set[str] = set()
    for event in read_journal(disturbed.root / "journal.jsonl"):
        if event["event"] == "trial_started":
            assert event["trial_id"] not in finished
        elif event["event"] == "trial_finished":
            finished.add(event["trial_id"])
    assert len(finished) == 6


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_trial_retried(disturbed: DisturbedRun) -> None:
    events = read_journal(disturbed.root / "journal.jsonl")
    died = [event for event in events if event["event"] == "worker_died"]
    assert len(died) == 1
    again = [e for e in events if e["event"] == "trial_started" and e["trial_id"] == died[0]["trial_id"]]
    assert again[1]["attempt"] == 2 and again[1]["seq"] > died[0]["seq"]
    assert (died[0]["cause"], died[0]["attempt"]) == ("killed", 1)
    assert "worker died (its process was killed or crashed); retrying from the newest" in disturbed.stderr
    assert "Traceback" not in disturbed.stderr and "ERROR" not in disturbed.stderr


@pytest.mark.slow
def test_ctrl_c_exits_with_130_a_summary_and_the_command_that_resumes(disturbed: DisturbedRun) -> None:
    assert disturbed.interrupted == 130
    assert disturbed.stderr.splitlines()[-1].startswith("interrupted; to resume: python run_campaign.py ")
    assert "interrupted" in disturbed.stdout and "\x1b" not in disturbed.stdout


@pytest.mark.slow
def test_no_process_outlives_a_run_that_was_interrupted_or_killed(disturbed: DisturbedRun) -> None:
    assert (disturbed.after_interrupt, disturbed.after_kill) == ([], [])
    assert not list(disturbed.root.glob(".tune-*"))
    assert not (disturbed.root / "campaign.pid").exists()


class Clock:
    """A clock that moves by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- the parts, without Ray ----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    return write_file(tmp_path, corpus)


def last_report(given: dict[str, Any], result_of: Callable[[TrialSpec], TrialResult]) -> dict[str, Any]:
    """The last report of a worker on the trials it was given."""
    return {UPDATES: Updates(ended={spec.trial_id: result_of(spec) for spec in given["specs"]}), "done": True}


def test_the_searcher_suggests_as_many_trials_as_there_are_workers(small: Path, tmp_path: Path) -> None:
    cluster = fixed_cluster(2, per_trial={"CPU": 1.0, "GPU": 0.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        first, second = searcher.suggest("a"), searcher.suggest("b")
        assert isinstance(first, dict) and isinstance(second, dict)
        assert first["resources"] == cluster.per_trial
        assert searcher.suggest("c") is None
        searcher.on_trial_complete("a", last_report(first, pretend))
        assert isinstance(searcher.suggest("c"), dict)
        assert first["specs"][0].trial_id in session.state.results


def test_the_searcher_waits_for_the_winner_of_a_phase_and_ends_after_the_last(small: Path, tmp_path: Path) -> None:
    cluster = fixed_cluster(9, per_trial={"CPU": 1.0, "GPU": 0.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        given = {name: searcher.suggest(name) for name in "abcd"}
        assert searcher.suggest("e") is None  # the next phase needs the winner of this one
        for name, config in given.items():
            assert isinstance(config, dict)
            searcher.on_trial_complete(name, last_report(config, pretend))
        for name in "ef":
            config = searcher.suggest(name)
            assert isinstance(config, dict)
            searcher.on_trial_complete(name, last_report(config, pretend))
        assert searcher.suggest("g") == Searcher.FINISHED


def test_a_trial_without_a_result_means_a_dead_worker_unless_the_run_was_stopped(small: Path, tmp_path: Path) -> None:
    cluster = fixed_cluster(2, per_trial={"CPU": 1.0, "GPU": 0.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        first, second = searcher.suggest("a"), searcher.suggest("b")
        assert isinstance(first, dict) and isinstance(second, dict)
        searcher.on_trial_complete("a", None, error=True)
        again = searcher.suggest("c")
        assert isinstance(again, dict)
        assert (again["specs"][0].trial_id, again["specs"][0].attempt) == (first["specs"][0].trial_id, 2)
        session.stop_requested = True
        searcher.on_trial_complete("b", {"step": 3})
        assert searcher.suggest("d") == Searcher.FINISHED
        assert sum(event["event"] == "worker_died" for event in session.journal.events) == 1


def test_a_trial_that_saved_and_stopped_is_not_a_dead_worker(small: Path, tmp_path: Path) -> None:
    cluster = fixed_cluster(2, per_trial={"CPU": 1.0, "GPU": 0.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        searcher.suggest("a")
        searcher.on_trial_complete("a", {UPDATES: Updates(), PAUSED: True})
        assert not any(event["event"] == "worker_died" for event in session.journal.events)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("Failure # 1\n1 worker(s) were killed due to the node running low on memory. Memory on ...", "host_oom"),
        ("Failure # 1\nThe actor died unexpectedly before finishing this task.", "killed"),
        ("", "killed"),
        ("Failure # 1\ntune.trials.trial_group.GpuUnusable: an error has left the GPU unusable", "gpu_error"),
    ],
)
def test_the_error_of_ray_tells_why_a_worker_ended(small: Path, tmp_path: Path, error: str, cause: str) -> None:
    cluster = fixed_cluster(2, per_trial={"CPU": 1.0, "GPU": 0.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        searcher.suggest("a")
        searcher.worker_died("a", error)
        searcher.on_trial_complete("a", None, error=True)
        (died,) = [event for event in session.journal.events if event["event"] == "worker_died"]
        assert died["cause"] == cause


def test_a_worker_that_cannot_start_is_charged_to_its_node(small: Path, tmp_path: Path) -> None:
    cluster, reason = fixed_cluster(2, per_trial={"CPU": 1.0}), "ModuleNotFoundError: No module named 'torch'"
    one, two = (Node(f"{n:056x}", f"host{n}", f"10.0.0.{n}", {"CPU": 2.0}) for n in (1, 2))
    cluster.nodes = watch = NodeWatch(lambda: [one, two])
    cluster.address, cluster.node_ids, cluster.resources = "10.0.0.1:6379", {one.node_id, two.node_id}, Resources()
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        for trial in range(2):
            searcher.suggest(str(trial))
            searcher.worker_died(str(trial), f"ip=10.0.0.2\n{reason}", (), started=False)
            searcher.on_trial_complete(str(trial), None, error=True)
        died = [event for event in session.journal.events if event["event"] == "worker_died"]
        assert [(event["cause"], event["reason"]) for event in died] == [("cannot_start", reason)] * 2
        watch.poll(now=True)
        assert watch.nodes == (one,) and watch.excluded.keys() == {two.node_id}


def test_the_reason_why_a_worker_of_a_private_ray_cannot_start_is_recorded(small: Path, tmp_path: Path) -> None:
    cluster = fixed_cluster(2, per_trial={"CPU": 1.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        searcher.suggest("a")
        while not session.state.results:
            searcher.worker_died("a", "OSError: [Errno 28] No space left on device: '/x'", (), started=False)
            searcher.on_trial_complete("a", None, error=True)
            searcher.suggest("a")
        (result,) = session.state.results.values()
        assert result["error"] == "killed: OSError: [Errno 28] No space left on device: '/x', 4 times"


def test_an_early_stopped_trial_is_recorded_once_and_is_not_a_dead_worker(tmp_path: Path, corpus: Path) -> None:
    search = "{method: random, confirm: false, trials: 2, seed: 0, space: {alpha: {uniform: [0.1, 0.5]}}}"
    phases = f"\n  - name: find\n    search: {search}\nearly_stop: {{reduction: 2, first: 3}}\n"
    cluster = fixed_cluster(3)
    with session_on(write_file(tmp_path, corpus, phases=phases, seeds="[1]"), tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        specs = {name: searcher.suggest(name)["specs"][0] for name in "abc"}
        ended = []
        for i, (name, spec) in enumerate(specs.items()):
            interim = replace(pretend(spec, status="stopped"), metrics={"steps": 3, "tokens": 192, "val_loss": 5.0 + i})
            ended += [name] if searcher.should_stop(name, {UPDATES: Updates(interim={spec.trial_id: interim})}) else []
        assert ended == ["b", "c"], "the later, the worse"
        for name in ended:
            searcher.on_trial_complete(name, {UPDATES: Updates()})
        assert [session.state.results[specs[name].trial_id]["status"] for name in ended] == ["stopped"] * 2
        assert len([event for event in session.journal.events if event["event"] == "trial_finished"]) == 2
        assert not any(event["event"] == "worker_died" for event in session.journal.events)
        searcher.on_trial_complete("a", last_report({"specs": [specs["a"]]}, pretend))
        assert searcher.suggest("d") is Searcher.FINISHED


@pytest.mark.slow
def test_early_stopping_on_ray_ends_trials_and_keeps_the_workers(tmp_path: Path, corpus: Path) -> None:
    """Learning rates from useless to good in a real campaign; a stopped trial makes room for the next."""
    search = "{method: random, confirm: false, trials: 8, seed: 3, space: {optim.lr: {log: [1e-5, 1e-1]}}}"
    phases = f"\n  - name: find\n    search: {search}\nearly_stop: {{reduction: 2, first: 3}}\n"
    run = start(write_file(tmp_path, corpus, phases=phases, seeds="[1]", steps=24, every=3), tmp_path / "out")
    try:
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.end()
    ended = {record["trial_id"]: record for record in records(run.root)}
    stopped = [record for record in ended.values() if record["status"] == "stopped"]
    assert 0 < len(stopped) < len(ended) == 9 and run.events("worker_died") == []
    assert all(record["metrics"]["steps"] in (3, 6, 12) for record in stopped)
    assert len({record["provenance"]["pid"] for record in ended.values()}) <= 2
    again = start(run.root.parents[1] / "tiny.yaml", tmp_path / "out")
    try:
        assert again.wait() == 0
    finally:
        again.end()
    assert {record["trial_id"]: record for record in records(run.root)} == ended, "the decisions are not made again"


def test_a_failed_trial_is_a_result_and_not_a_dead_worker(small: Path, tmp_path: Path) -> None:
    cluster = fixed_cluster(1, per_trial={"CPU": 1.0, "GPU": 0.0})
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        first = searcher.suggest("a")
        assert isinstance(first, dict)
        searcher.on_trial_complete("a", last_report(first, lambda spec: TrialResult("failed", error="no memory")))
        assert session.state.results[first["specs"][0].trial_id]["error"] == "no memory"


def test_a_cluster_that_grows_gets_more_trials(small: Path, tmp_path: Path) -> None:
    cluster, clock = fixed_cluster(1), Clock()
    node = Node("a1", "b", "10.0.0.2", {"CPU": 3.0})

    def look(**_: bool) -> NodeChange:
        cluster.workers = cluster.most_queued = 3
        cluster.placement = Placement(3, 1.0, 0.0, 3)
        return NodeChange(joined=[node])

    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster, clock=clock)
        assert [searcher.suggest(name) is not None for name in "ab"] == [True, False]
        cluster.look, clock.now = look, 30.0
        assert [searcher.suggest(name) is not None for name in "bcd"] == [True, True, False]
        assert session.executor.workers == 3
        (changed,) = [event for event in session.journal.events if event["event"] == "workers_changed"]
        assert changed["reason"] == "b (10.0.0.2) joined the cluster; workers 3"


def test_trials_that_saved_to_leave_their_node_are_tried_again_elsewhere(small: Path, tmp_path: Path) -> None:
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), fixed_cluster(1))
        spec = searcher.suggest("a")["specs"][0]
        spec.folder.mkdir(parents=True)
        searcher.leave_node("a")
        assert stop_requested(spec.folder)
        searcher.on_trial_complete("a", {UPDATES: Updates(), PAUSED: True})
        again = searcher.suggest("b")["specs"][0]
        assert (again.trial_id, again.attempt, stop_requested(spec.folder)) == (spec.trial_id, 2, False)
        assert [e["cause"] for e in session.journal.events if e["event"] == "worker_died"] == ["node_lost"]


@pytest.mark.parametrize(
    ("nodes", "cause"), [(["a1"], "killed"), (["b2"], "node_lost"), (["a1", "b2"], "node_lost"), ([], "killed")]
)
def test_a_worker_that_died_with_its_node_is_told_from_one_that_crashed(
    small: Path, tmp_path: Path, nodes: list[str], cause: str
) -> None:
    cluster = fixed_cluster(1)
    cluster.has_node = {"a1"}.__contains__
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        searcher.suggest("a")
        searcher.worker_died("a", "ActorDiedError", nodes)
        searcher.on_trial_complete("a", None, error=True)
        assert [e["cause"] for e in session.journal.events if e["event"] == "worker_died"] == [cause]


@pytest.mark.parametrize(("of_rank", "on"), [("", ["2"]), ("rank 1: ", ["1", "2"])])
def test_a_node_that_cannot_train_is_set_aside_with_its_reason(
    small: Path, tmp_path: Path, of_rank: str, on: list[str]
) -> None:
    nodes = [Node(n, f"host{n}", f"10.0.0.{n}", {"CPU": 1.0, "GPU": 1.0}) for n in "12"]
    cluster = RayCluster(Resources(), address="10.0.0.1:6379")
    cluster.nodes = NodeWatch(lambda: nodes)
    cluster._count_workers(cluster.nodes.offers)
    reason = f"{of_rank}Ray offers a GPU, but there is none"
    error = f"ActorDiedError: ...\ntune.executors.ray_trainable.NodeUnfit: {reason}\n"
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session, workers=2), cluster)
        spec = searcher.suggest("a")["specs"][0]
        searcher.worker_died("a", error, on)
        searcher.on_trial_complete("a", None, error=True)
        again = searcher.suggest("b")
        assert (again["specs"][0].trial_id, again["avoid"], cluster.workers) == (spec.trial_id, ["2"], 1)
        assert [e["cause"] for e in session.journal.events if e["event"] == "worker_died"] == ["node_unfit"]
        (changed,) = [e["reason"] for e in session.journal.events if e["event"] == "workers_changed"]
        assert changed == "host2 (10.0.0.2) is not used: Ray offers a GPU, but there is none; workers 1"
        with pytest.raises(NoUsableNode, match="no node is left that trials can use: Ray offers a GPU"):
            searcher.worker_died("b", error, ["1", "1"])


@pytest.mark.parametrize(
    ("asked", "here", "workers"),
    [
        ({}, {"CPU": 4.0}, 4),
        ({"cpus_per_trial": 3}, {"CPU": 8.0}, 2),
        ({"workers": 2}, {"CPU": 8.0}, 2),
        ({}, GPUS, 2),
        ({"gpus_per_trial": 0.25}, GPUS, 8),
        ({"gpus_per_trial": 0.25, "cpus_per_trial": 2}, GPUS, 4),
        ({"gpus_per_trial": 2}, GPUS, 1),
    ],
)
def test_there_are_as_many_workers_as_fit(asked: dict[str, Any], here: dict[str, float], workers: int) -> None:
    cluster = RayCluster(Resources.model_validate(asked))
    cluster._count_workers([here])
    assert cluster.workers == workers


@pytest.mark.parametrize("asked", [{"gpus_per_trial": 1}, {"cpus_per_trial": 5}])
def test_a_trial_that_fits_nowhere_is_an_error(asked: dict[str, Any]) -> None:
    cluster = RayCluster(Resources.model_validate(asked))
    with pytest.raises(ConfigError, match=r"a trial needs . CPUs? and . GPUs?, but this cluster has 4 CPUs and 0 GPUs"):
        cluster._count_workers([{"CPU": 4.0}])


@pytest.mark.parametrize(("here", "share"), [({"CPU": 4.0}, 0.0), (GPUS, 1.0)])
def test_the_gpu_share_of_a_trial_is_always_explicit(here: dict[str, float], share: float) -> None:
    cluster = RayCluster(Resources())
    cluster._count_workers([here])
    assert cluster.per_trial == {"CPU": 1.0, "GPU": share}


def test_tune_pickles_nothing_that_it_could_restore(small: Path, tmp_path: Path) -> None:
    cluster = fixed_cluster(1)
    with session_on(small, tmp_path / "tiny") as session:
        searcher = SessionSearcher(session, cluster)
        assert searcher.__getstate__() == {}


# ---- trials that are trained together ------------------------------------------------------------------------------


def test_a_dead_worker_counts_for_each_trial_of_its_group(tmp_path: Path, corpus: Path) -> None:
    cluster = fixed_cluster(2)
    with session_on(write_file(tmp_path, corpus, vectorise=3), tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        group = searcher.suggest("a")["specs"]
        assert searcher.should_stop("a", {UPDATES: Updates(ended={group[1].trial_id: pretend(group[1])})}) is False
        searcher.on_trial_complete("a", None, error=True)
        died = [event["trial_id"] for event in session.journal.events if event["event"] == "worker_died"]
        assert sorted(died) == sorted([group[0].trial_id, group[2].trial_id])
        assert group[1].trial_id in session.state.results
        assert [searcher.suggest(name)["specs"][0].trial_id for name in "bc"] == [group[0].trial_id, group[2].trial_id]


def test_an_early_stopped_trial_of_a_group_is_recorded_and_its_worker_asked_to_drop_it(
    tmp_path: Path, corpus: Path
) -> None:
    search = "{method: random, confirm: false, trials: 2, seed: 0, space: {alpha: {uniform: [0.1, 0.5]}}}"
    phases = f"\n  - name: find\n    search: {search}\nearly_stop: {{reduction: 2, first: 3}}\n"
    cluster = fixed_cluster(1)
    file = write_file(tmp_path, corpus, phases=phases, seeds="[1]", vectorise=3)
    with session_on(file, tmp_path / "tiny") as session:
        searcher = SessionSearcher(begun(session), cluster)
        group = searcher.suggest("a")["specs"]
        for spec in group:
            spec.folder.mkdir(parents=True)
        reached = {
            spec.trial_id: replace(pretend(spec), metrics={"steps": 3, "tokens": 192, "val_loss": 5.0 + i})
            for i, spec in enumerate(group)
        }
        assert searcher.should_stop("a", {UPDATES: Updates(interim=reached)}) is False
        assert [stop_requested(spec.folder) for spec in group] == [False, True, True]
        assert [session.state.results[spec.trial_id]["status"] for spec in group[1:]] == ["stopped"] * 2
        searcher.on_trial_complete("a", last_report({"specs": group}, pretend))
        assert session.state.results[group[0].trial_id]["status"] == "finished"
        assert len([event for event in session.journal.events if event["event"] == "trial_finished"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_groups_on_ray_give_the_results_of_single_trials(tmp_path: Path, corpus: Path) -> None:
    """A worker is killed with its group, the run is interrupted, and the same command resumes it."""
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.1, 0.4]}\n"
    file = write_file(tmp_path, corpus, phases=phases, steps=400, every=40)
    train_all(file, tmp_path / "single")
    file.write_text(file.read_text().replace("workers: 2}", "workers: 1, vectorise: 3}"))
    run = start(file, tmp_path / "out")
    try:
        run.until(lambda: sum(beat["step"] > 40 for beat in run.beats().values()) == 3)
        assert len({beat["pid"] for beat in run.beats().values()}) == 1
        killed = next(iter(run.beats().values()))["pid"]
        os.kill(killed, signal.SIGKILL)
        run.until(lambda: len(run.events("worker_died")) == 3)
        run.until(
            lambda: len([beat for beat in run.beats().values() if beat["pid"] != killed and beat["step"] > 41]) == 3
        )
        at = {trial_id: beat["step"] for trial_id, beat in run.beats().items()}
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130, run.err.read_text()
        saved = {(path.parents[1].name, int(path.name[5:])) for path in run.root.glob("trials/*/checkpoints/step_*")}
        assert all(any(name == trial_id and step >= at[name] for name, step in saved) for trial_id in at)
        run = start(file, tmp_path / "out")
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.end()
    assert "Traceback" not in run.err.read_text()
    single, together = losses(tmp_path / "single"), losses(run.root)
    assert single.keys() == together.keys()
    for trial_id, values in single.items():
        assert together[trial_id] == pytest.approx(values, abs=1e-4)
    assert {record["provenance"].get("vectorised", 1) for record in records(run.root)} > {1}


# ---- on GPUs that do not exist -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_campaign_on_two_gpus_ends_as_on_the_cpu_whatever_its_trials_do(
    tmp_path: Path, corpus: Path, fake_gpus: Callable[..., FakeGpus]
) -> None:
    """Arms that fail (and break the GPU for their process), diverge, and run out of memory, packed and in groups."""
    vary = "{n_embd: [24], optim.lr: [1e38], batch_size: [256], alpha: [0.1, 0.2]}"
    phases = f"\n  - name: faults\n    set: {{residual: add}}\n    vary: {vary}\n"
    file = write_file(tmp_path, corpus, phases=phases, steps=12, every=4)
    text = file.read_text().replace("device: cpu", "device: auto")
    file.write_text(text.replace("campaign: tiny\n", "campaign: tiny\nhold: steps\n"))
    fake_gpus(count=0, fault_width=24)
    train_all(file, tmp_path / "cpu")
    fake_gpus(count=2, memory_bytes=8 * GIB, scale=1000, fault_width=24)
    file.write_text(file.read_text().replace("workers: 2}", "workers: 4, gpus_per_trial: 0.5, vectorise: 2}"))
    run = start(file, tmp_path / "out")
    try:
        assert run.wait() == 4, run.err.read_text()
    finally:
        run.end()
    on_cpu, on_gpu = ({(r["arm"], r["seed"]): r for r in records(root)} for root in (tmp_path / "cpu", run.root))
    assert {key: record["status"] for key, record in on_gpu.items()} == {k: r["status"] for k, r in on_cpu.items()}
    assert {record["status"] for record in on_cpu.values()} == {"finished", "diverged", "failed"}
    for key, record in on_gpu.items():
        assert record["metrics"].get("val_loss") == pytest.approx(on_cpu[key]["metrics"].get("val_loss"), abs=1e-4)
        if record["status"] != "failed":
            assert record["provenance"]["device"] == "Fake GPU"
        if key[0] == "batch_size=256":
            assert record["metrics"]["micro_batch_size"] < on_cpu[key]["metrics"]["micro_batch_size"] == 256
    assert {record["provenance"]["gpu"] for record in on_gpu.values()} <= {"0", "1"}
    assert {event["cause"] for event in run.events("worker_died")} <= {"gpu_error"}
