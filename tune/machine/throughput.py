"""How fast each shape of model and batch trains on this machine: measured once, and kept for later plans."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ngpt.system.cache import cache_folder
from ngpt.training.config import TrainConfig
from tune.planning.plan import trial_work
from tune.planning.shape import shape_key
from tune.spec.schema import Campaign
from tune.storage.state import CampaignState


def device_key(campaign: Campaign) -> str:
    """The device and the threads that a measured speed holds for."""
    from tune.trials.trial import describe_machine

    threads = campaign.resources.cpus_per_trial
    about = describe_machine(campaign.base.device, threads)
    return f"{about['host']} {about['device']} {threads} threads"


def measure_speeds(trials: Iterable[tuple[TrainConfig, int]], campaign: Campaign) -> None:
    """Times a few real steps of each shape and keeps the speeds; the trials come with how many train at once.

    The steps run on as many threads as a worker gets.
    """
    import torch

    from ngpt.ensemble.throughput import measure_step_together
    from ngpt.training.throughput import measure_step

    torch.set_num_threads(campaign.resources.cpus_per_trial)
    speeds = {}
    for key, (config, together) in {shape_key(*trial): trial for trial in trials}.items():
        if together == 1:
            speeds[key] = measure_step(config, warmup=3, steps=10)["tokens_per_second"]
        else:
            speeds[key] = measure_step_together(config, together, warmup=3, steps=10)
    _remember(device_key(campaign), speeds)


def remember_speeds(campaign: Campaign, state: CampaignState, configs: Mapping[str, TrainConfig]) -> None:
    """Keeps the speed of the trials that this session trained, for later plans on this machine."""
    speeds = {}
    for trial_id, config in configs.items():
        result = state.results.get(trial_id)
        if result and _is_typical(result, since=state.campaign["time"]):
            # Over the whole trial, with evaluations and checkpoints, since that is what one costs.
            speeds[shape_key(config)] = trial_work(config) / result["seconds"]
    _remember(device_key(campaign), speeds)


def _is_typical(result: Mapping[str, Any], *, since: str) -> bool:
    """Whether a result says how long such a trial takes: whole, in one go, by itself, and of this session."""
    is_whole = result["status"] == "finished" and result["attempt"] == 1 and result["seconds"] > 0
    return is_whole and result["time"] >= since and result["provenance"].get("vectorised", 1) == 1


def known_speeds(device: str) -> dict[str, float]:
    """Training tokens per second by shape, the newest measured on this device; of all at once, where that is more."""
    path = _speeds_file()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = [row for line in lines if (row := _parse(line))]
    return {row["shape"]: row["tokens_per_second"] for row in rows if row["device"] == device}


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the speeds file; None for one that a crash tore, which costs a worse estimate and nothing else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= {"device", "shape", "tokens_per_second"} else None


def _remember(device: str, speeds: Mapping[str, float]) -> None:
    """Appends speeds to the file, after the end of whatever line a crash has torn."""
    if not speeds:
        return
    path = _speeds_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    rows = [{"device": device, "shape": shape, "tokens_per_second": speed} for shape, speed in speeds.items()]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + "".join(json.dumps(row) + "\n" for row in rows))


def _speeds_file() -> Path:
    return cache_folder() / "speeds.jsonl"
