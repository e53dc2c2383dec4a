"""A worker of Ray Tune without Ray: trial after trial in one process."""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.tune
from filelock import FileLock

from ngpt.config.base import override
from ngpt.system.heartbeat import Heartbeat, clear_heartbeat, read_heartbeat, request_stop, stop_requested
from ngpt.training.config import TrainConfig
from tests.helpers.fake_gpus import FakeGpus
from tune.executors.gpu_slots import GpuSlots
from tune.executors.ray_trainable import GPU, PAUSED, UNUSABLE, UPDATES, TrialWorker
from tune.trials.trial import TrialResult, TrialSpec
from tune.trials.trial_group import Updates


@pytest.fixture
def spec(tiny: TrainConfig, tmp_path: Path) -> TrialSpec:
    return TrialSpec(
        trial_id="t", phase="alpha", arm="alpha=0.2", seed=1, config=tiny, folder=tmp_path / "t", threads=1, attempt=1
    )


@pytest.fixture
def worker(spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialWorker]:
    # This is pytest's own process.
    monkeypatch.setattr("ray._private.worker._changeproctitle", lambda *_: contextlib.nullcontext())
    worker = TrialWorker({"specs": [spec], "resources": {"CPU": 1.0, "GPU": 0.0}})
    yield worker
    worker.stop()


def steps(worker: TrialWorker) -> list[dict[str, Any]]:
    reports = [worker.step()]
    while not reports[-1].get("done"):
        reports.append(worker.step())
    return reports


def result(report: dict[str, Any]) -> TrialResult:
    """The result of a trial that runs alone."""
    (ended,) = report[UPDATES].ended.values()
    return ended


def test_a_step_runs_to_the_next_evaluation_and_the_last_one_reports_the_result(worker: TrialWorker) -> None:
    *evaluations, last = steps(worker)
    assert [report[UPDATES].interim["t"].metrics["steps"] for report in evaluations] == [0, 3, 6, 8]
    assert all(not report[UPDATES].ended and not report.get("done") for report in evaluations)
    assert last["done"] and (result(last).status, result(last).metrics["steps"]) == ("finished", 8)


def paused(report: dict[str, Any]) -> dict[str, float | None]:
    """The step of the newest evaluation of each trial, in a report of trials that have saved and stopped."""
    assert report.keys() == {UPDATES, PAUSED, "done"} and report[PAUSED] is report["done"] is True
    assert not report[UPDATES].ended
    return {trial_id: interim.metrics["steps"] for trial_id, interim in report[UPDATES].interim.items()}


def test_a_worker_runs_one_trial_after_another(worker: TrialWorker, spec: TrialSpec, tmp_path: Path) -> None:
    first = result(steps(worker)[-1])
    assert worker.reset_config({"specs": [replace(spec, folder=tmp_path / "again")]})
    second = result(steps(worker)[-1])
    assert second.metrics["val_loss"] == first.metrics["val_loss"]
    assert second.provenance["pid"] == first.provenance["pid"]
    other = replace(spec, folder=tmp_path / "third", config=override(spec.config, {"seed": 2}))
    assert worker.reset_config({"specs": [other]})
    assert result(steps(worker)[-1]).metrics["val_loss"] != first.metrics["val_loss"]


