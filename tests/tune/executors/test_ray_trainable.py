"""A worker of Ray Tune without Ray: trial after trial in one process."""

import contextlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import ray.tune
from filelock import FileLock, Timeout

from ngpt.config.base import override
from ngpt.system.cache import cache_folder
from ngpt.system.heartbeat import Heartbeat, clear_heartbeat, host_name, read_heartbeat, request_stop, stop_requested
from ngpt.training.config import TrainConfig
from ngpt.training.tracker import read_metrics
from tests.helpers.fake_gpus import FakeGpus
from tune.executors.ray_executor import current_umask
from tune.executors.ray_trainable import GPU, PAUSED, UNUSABLE, UPDATES, NodeUnfit, TrialWorker, worker_title
from tune.machine.gpu_slots import GpuSlots
from tune.remote.parts import write_parts
from tune.remote.store import ObjectStore
from tune.remote.unit import newest_step, read_digests, worker_unit
from tune.remote.worker import WorkerUploads
from tune.trials.folder_lock import LOCK
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


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def steps(worker: TrialWorker) -> list[dict[str, Any]]:
    reports = [worker.step()]
    while not reports[-1].get("done"):
        reports.append(worker.step())
    return reports


def result(report: dict[str, Any]) -> TrialResult:
    """The result of a trial that runs alone."""
    (ended,) = report[UPDATES].ended.values()
    return ended


