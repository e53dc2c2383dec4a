"""MLflow has each trial as one run, whatever happened to the trial and to the server."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngpt.trackers import mlflow_run
from ngpt.trackers.config import TrackerConfig
from ngpt.trackers.mlflow_run import MlflowRun, absolute, resolve_address
from ngpt.trackers.sender import Sender
from ngpt.training.tracker import Tracker
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, write_file
from tune.launch import tell_trackers
from tune.trials.trial import TrialResult, TrialSpec

NAMES: dict[str, Any] = {
    "group": "tiny",
    "job_type": "alpha",
    "run_name": "alpha=0.2 seed 7",
    "varied": "model.alpha optim.name",
}
SETTINGS = {"seed": 7, "model.alpha": 0.2, "optim.name": "muon", "steps": 9}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="needs pip install 'ngpt-campaign[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(MlflowRun, "server_lost", False)
    return resolve_address(str(tmp_path / "store"), lambda line: None, experiment="tiny")


def track(
    folder: Path,
    store: str,
    *steps: int,
    keep_until: int | None = None,
    act: Callable[[Tracker], None] = lambda tracker: tracker.end("finished", {"val_loss": 9.5, "steps": 9}),
    **options: Any,
) -> None:
    cfg = TrackerConfig(mlflow=store, **NAMES)
    with Tracker(cfg, folder, settings=SETTINGS, keep_until=keep_until, **options) as tracker:
        for step in steps:
            tracker.log({"step": step, "train_loss": 5.0 + step, "tokens": step * 8, "lr": None})
            if step % 2:
                tracker.log({"step": step, "val_loss": step + 0.5, "tokens": step * 8})
        act(tracker)


def runs(store: str) -> list[Any]:
    client = mlflow_run._client(store)
    experiment = client.get_experiment_by_name("tiny")
    return client.search_runs([experiment.experiment_id])


def points(store: str, run: Any, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow_run._client(store).get_metric_history(run.info.run_id, name)]


@pytest.mark.slow
def test_a_finished_trial_is_a_run_as_users_of_mlflow_expect_it(store: str, tmp_path: Path) -> None:
    track(tmp_path / "trials" / "0123", store, 1, 2)
    (run,) = runs(store)
    assert (run.info.run_name, run.info.status) == ("alpha/alpha=0.2/seed 7", "FINISHED")
    assert run.data.params == {"model.alpha": "0.2", "optim.name": "muon"}
    tags = {name: text for name, text in run.data.tags.items() if not name.startswith(("mlflow.", "ngpt."))}
    place = {"phase": "alpha", "arm": "alpha=0.2", "seed": "7", "trial_id": "0123"}
    assert tags == place | {"status": "finished"}
    assert points(store, run, "train_loss") == [(1, 6.0), (2, 7.0)]
    assert points(store, run, "tokens") == [(1, 8.0), (2, 16.0)]  # two rows of one step are one point
    assert run.data.metrics["val_loss"] == 9.5  # the final value


@pytest.mark.slow
def test_a_trial_that_was_killed_continues_its_run_without_double_points(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "0123"
    track(folder, store, 1, 2, 3, act=lambda tracker: None)
    track(folder, store, 2, 3, 4, keep_until=1)
    (run,) = runs(store)
    assert [step for step, _ in points(store, run, "train_loss")] == [1, 2, 3, 4]
    assert [step for step, _ in points(store, run, "val_loss")] == [1, 3, 9]
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_a_run_that_is_trained_anew_is_another_run(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "0123"
    track(folder, store, 1)
    folder.rename(tmp_path / "discarded")
    track(folder, store, 1)
    assert len(runs(store)) == 2


@pytest.mark.slow
def test_steps_after_a_rollback_have_the_new_values_too(store: str, tmp_path: Path) -> None:
    folder = tmp_path / "0123"
    track(folder, store, 1, 2, act=lambda tracker: None)
    track(folder, store, 2, keep_until=1, rolled_back=True)
    (run,) = runs(store)
    assert [step for step, _ in points(store, run, "train_loss")] == [1, 2, 2]


@pytest.mark.parametrize(
    ("error", "status"), [(GeneratorExit, "KILLED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
@pytest.mark.slow
def test_the_status_says_how_a_trial_ended(error: type[BaseException], status: str, store: str, tmp_path: Path) -> None:
    def fail(tracker: Tracker) -> None:
        raise error

    with pytest.raises(error):
        track(tmp_path / "0123", store, 1, act=fail)
    assert [run.info.status for run in runs(store)] == [status]
    track(tmp_path / "other", store, 1, act=lambda tracker: tracker.end("diverged", {"val_loss": None, "steps": 1}))
    assert sorted(run.info.status for run in runs(store)) == sorted(["FAILED", status])


@pytest.mark.slow
def test_rows_that_a_server_missed_arrive_when_the_trial_is_resumed(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        away = f"http://127.0.0.1:{listening.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = tmp_path / "0123"
    track(folder, away, 1, 2, act=lambda tracker: None)
    track(tmp_path / "next", away, 1)
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("MLflow: no more rows from here on, since") for line in said] == [True]
    monkeypatch.setattr(MlflowRun, "server_lost", False)
    track(folder, store, 3, keep_until=2)
    (run,) = runs(store)
    assert [step for step, _ in points(store, run, "train_loss")] == [1, 2, 3]


def test_a_server_that_does_not_answer_is_said_once_and_not_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        away = f"http://user:hunter2hunter2@127.0.0.1:{listening.getsockname()[1]}"
    said: list[str] = []
    assert resolve_address(away, said.append, experiment="tiny") == "disabled"
    (line,) = said
    assert line.startswith("MLflow: disabled, since 127.0.0.1 cannot be reached") and "hunter2" not in line


def test_auto_takes_the_address_of_the_environment_and_never_copies_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_address("auto", said.append, experiment="tiny") == "disabled"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_run, "server_problem", lambda url, *, timeout: None)
    monkeypatch.setattr(mlflow_run, "_client", lambda uri: None)  # not this host
    monkeypatch.setattr(mlflow_run, "_experiment_id", lambda client, name: "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "store")
    assert resolve_address("auto", said.append, experiment="tiny") == (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:hunter2hunter2@mlflow.example")
    assert resolve_address("auto", said.append, experiment="tiny") == "auto"
    assert said == [
        "MLflow: disabled, since MLFLOW_TRACKING_URI is not set",
        f"MLflow: {(tmp_path / 'store').as_uri()}, experiment tiny",
        "MLflow: https://mlflow.example, experiment tiny",
    ]


def test_addresses_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("runs") == (tmp_path / "runs").as_uri()
    assert absolute("sqlite:///m.db") == f"sqlite:///{tmp_path}/m.db"
    for kept in ("http://host:5000", f"sqlite:///{tmp_path}/m.db", "databricks", "file:///x"):
        assert absolute(kept) == kept


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs pip install 'ngpt-campaign[mlflow]'")
    (tmp_path / "file").write_text("")
    said: list[str] = []
    assert resolve_address(str(tmp_path / "file" / "store"), said.append, experiment="tiny") == "disabled"
    assert len(said) == 1 and said[0].startswith("MLflow: disabled, since ")


def test_a_sender_never_waits_longer_than_it_is_told() -> None:
    release, failures = threading.Event(), list[Exception]()
    sender = Sender(failures.append)
    sender.send(release.wait)
    sender.close(timeout=0.05)
    assert not release.is_set() and failures == []
    release.set()


def test_after_a_failure_a_sender_drops_the_rest() -> None:
    made, failures = list[int](), list[Exception]()
    sender = Sender(failures.append)
    sender.send(lambda: made.append(1))
    sender.send(lambda: 1 / 0)
    sender.send(lambda: made.append(2))
    sender.close()
    assert (made, [type(error) for error in failures]) == ([1], [ZeroDivisionError])


@pytest.mark.slow
def test_only_trials_that_failed_without_a_word_are_marked_as_failed(
    store: str, tmp_path: Path, corpus: Path, no_report: None
) -> None:
    """A worker that dies tells nobody; a trial of another results directory may still be running."""

    def result(spec: TrialSpec) -> TrialResult:
        is_lost = spec.seed == 1
        end = (lambda tracker: None) if is_lost else (lambda tracker: tracker.end("finished", {}))
        track(spec.folder, store, 1, act=end)
        return pretend(spec, status="failed" if is_lost else "finished")

    track(tmp_path / "elsewhere", store, 1, act=lambda tracker: None)
    phases = "\n  - {name: alpha, vary: {alpha: [0.05, 0.4]}}\n"
    with session_on(write_file(tmp_path, corpus, phases=phases), tmp_path / "results") as session:
        begun(session, tracker=TrackerConfig(mlflow=store))
        names = {spec.trial_id: spec.seed for spec in drive(session, result)}
        tell_trackers(session)
    found = {run.data.tags["trial_id"]: run.info.status for run in runs(store)}
    expected = {trial: "FAILED" if seed == 1 else "FINISHED" for trial, seed in names.items()}
    assert found == expected | {"elsewhere": "RUNNING"} and len(names) == 4


def test_a_server_that_is_away_at_the_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tracker_id").write_text("0123\n")
    monkeypatch.setattr(mlflow_run, "_client", lambda uri: 1 / 0)
    said: list[str] = []
    assert mlflow_run.fail_lost_runs("http://away", "tiny", [tmp_path], said.append) == 0
    assert said == ["MLflow: trials that failed may look as if they were running, since division by zero"]


@pytest.mark.slow
def test_the_id_of_a_run_is_in_its_folder(store: str, tmp_path: Path) -> None:
    track(tmp_path / "0123", store, 1)
    (run,) = runs(store)
    assert (tmp_path / "0123" / "tracker_id").read_text().strip() == run.data.tags["ngpt.run_id"]
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    assert limits.items() <= os.environ.items()
