"""How many trials run at once, and what each gets: the plan and the executor have one answer."""

from collections.abc import Callable
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.fake_gpus import FakeGpus
from tune.executors.ray_cluster import RayCluster
from tune.machine.estimate import expected_placement
from tune.machine.placement import cluster_notes, device_notes, place, this_machine
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
    cluster._count_workers([this_machine(campaign.resources, device=device)])
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
    needs = r"a trial needs 4 CPUs and 1 GPU, but none of the 2 nodes of this cluster has as much: 3 CPUs and 1 GPU"
    with pytest.raises(ConfigError, match=needs):
        place(resources(cpus_per_trial=4), nodes, device="auto")


@pytest.mark.parametrize(
    ("asked", "nodes", "workers", "together"),
    [
        ({"cpus_per_trial": 2}, [(3, 0), (3, 0)], 2, 1),  # 6 CPUs in all, but no trial has one here and one there
        ({"cpus_per_trial": 2}, [(0, 0), (8, 0), (3, 0)], 5, 4),  # Ray lists no CPUs on a head that offers none
        ({"cpus_per_trial": 2, "workers": 3}, [(8, 0), (3, 0)], 3, 3),
        ({"gpus_per_trial": 0.4}, [(8, 1), (8, 1)], 4, 2),
        ({"gpus_per_trial": 0.5, "cpus_per_trial": 4}, [(4, 2), (64, 1)], 3, 2),
        ({"gpus_per_trial": 2}, [(64, 3), (64, 3), (64, 0)], 2, 1),
    ],
)
def test_each_node_of_a_cluster_is_filled_on_its_own(
    asked: dict[str, Any], nodes: list[tuple[float, float]], workers: int, together: int
) -> None:
    offers = [{name: float(n) for name, n in zip(("CPU", "GPU"), node, strict=True) if n} for node in nodes]
    placed = place(resources(**asked), offers, device="auto", spread=False)
    assert (placed.workers, placed.trials_per_device, placed.n_gpus) == (workers, together, 0)


def test_a_trial_keeps_its_gpu_when_the_cluster_changes() -> None:
    placed = place(resources(), [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}], device="auto")
    assert (placed.workers, placed.gpus) == (1, 1.0)
    assert placed.on([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}]).workers == 5
    assert placed.on([{"CPU": 8.0}]).workers == placed.on([]).workers == 0, "not on a CPU instead"


@pytest.mark.parametrize(
    ("device", "asked", "gpus", "note"),
    [
        ("auto", {}, 0, "base.device is auto, and no node of the cluster has a GPU: trials train on the CPU"),
        ("auto", {}, 2, "gpus_per_trial: auto is one trial for each GPU"),
        ("auto", {"gpus_per_trial": 0.5}, 2, None),
        ("auto", {"gpus_per_trial": 0}, 0, None),
        ("cpu", {}, 0, None),
        ("cpu", {}, 2, None),
    ],
)
def test_what_a_cluster_does_with_gpus_is_said(device: str, asked: dict[str, Any], gpus: int, note: str | None) -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {})]
    lines = cluster_notes(resources(**asked), nodes, device=device)
    assert len(lines) == (note is not None) and (note or "") in "".join(lines)


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


@pytest.mark.parametrize(
    ("asked", "nodes", "workers"),
    [
        ({"ranks_per_trial": 2}, [{"CPU": 3}, {"CPU": 3}], 2),  # the ranks of a trial stay on one node
        ({"ranks_per_trial": 2, "across_nodes": True}, [{"CPU": 3}, {"CPU": 3}], 3),
        ({"ranks_per_trial": 4, "across_nodes": True, "gpus_per_trial": 4}, [{"CPU": 8, "GPU": 3}] * 2, 1),
        ({"ranks_per_trial": 2, "cpus_per_trial": 6}, [{"CPU": 8, "GPU": 8}], 1),
        ({"ranks_per_trial": 2, "gpus_per_trial": 0}, [{"CPU": 8}], 4),
    ],
)
def test_each_rank_has_a_share_of_its_own(asked: dict[str, Any], nodes: list[dict[str, float]], workers: int) -> None:
    assert place(resources(**asked), nodes, device="auto").workers == workers


def test_trials_of_several_ranks_have_whole_gpus(fake_gpus: Install, load: Load) -> None:
    fake_gpus(count=4)
    campaign = load("campaign: c\nresources: {ranks_per_trial: 2, cpus_per_trial: 4}\nvary: {alpha: [0.1, 0.2]}\n")
    cluster = RayCluster(campaign.resources, device="auto")
    cluster._count_workers([this_machine(campaign.resources, device="auto")], 8)
    assert expected_placement(campaign, CampaignState()) == cluster.placement
    assert (cluster.workers, cluster.per_trial) == (2, {"CPU": 2, "GPU": 1})
    assert cluster.ranks == {"ranks": 2, "placement": "STRICT_PACK"}


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        ({"ranks_per_trial": 16}, "cpu", "16 ranks needs 16 CPUs and 0 GPUs, but this cluster has 8 CPUs"),
        (
            {"ranks_per_trial": 4},
            "auto",
            "a trial of 4 ranks needs 4 CPUs and 4 GPUs, but this cluster has 8 CPUs and 2",
        ),
    ],
)
def test_more_ranks_than_the_machine_can_give_are_refused(
    fake_gpus: Install, asked: dict[str, Any], device: str, message: str
) -> None:
    fake_gpus(count=2)
    with pytest.raises(ConfigError, match=message):
        place(resources(**asked), [this_machine(resources(**asked), device=device)], device=device)