def test_a_trial_replaced_before_its_end_is_closed(worker: TrialWorker, spec: TrialSpec, tmp_path: Path) -> None:
    worker.step()
    abandoned = worker._run
    assert worker.reset_config({"specs": [replace(spec, folder=tmp_path / "other")]})
    assert inspect.getgeneratorstate(abandoned) == inspect.GEN_CLOSED
    assert result(steps(worker)[-1]).status == "finished"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_worker_says_that_it_can_run_no_further_trial_after_a_failure_on_a_gpu(
    worker: TrialWorker, spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    """Ray would abort the next trial, which has done nothing, if the worker refused it afterwards."""
    monkeypatch.setattr("ngpt.system.gpus.is_in_use", lambda: gpu)
    monkeypatch.setattr("ngpt.system.gpus.release_unused", lambda: None)
    broken = override(spec.config, {"data.corpus": str(tmp_path / "nowhere.txt")})
    assert UNUSABLE not in steps(worker)[-1]
    assert worker.reset_config({"specs": [replace(spec, config=broken)]})
    last = steps(worker)[-1]
    assert (result(last).status, last.get(UNUSABLE, False)) == ("failed", gpu)
    if gpu:
        with pytest.raises(AssertionError, match="a worker whose trial failed on a GPU is not reused"):
            worker.reset_config({"specs": [spec]})
    else:
        assert worker.reset_config({"specs": [replace(spec, folder=tmp_path / "next")]})


def test_a_worker_with_a_gpu_of_its_own_neither_limits_nor_marks_its_trials(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_gpus: Callable[..., FakeGpus]
) -> None:
    """Three workers of a third of a GPU on two GPUs: the second is alone on the second GPU."""
    monkeypatch.setattr("ray._private.worker._changeproctitle", lambda *_: contextlib.nullcontext())
    fake_gpus(count=2)
    limits: list[float] = []
    monkeypatch.setattr("ngpt.system.gpus.limit_memory", limits.append)
    slots = GpuSlots(tmp_path / "slots", ("0", "1"), workers=3)
    with FileLock(tmp_path / "slots" / "slot-0.lock"):  # the first worker
        shared = replace(spec, config=override(spec.config, {"device": "auto"}), packed=2)
        worker = TrialWorker({"specs": [shared], "resources": {"CPU": 1.0, "GPU": 0.3333}, "gpu_slots": slots})
    last = steps(worker)[-1]
    provenance = result(last).provenance
    assert (last[GPU], provenance["gpu"], provenance["packed"]) == ("1", "1", 1)
    assert set(limits) <= {1.0}


def test_the_heartbeat_names_the_process_before_the_first_step(worker: TrialWorker, spec: TrialSpec) -> None:
    assert read_heartbeat(spec.folder) == Heartbeat(os.getpid(), 0, 0)


def test_a_stop_request_saves_the_trial_and_reports_a_pause(
    worker: TrialWorker, spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpt.system.heartbeat.CHECK_EVERY", 0.0)  # at every step
    undisturbed = replace(spec, folder=tmp_path / "undisturbed")
    worker.step()
    worker.step()
    request_stop(spec.folder)
    assert paused(worker.step()) == {"t": 3}
    (saved,) = (spec.folder / "checkpoints").iterdir()
    assert saved.name == "step_0000003"
    clear_heartbeat(spec.folder)
    assert worker.reset_config({"specs": [spec]})
    again = result(steps(worker)[-1])
    assert worker.reset_config({"specs": [undisturbed]})
    assert result(steps(worker)[-1]).metrics["val_loss"] == again.metrics["val_loss"]


def test_an_evaluation_that_coincides_with_a_stop_request_is_reported(
    worker: TrialWorker, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.step()
    advance = worker._advance

    def advance_and_ask() -> Updates:
        updates = advance()
        request_stop(spec.folder)
        return updates

    monkeypatch.setattr(worker, "_advance", advance_and_ask)
    assert paused(worker.step()) == {"t": 3}
    monkeypatch.undo()
    monkeypatch.setattr("ray._private.worker._changeproctitle", lambda *_: contextlib.nullcontext())
    clear_heartbeat(spec.folder)
    assert worker.reset_config({"specs": [spec]})
    # The next attempt does not evaluate step 3 again: without this report, early stopping would miss it.
    assert [step for report in steps(worker) for step in evaluated(report)] == [6, 8]


def evaluated(report: dict[str, Any]) -> list[float | None]:
    return [interim.metrics["steps"] for interim in report[UPDATES].interim.values()]


def test_the_resources_of_the_trial_are_requested() -> None:
    request = TrialWorker.default_resource_request({"resources": {"CPU": 2.0, "GPU": 0.5}})
    assert isinstance(request, ray.tune.PlacementGroupFactory)
    assert request.required_resources == {"CPU": 2.0, "GPU": 0.5}


# ---- groups of trials ----------------------------------------------------------------------------------------------


@pytest.fixture
def group(spec: TrialSpec, tmp_path: Path) -> list[TrialSpec]:
    return [
        replace(
            spec,
            trial_id=f"t{seed + 1}",
            folder=tmp_path / f"t{seed + 1}",
            config=override(spec.config, {"seed": seed}),
        )
        for seed in (0, 1, 2)
    ]


def test_a_group_is_trained_to_its_end_and_its_worker_runs_the_next_trial(
    worker: TrialWorker, spec: TrialSpec, group: list[TrialSpec]
) -> None:
    alone = result(steps(worker)[-1])
    assert worker.reset_config({"specs": group})
    assert [read_heartbeat(spec.folder) for spec in group] == [Heartbeat(os.getpid(), 0, 0)] * 3
    reports = steps(worker)
    ended = {name: value for report in reports for name, value in report[UPDATES].ended.items()}
    assert {name: value.status for name, value in ended.items()} == dict.fromkeys(["t1", "t2", "t3"], "finished")
    assert ended["t1"].metrics["val_loss"] == pytest.approx(alone.metrics["val_loss"], abs=1e-4)
    assert worker.reset_config({"specs": [replace(spec, folder=spec.folder.with_name("last"))]})
    assert result(steps(worker)[-1]).metrics["val_loss"] == alone.metrics["val_loss"]


def test_a_stop_request_ends_one_trial_of_a_group_and_the_others_continue(
    worker: TrialWorker, group: list[TrialSpec]
) -> None:
    worker.reset_config({"specs": group})
    worker.step()
    request_stop(group[1].folder)
    reports = steps(worker)
    assert not any("t2" in report[UPDATES].interim or PAUSED in report for report in reports)
    assert {name for report in reports for name in report[UPDATES].ended} == {"t1", "t3"}
    assert not stop_requested(group[1].folder)


def test_a_group_whose_trials_all_have_stop_requests_saves_and_pauses(
    worker: TrialWorker, group: list[TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpt.system.heartbeat.CHECK_EVERY", 0.0)  # at every step
    worker.reset_config({"specs": group})
    worker.step()
    worker.step()
    for spec in group:
        request_stop(spec.folder)
    assert paused(worker.step()) == {"t1": 3, "t2": 3, "t3": 3}
    assert [[path.name for path in (spec.folder / "checkpoints").iterdir()] for spec in group] == [["step_0000003"]] * 3
    for spec in group:
        clear_heartbeat(spec.folder)
    worker.reset_config({"specs": group})
    assert [
        report[UPDATES].interim["t1"].metrics["steps"] for report in steps(worker) if "t1" in report[UPDATES].interim
    ] == [
        6,
        8,
    ]