def test_a_trial_waits_for_a_process_that_still_trains_it_and_holds_its_folder_while_it_runs(
    worker: TrialWorker, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.trials.folder_lock.LOCK_TIMEOUT", 0.1)
    lost = subprocess.Popen([sys.executable, "-c", HOLDER, spec.folder / LOCK], stdout=subprocess.PIPE)
    assert lost.stdout and lost.stdout.readline()
    with pytest.raises(Timeout):
        worker.step()
    lost.kill()
    lost.wait()
    lost.stdout.close()
    worker.reset_config({"specs": [spec]})
    worker.step()
    with pytest.raises(Timeout):
        FileLock(spec.folder / LOCK, timeout=0).acquire()
    steps(worker)
    with FileLock(spec.folder / LOCK, timeout=0):
        pass


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


def test_a_worker_with_a_gpu_that_torch_cannot_use_trains_nothing(spec: TrialSpec, fake_gpus: Any) -> None:
    fake_gpus(count=1, torch_has_cuda=False)
    with pytest.raises(NodeUnfit, match="Ray offers a GPU, but this torch is built without CUDA"):
        TrialWorker({"specs": [spec], "resources": {"CPU": 1.0, "GPU": 0.5}})
    assert not spec.folder.exists()


def test_a_worker_that_does_not_see_the_results_trains_nothing(spec: TrialSpec, tmp_path: Path) -> None:
    """Its files would stay on its node."""
    elsewhere = replace(spec, folder=tmp_path / "elsewhere" / "trials" / spec.trial_id)
    with pytest.raises(NodeUnfit, match=f"it does not see the results in {tmp_path / 'elsewhere'}"):
        TrialWorker({"specs": [elsewhere], "resources": {"CPU": 1.0, "GPU": 0.0}, "umask": current_umask()})
    assert not (tmp_path / "elsewhere").exists()


def test_nodes_that_are_set_aside_are_avoided() -> None:
    config = {"resources": {"CPU": 2.0, "GPU": 0.0}}
    anywhere = TrialWorker.default_resource_request(config | {"avoid": []})
    elsewhere = TrialWorker.default_resource_request(config | {"avoid": ["a", "b"]})
    assert anywhere.bundles == elsewhere.bundles == [{"CPU": 2.0}] and anywhere != elsewhere
    assert elsewhere._bound.arguments["bundle_label_selector"] == [{"ray.io/node-id": "!in(a,b)"}]


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
    assert read_heartbeat(spec.folder) == Heartbeat(os.getpid(), 0, 0, host_name())


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
    assert [read_heartbeat(spec.folder) for spec in group] == [Heartbeat(os.getpid(), 0, 0, host_name())] * 3
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


@pytest.mark.slow
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


def test_a_title_is_visible_bounded_and_keeps_the_seed(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart" / "trials" / "t"
    named: dict[str, Any] = {
        "trial_id": "t",
        "phase": "alpha",
        "config": TrainConfig(),
        "folder": folder,
        "threads": 1,
        "attempt": 1,
    }
    plain, hostile = TrialSpec(arm="alpha=0.2", seed=1, **named), TrialSpec(arm="\x1b[2J" + "x" * 500, seed=7, **named)
    assert worker_title([plain]) == "quickstart alpha/alpha=0.2 seed 1"
    assert worker_title([plain, hostile]) == "quickstart alpha/alpha=0.2 seed 1 and 1 more"
    title = worker_title([hostile])
    assert len(title) == len("quickstart ") + 100 and title.isprintable()
    assert title.startswith("quickstart alpha/\\x1b[2Jx") and title.endswith("x seed 7")


@pytest.fixture
def uploading(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[TrialWorker, ObjectStore]]:
    """A worker that shares no folder with the run, and its store; `full` is the folder whose disk is full."""
    monkeypatch.setattr("ray._private.worker._changeproctitle", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("tune.executors.ray_trainable.WorkerLink", lambda relay: Link())
    store = ObjectStore(pyarrow.fs.LocalFileSystem(), str(tmp_path / "bucket"), "s3://bucket/tiny")
    monkeypatch.setattr("tune.remote.worker.open_store", lambda uri: store)

    def start(specs: list[TrialSpec]) -> tuple[TrialWorker, ObjectStore]:
        uploads = WorkerUploads("s3://bucket/tiny", 3600.0, patience=0.0)
        config = {"specs": specs, "resources": {"CPU": 1.0, "GPU": 0.0}, "uploads": uploads, "relay": "relay"}
        return TrialWorker(config), store

    return start


class Link:
    """In the place of the thread that talks to the relay."""

    def follow(self, specs: list[TrialSpec]) -> None:
        self.specs = specs


def test_a_worker_in_scratch_sends_rows_as_they_come_and_reports_an_end_once_it_is_in_the_store(
    uploading: Callable[..., tuple[TrialWorker, ObjectStore]], spec: TrialSpec, worker: TrialWorker
) -> None:
    expected = result(steps(worker)[-1])
    scratch, store = uploading([spec := replace(spec, folder=spec.folder.with_name("elsewhere"))])
    *evaluations, last = steps(scratch)
    assert not spec.folder.exists()  # which is on the host of the run
    for report in (*evaluations, last):
        write_parts(spec.folder, report[UPDATES].files["t"])
    assert result(last).metrics["val_loss"] == expected.metrics["val_loss"]
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (spec.folder, spec.folder.with_name("t"))]
    assert len(rows[0]) > 1 and [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert newest_step(read_digests(store, worker_unit("t")) or {}) == 8
    assert list((cache_folder() / "scratch").glob("*/trials/*")) == []
    scratch.stop()


def test_a_stopped_trial_in_scratch_goes_on_from_the_store(
    uploading: Callable[..., tuple[TrialWorker, ObjectStore]], spec: TrialSpec, worker: TrialWorker
) -> None:
    expected = result(steps(worker)[-1])
    first, _ = uploading([spec])
    first.step()
    request_stop(first._link.specs[0].folder)
    assert steps(first)[-1][PAUSED]
    first.stop()
    second, _ = uploading([replace(spec, attempt=2)])
    last = steps(second)[-1]
    assert result(last).metrics["val_loss"] == expected.metrics["val_loss"]
    assert read_heartbeat(spec.folder) is None
    second.stop()


def failure(error: str) -> TrialResult:
    return TrialResult("failed", error=f"OSError: {error}", traceback=f"Traceback ...\nOSError: {error}\n")


@pytest.mark.parametrize(
    ("error", "in_scratch", "is_of_node"),
    [
        ("[Errno 28] No space left on device: 'ROOT/trials/t/checkpoints/step_0000008'", True, True),
        ("[Errno 28] No space left on device: 'ROOT/trials/t/checkpoints/step_0000008'", False, False),
        ("[Errno 28] No space left on device: '/tmp/torchinductor'", False, True),
        ("[Errno 122] Disk quota exceeded: '/tmp/torchinductor'", False, True),
        ("[Errno 28] No space left on device", False, False),  # it may be the shared one
        ("[Errno 28] No space left on device", True, True),
        ("[Errno 13] Permission denied: '/tmp/torchinductor'", True, False),
    ],
)
def test_a_full_disk_is_charged_to_the_node_unless_all_nodes_share_it(
    uploading: Callable[..., tuple[TrialWorker, ObjectStore]],
    spec: TrialSpec,
    error: str,
    in_scratch: bool,
    is_of_node: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch, _ = uploading([spec])
    if not in_scratch:
        monkeypatch.setattr(scratch, "_store", None)
    failed = failure(error.replace("ROOT", str(spec.folder.parents[1])))
    monkeypatch.setattr(scratch, "_advance", lambda: Updates(ended={"t": failed}))
    with pytest.raises(NodeUnfit, match="its disk is full") if is_of_node else contextlib.nullcontext():
        assert scratch.step()[UPDATES].ended == {"t": failed}
