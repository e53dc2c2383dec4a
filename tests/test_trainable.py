"""A worker as Ray sees it, driven by hand: trial after trial in one process."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.tune
import torch

from ngpt.config import override
from ngpt.pulse import Heartbeat, ask_to_stop, clear, read_heartbeat
from ngpt.train import TrainConfig
from tune.trainable import PAUSED, RESULT, SO_FAR, TrialWorker
from tune.trial import TrialSpec


@pytest.fixture
def spec(tiny: TrainConfig, tmp_path: Path) -> TrialSpec:
    return TrialSpec(
        trial_id="t", phase="alpha", arm="alpha=0.2", seed=1, config=tiny, folder=tmp_path / "t", threads=1, attempt=1
    )


@pytest.fixture
def worker(spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialWorker]:
    # This is pytest's own process.
    monkeypatch.setattr("ray._private.worker._changeproctitle", lambda *_: contextlib.nullcontext())
    worker = TrialWorker({"spec": spec, "resources": {"CPU": 1.0, "GPU": 0.0}})
    yield worker
    worker.stop()


def steps(worker: TrialWorker) -> list[dict[str, Any]]:
    reports = [worker.step()]
    while not reports[-1].get("done"):
        reports.append(worker.step())
    return reports


def test_a_step_goes_to_the_next_evaluation_and_the_last_one_reports_the_result(worker: TrialWorker) -> None:
    *evaluations, last = steps(worker)
    assert [report[SO_FAR].metrics["steps"] for report in evaluations] == [0, 3, 6, 8]
    assert all(RESULT not in report and not report.get("done") for report in evaluations)
    assert last["done"] and (last[RESULT].status, last[RESULT].metrics["steps"]) == ("finished", 8)


def test_it_is_used_for_one_trial_after_another(worker: TrialWorker, spec: TrialSpec, tmp_path: Path) -> None:
    first = steps(worker)[-1][RESULT]
    assert worker.reset_config({"spec": replace(spec, folder=tmp_path / "again")})
    second = steps(worker)[-1][RESULT]
    assert second.metrics["val_loss"] == first.metrics["val_loss"]
    assert second.provenance["pid"] == first.provenance["pid"]
    other = replace(spec, folder=tmp_path / "third", config=override(spec.config, {"seed": 2}))
    assert worker.reset_config({"spec": other})
    assert steps(worker)[-1][RESULT].metrics["val_loss"] != first.metrics["val_loss"]


def test_a_trial_that_is_replaced_in_the_middle_is_closed(worker: TrialWorker, spec: TrialSpec, tmp_path: Path) -> None:
    worker.step()
    abandoned = worker._run
    assert worker.reset_config({"spec": replace(spec, folder=tmp_path / "other")})
    assert inspect.getgeneratorstate(abandoned) == inspect.GEN_CLOSED
    assert steps(worker)[-1][RESULT].status == "finished"


@pytest.mark.parametrize(("gpu", "usable"), [(False, True), (True, False)])
def test_after_a_failure_on_a_gpu_the_process_is_not_used_again(
    worker: TrialWorker, spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, usable: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu)
    broken = override(spec.config, {"data.corpus": str(tmp_path / "nowhere.txt")})
    assert worker.reset_config({"spec": replace(spec, config=broken)})
    assert steps(worker)[-1][RESULT].status == "failed"
    assert worker.reset_config({"spec": spec}) is usable


def test_it_says_which_process_has_a_trial_before_the_first_step(worker: TrialWorker, spec: TrialSpec) -> None:
    assert read_heartbeat(spec.folder) == Heartbeat(os.getpid(), 0, 0)


def test_when_asked_to_stop_it_saves_where_it_is_and_says_so(
    worker: TrialWorker, spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpt.pulse.LISTEN", 0.0)  # at every step
    undisturbed = replace(spec, folder=tmp_path / "undisturbed")
    worker.step()
    worker.step()
    ask_to_stop(spec.folder)
    assert worker.step() == {PAUSED: True, "done": True}
    (saved,) = (spec.folder / "checkpoints").iterdir()
    assert saved.name == "step_0000003"
    clear(spec.folder)
    assert worker.reset_config({"spec": spec})
    again = steps(worker)[-1][RESULT]
    assert worker.reset_config({"spec": undisturbed})
    assert steps(worker)[-1][RESULT].metrics["val_loss"] == again.metrics["val_loss"]


def test_it_asks_for_the_resources_of_its_trial() -> None:
    request = TrialWorker.default_resource_request({"resources": {"CPU": 2.0, "GPU": 0.5}})
    assert isinstance(request, ray.tune.PlacementGroupFactory)
    assert request.required_resources == {"CPU": 2.0, "GPU": 0.5}
