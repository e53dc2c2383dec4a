"""How many trials run at once, and what each gets: the plan and the executor have one answer."""

from collections.abc import Callable
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.fake_gpus import FakeGpus
from tune.executors.ray_executor import RayCluster
from tune.machine.estimate import expected_placement
from tune.machine.placement import device_notes, place, this_machine
from tune.spec.schema import Campaign, Resources
from tune.storage.state import CampaignState

Install = Callable[..., FakeGpus]
Load = Callable[[str], Campaign]


def resources(**fields: Any) -> Resources:
    return Resources.model_validate(fields)


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.machine.placement.usable_cpus", lambda: 8)


@pytest.mark.parametrize(
    ("device", "asked", "n_gpus", "workers", "share"),
    [
        ("auto", "workers: 8", 1, 1, 1.0),
        ("auto", "workers: 8, gpus_per_trial: 0.25", 1, 4, 0.25),
        ("auto", "workers: 8, gpus_per_trial: 2", 2, 1, 2.0),
        ("cuda", "cpus_per_trial: 3", 4, 2, 1.0),
        ("auto", "workers: 3", 0, 3, 0.0),
        ("auto", "gpus_per_trial: 0", 0, 8, 0.0),
        ("cpu", "workers: 64", 1, 64, 0.0),
        ("cpu", "gpus_per_trial: 0", 2, 8, 0.0),
        ("cpu", "gpus_per_trial: 1", 2, 8, 0.0),
    ],
)
def test_the_plan_and_the_executor_agree(
    fake_gpus: Install, load: Load, device: str, asked: str, n_gpus: int, workers: int, share: float
) -> None:
    fake_gpus(count=n_gpus)
    campaign = load(f"campaign: c\nbase: {{device: {device}}}\nresources: {{{asked}}}\nvary: {{alpha: [0.1, 0.2]}}\n")
    cluster = RayCluster(campaign.resources, device=device)
    cluster._count_workers(this_machine(campaign.resources, device=device))
    assert expected_placement(campaign, CampaignState()) == cluster.placement
    assert (cluster.workers, cluster.per_trial["GPU"]) == (workers, share)


def test_a_campaign_on_the_cpu_reserves_no_gpu(fake_gpus: Install) -> None:
    fake_gpus(count=2)
    assert this_machine(Resources(), device="cpu")["GPU"] == 0
    assert this_machine(Resources(), device="auto")["GPU"] == 2


def test_torch_without_cuda_reserves_no_gpu(fake_gpus: Install) -> None:
    fake_gpus(count=2, torch_has_cuda=False)
    assert this_machine(Resources(), device="auto")["GPU"] == 0


def test_each_slice_of_a_gpu_counts(fake_gpus: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA shows a process only the first slice, but each worker can have one of its own."""
    fake_gpus(count=1)
    monkeypatch.setattr("ngpt.system.gpus.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert this_machine(Resources(), device="auto")["GPU"] == 2


@pytest.mark.parametrize(("workers", "most"), [(1, 1), (2, 1), (3, 2), (4, 2), (None, 4)])
def test_trials_are_spread_over_the_gpus_before_they_share_one(workers: int | None, most: int) -> None:
    placed = place(resources(gpus_per_trial=0.25, workers=workers), [{"CPU": 64, "GPU": 2}], device="auto")
    assert (placed.trials_per_device, placed.n_gpus) == (most, 2)


def test_a_trial_needs_room_on_a_single_node() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}]
    assert place(resources(cpus_per_trial=2), nodes, device="auto").workers == 2
    assert place(resources(cpus_per_trial=2), nodes, device="cpu").workers == 2
    with pytest.raises(ConfigError, match="a trial needs 4 CPUs and 1 GPUs, but this cluster has 3 CPUs and 2 GPUs"):
        place(resources(cpus_per_trial=4), nodes, device="auto")


def test_no_gpu_a_trial_on_a_machine_with_gpus_must_be_meant(fake_gpus: Install, load: Load) -> None:
    fake_gpus(count=2)
    campaign = load("campaign: c\nresources: {gpus_per_trial: 0}\nvary: {alpha: [0.1, 0.2]}\n")
    with pytest.raises(ConfigError, match=r"base\.device is auto and there are 2 GPUs; set base\.device to cpu"):
        expected_placement(campaign, CampaignState())


@pytest.mark.parametrize(
    ("device", "asked", "machine", "hidden", "note"),
    [
        ("auto", {}, {"count": 2}, None, None),
        ("auto", {}, {"count": 2, "torch_has_cuda": False}, None, "this torch is built without CUDA: trials train on"),
        ("auto", {}, {"count": 2}, "", None),
        ("cpu", {}, {"count": 2, "torch_has_cuda": False}, None, None),
        ("cpu", {"gpus_per_trial": 0}, {"count": 2}, None, None),
        ("cpu", {"gpus_per_trial": 1}, {"count": 2}, None, "base.device is cpu, so no GPU is reserved"),
    ],
)
def test_no_campaign_trains_on_the_cpu_in_silence(
    fake_gpus: Install,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    asked: dict[str, Any],
    machine: dict[str, Any],
    hidden: str | None,
    note: str | None,
) -> None:
    fake_gpus(**machine)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    lines = device_notes(resources(**asked), device=device)
    assert len(lines) == (note is not None) and (note or "") in "".join(lines)
