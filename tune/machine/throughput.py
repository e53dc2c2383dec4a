"""Measures how fast training steps run on this machine, and keeps the results in the cache for later plans.

One file in the cache holds both kinds of measurement: the tokens per second of a shape, and the curve of tokens per
second over the number of trials that share a device (tune/machine/gpu_sharing.py). Both are stored under the device and
the `step_time_key` of the config. A line that cannot be read, or was written by another version, is skipped.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from ngpt.system.cache import cache_folder
from ngpt.system.json_lines import append_json_lines, read_json_lines
from ngpt.training.config import TrainConfig, resolved
from tune.machine.concurrency_benchmark import ThroughputPoint
from tune.planning.equal_time import Speeds, step_time_key
from tune.planning.plan import trial_work
from tune.spec.schema import Campaign
from tune.storage.state import CampaignState
from tune.trials.trial import describe_machine

ROUNDS = 3  # of timing for `hold: seconds`


class SpeedRecord(pydantic.BaseModel):
    """Training tokens per second of trials of one shape; of all of them where several train together in a process."""

    device: str
    shape: str  # `step_time_key`
    together: pydantic.PositiveInt
    tokens_per_second: pydantic.PositiveFloat


class CurveRecord(pydantic.BaseModel):
    """Throughput of one shape by the number of trials that share a device."""

    device: str
    shape: str  # `step_time_key`
    max_trials: int  # the measurement stops there, or earlier when more trials are not faster or do not fit
    measured_at: str  # UTC
    curve: Annotated[list[ThroughputPoint], pydantic.Field(min_length=1)]


Record = TypeVar("Record", SpeedRecord, CurveRecord)


def device_key(config: TrainConfig, threads: int) -> str:
    """The host, device, torch version and threads that a measurement holds for."""
    about = describe_machine(config.device, threads)
    return f"{about['host']} {about['device']} torch {about['torch']} {threads} threads"


def measure_tokens_per_second(config: TrainConfig, *, threads: int, together: int = 1) -> float:
    """Times real training steps; returns the median rate of all trials that train `together` in this process."""
    import torch

    from ngpt.ensemble.throughput import measure_step_together
    from ngpt.training.throughput import measure_step

    torch.set_num_threads(threads)
    if together > 1:
        return measure_step_together(config, together, warmup=3, steps=10)
    return float(measure_step(config, warmup=3, steps=10)["tokens_per_second"])


def measure_for_equal_time(
    base: TrainConfig, missing: Mapping[str, TrainConfig], known: Speeds, measure: Callable[[TrainConfig], float]
) -> dict[str, float]:
    """Returns the speeds of the configs in `missing` by key: the fastest of several rounds, one config after another.

    `base` is timed along with them. Where its speed is `known` from an earlier phase, perhaps of a busier machine, the
    new speeds are scaled by the ratio, so that all speeds in the journal are comparable.
    """
    base = resolved(base)
    base_key = step_time_key(base)
    configs = {base_key: base, **missing}
    rounds = [{key: measure(config) for key, config in configs.items()} for _ in range(ROUNDS)]
    best = {key: max(speeds[key] for speeds in rounds) for key in configs}
    scale = known.get(base_key, best[base_key]) / best[base_key]
    return {key: speed * scale for key, speed in best.items() if key not in known}


# ---- what is stored in the cache -------------------------------------------------------------------------------------


def measure_speeds(trials: Iterable[tuple[TrainConfig, int]], threads: int) -> None:
    """Times and stores each shape once. A trial comes with the number of trials that train together in its process."""
    shapes = {(step_time_key(config), together): config for config, together in trials}
    records = []
    for (shape, together), config in shapes.items():
        speed = measure_tokens_per_second(config, threads=threads, together=together)
        device = device_key(config, threads)
        records.append(SpeedRecord(device=device, shape=shape, together=together, tokens_per_second=speed))
    _append(records)


def remember_speeds(campaign: Campaign, state: CampaignState, configs: Mapping[str, TrainConfig]) -> None:
    """Stores the speed of each shape that this session trained; `configs` are the campaign's trials by id.

    The speed is that of the whole trial, evaluations and checkpoints included.
    """
    device = device_key(campaign.base, campaign.resources.cpus_per_trial)
    speeds = {}
    for trial_id, config in configs.items():
        result = state.results.get(trial_id)
        if result and _is_representative(result, since=state.campaign["time"]):
            speeds[step_time_key(config)] = trial_work(config) / result["seconds"]
    _append(
        SpeedRecord(device=device, shape=shape, together=1, tokens_per_second=speed) for shape, speed in speeds.items()
    )


def _is_representative(result: Mapping[str, Any], *, since: str) -> bool:
    """Whether a trial ran whole in this session, in one attempt, as the only one in its process."""
    is_whole = result["status"] == "finished" and result["attempt"] == 1 and result["seconds"] > 0
    return is_whole and result["time"] >= since and result["provenance"].get("vectorised", 1) == 1


def known_speeds(device: str) -> dict[tuple[str, int], float]:
    """The newest tokens per second on a device, by `step_time_key` and number of trials that train together."""
    return {
        (record.shape, record.together): record.tokens_per_second
        for record in _read(SpeedRecord)
        if record.device == device
    }


def known_curve(device: str, shape: str, *, max_trials: int) -> CurveRecord | None:
    """The newest curve of this device and shape that was measured up to `max_trials` trials or more."""
    matching = (r for r in _read(CurveRecord) if (r.device, r.shape) == (device, shape) and r.max_trials >= max_trials)
    return next(reversed(list(matching)), None)


def remember_curve(
    device: str, shape: str, curve: Sequence[ThroughputPoint], *, max_trials: int, measured_at: str
) -> None:
    """Stores a curve for later campaigns on this machine."""
    points = list(curve)
    _append([CurveRecord(device=device, shape=shape, max_trials=max_trials, measured_at=measured_at, curve=points)])


def _read(kind: type[Record]) -> Iterator[Record]:
    """The stored records of one kind, oldest first."""
    for row in read_json_lines(_store(), fields=kind.model_fields):
        with contextlib.suppress(pydantic.ValidationError):
            yield kind.model_validate(row)


def _append(records: Iterable[SpeedRecord | CurveRecord]) -> None:
    """Stores records. A cache that cannot be written only costs a later plan its measured speeds."""
    if rows := [record.model_dump() for record in records]:
        with contextlib.suppress(OSError):
            append_json_lines(_store(), rows)


def _store() -> Path:
    return cache_folder() / "speeds.jsonl"
