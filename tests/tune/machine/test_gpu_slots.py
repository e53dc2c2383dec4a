"""Workers take the first free place, so that every GPU has a worker before any has two."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ngpt.system import gpus
from tests.helpers.fake_gpus import FakeGpus
from tune.machine import gpu_slots
from tune.machine.gpu_slots import GpuSlots, claim_slot

Install = Callable[..., FakeGpus]


def claim(slots: GpuSlots, pipe: Connection) -> None:
    slot = claim_slot(slots)
    pipe.send((slot.gpu, os.environ["CUDA_VISIBLE_DEVICES"], gpus.count(), slot.workers))
    pipe.recv()


def test_workers_are_spread_and_the_place_of_a_dead_one_is_taken(fake_gpus: Install, tmp_path: Path) -> None:
    fake_gpus(count=4)
    slots = GpuSlots(tmp_path / "slots", ("2", "GPU-fake-3"), workers=3)
    context = multiprocessing.get_context("fork")  # torch is not used here
    found, processes = [], []
    for number in range(4):
        ours, theirs = context.Pipe()
        process = context.Process(target=claim, args=(slots, theirs), daemon=True)
        process.start()
        found.append(ours.recv())
        processes.append((process, ours))
        if number == 2:
            processes[1][0].kill()
            processes[1][0].join()
    assert found == [("2", "2", 1, 2), ("GPU-fake-3", "GPU-fake-3", 1, 1), ("2", "2", 1, 2), found[1]]
    for process, _ in processes:
        process.kill()


def test_a_worker_that_finds_no_place_gives_up(
    fake_gpus: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(count=1)
    monkeypatch.setattr(gpu_slots, "CLAIM_TIMEOUT", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    slots = GpuSlots(tmp_path / "slots", ("0",), workers=1)
    held = claim_slot(slots)
    with pytest.raises(TimeoutError, match="all 1 places on the GPUs are held"):
        claim_slot(slots)
    assert held.gpu == "0"
