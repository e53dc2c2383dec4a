"""The fake GPUs behave as GPUs do, in this process and in those that it starts."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import Dataset
from ngpt.system import gpus
from ngpt.system.device import pick_device
from ngpt.system.memory import is_out_of_memory, peak_memory
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.throughput import benchmark_run
from tests.helpers.fake_gpus import GIB, FakeGpus
from tune.machine import doctor
from tune.machine.environment import busy_gpus

Install = Callable[..., FakeGpus]


def child(code: str) -> str:
    imports = "from ngpt.system import gpus\nfrom ngpt.system.device import pick_device\n"
    done = subprocess.run([sys.executable, "-c", imports + code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_fake_gpu_is_picked_and_its_tensors_are_on_the_cpu(fake_gpus: Install) -> None:
    fake_gpus(count=2)
    assert (gpus.is_available(), gpus.count(), gpus.name(1)) == (True, 2, "Fake GPU")
    gpu = pick_device("auto")
    assert gpu == pick_device("cuda") and gpus.is_gpu(gpu) and not gpus.is_gpu(pick_device("cpu"))
    assert torch.zeros(1, device=gpu).device.type == "cpu"


@pytest.mark.parametrize(
    ("chosen", "visible"),
    [("1", [1]), ("1,0", [1, 0]), ("GPU-fake-1", [1]), ("", []), ("-1", []), ("0,7,1", [0])],
)
def test_the_environment_chooses_the_visible_gpus(
    fake_gpus: Install, monkeypatch: pytest.MonkeyPatch, chosen: str, visible: list[int]
) -> None:
    fake = fake_gpus(count=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert fake.visible() == visible
    assert (gpus.count(), gpus.is_available()) == (len(visible), bool(visible))


@pytest.mark.slow
def test_child_processes_see_the_same_machine_and_its_memory(fake_gpus: Install) -> None:
    fake = fake_gpus(count=2, memory_bytes=8 * GIB)
    fake.hold(GIB)
    assert child("print(gpus.count(), gpus.memory(pick_device('cuda'))[0] >> 20)") == "2 6144"  # and a context each
    assert busy_gpus() == [
        "GPU 0: 1.5 of 8.0 GiB are held by other processes; trials may run out of memory "
        "(nvidia-smi lists the processes)"
    ]


def test_torch_without_cuda_sees_no_gpu_where_the_driver_lists_them(fake_gpus: Install) -> None:
    fake_gpus(count=2, torch_has_cuda=False)
    assert (gpus.is_built(), gpus.is_available(), gpus.count()) == (False, False, 0)
    assert pick_device("auto") == torch.device("cpu")
    query = ["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader,nounits"]
    assert subprocess.check_output(query, text=True).splitlines() == ["0, Fake GPU", "1, Fake GPU"]


def test_a_step_holds_memory_and_fails_beyond_the_limit_of_its_process(
    fake_gpus: Install, tiny: TrainConfig, dataset: Dataset
) -> None:
    fake_gpus(count=1, memory_bytes=GIB)
    run = benchmark_run(resolved(override(tiny, {"device": "auto", "on_oom": "fail"})))
    assert gpus.memory(run.device)[0] < GIB and gpus.is_in_use()
    train_step(run)
    assert 0 < peak_memory(run.device) < 64 << 20
    gpus.limit_memory(peak_memory(run.device) / 2 / GIB)
    gpus.release_unused()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        train_step(run)
    assert is_out_of_memory(raised.value)


def test_a_broken_context_stays_broken(fake_gpus: Install) -> None:
    fake = fake_gpus()
    for attempt in (fake.break_context, lambda: gpus.synchronize(pick_device("cuda"))):
        with pytest.raises(RuntimeError, match="device-side assert"):
            attempt()


UUIDS = [("0", "GPU-aa11-22"), ("1", "GPU-aa33-44"), ("2", "GPU-bb55-66")]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("-1", []),
        ("2,0", ["2", "0"]),
        (" 1 , 0", ["1", "0"]),
        ("GPU-bb55-66,GPU-aa11-22", ["2", "0"]),
        ("GPU-bb", ["2"]),  # a UUID may be shortened
        ("GPU-aa", []),  # but not so far
        ("0,7,1", ["0"]),  # what follows an unknown entry is not read
        ("MIG-1c3b0e4f-6a1f-5a8e-b3a5-0b5f2f1c8c11", []),
        ("MIG-GPU-aa11-22/1/0", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_gpus_are_read_as_cuda_reads_them(visible: str | None, chosen: list[str]) -> None:
    assert gpus.select(UUIDS, visible) == chosen


@pytest.mark.parametrize(
    ("machine", "visible", "reason", "problem"),
    [
        ({"torch_has_cuda": False}, None, "this torch is built without CUDA", "; reinstall torch with CUDA"),
        ({"count": 0}, None, "the GPU driver does not work with this torch", ""),
        ({}, "", "CUDA_VISIBLE_DEVICES is '', which hides every GPU", None),
        ({}, "-1", "CUDA_VISIBLE_DEVICES is '-1', which hides every GPU", None),
        ({}, "GPU-x", "CUDA_VISIBLE_DEVICES is 'GPU-x', which names no GPU that torch can use", ""),
        (None, None, "no GPU driver is installed", None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_its_reason(
    fake_gpus: Install,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    machine: dict[str, Any] | None,
    visible: str | None,
    reason: str,
    problem: str | None,
) -> None:
    fake_gpus(**({"count": 0} if machine is None else machine))
    monkeypatch.setattr(gpus, "DRIVERS", ())
    if machine is None:
        monkeypatch.setenv("PATH", "/nowhere")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.why_unavailable() == reason
    with pytest.raises(ConfigError, match=rf"'cuda' is not available; this machine has cpu: {re.escape(reason)}$"):
        pick_device("cuda")
    check, *_ = doctor._device(tmp_path)
    assert check.value.endswith(f"; no GPU: {reason}")
    assert check.problem == (None if problem is None else f"a GPU driver is installed, but {reason}{problem}")
