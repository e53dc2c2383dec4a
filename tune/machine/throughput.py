"""Measures how fast training steps run on this machine, and stores the results in the cache for later plans.

One file holds the tokens per second of each model shape, and curves of throughput over the number of trials that share
a device (tune/machine/gpu_sharing.py). Unreadable lines are skipped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import pydantic
import torch

from ngpt.code.digest import current_code
from ngpt.config.base import override
from ngpt.ensemble.throughput import measure_step_together
from ngpt.system.cache import cache_folder, optional_cache
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.throughput import measure_step
from tune.machine.concurrency_benchmark import ThroughputPoint
from tune.machine.json_lines import append_json_lines, read_json_lines
from tune.machine.rank_speed import measure_on_ranks
from tune.planning.equal_time import Speeds, step_time_key
from tune.planning.plan import trial_work
from tune.spec.schema import Campaign, Resources
from tune.storage.state import CampaignState
from tune.trials.trial import describe_machine

STORE = "speeds.jsonl"  # in the cache
ROUNDS = 3  # of timing, for `hold: seconds`


class CacheRecord(pydantic.BaseModel):
    """A line of the store. One with other fields or types is of another version, and means something else."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class SpeedRecord(CacheRecord):
    """Training tokens per second of one shape, summed over the `together` trials that share a process."""

    device: str
    shape: str  # `step_time_key`
    together: pydantic.PositiveInt
    tokens_per_second: pydantic.PositiveFloat


class CurveRecord(CacheRecord):
    """Throughput of one shape for different numbers of processes that share a device."""

    device: str
    shape: str  # `step_time_key`
    together: pydantic.PositiveInt  # trials that each process trains as a group
    code: str  # digest of the code that was measured
    max_trials: pydantic.PositiveInt  # the measurement stops here, or earlier if more trials are slower or do not fit
    measured_at: str  # UTC
    curve: Annotated[list[ThroughputPoint], pydantic.Field(min_length=1)]

    @pydantic.field_validator("curve")
    @classmethod
    def _measurable(cls, curve: list[ThroughputPoint]) -> list[ThroughputPoint]:
        for point in curve:
            if min(point.trials, point.threads, point.tokens_per_second, point.memory_bytes) <= 0 or point.room < 0:
                raise ValueError("a point of the curve that nobody can have measured")
        return curve


Record = TypeVar("Record", SpeedRecord, CurveRecord)
ANY_RECORD: pydantic.TypeAdapter[SpeedRecord | CurveRecord] = pydantic.TypeAdapter(SpeedRecord | CurveRecord)


def device_key(config: TrainConfig, threads: int, *, ranks: str = "") -> str:
    """The host, device, torch version and threads for which a measurement is valid, as a key.

    `ranks` tells trials of several ranks apart, see `ranks_key`.
    """
    machine = describe_machine(config.device, threads)
    return f"{machine['host']} {machine['device']} torch {machine['torch']} {threads} threads{ranks}"


def ranks_key(resources: Resources) -> str:
    """The part of `device_key` for trials of several ranks; empty for one."""
    n_ranks, where = resources.ranks_per_trial, " across nodes" if resources.across_nodes else ""
    return "" if n_ranks == 1 else f" x {n_ranks} ranks {resources.strategy}{where}"


def measure_tokens_per_second(config: TrainConfig, *, threads: int, together: int = 1) -> float:
    """Times real training steps of `together` trials in this process; returns the median of their total rate."""
    torch.set_num_threads(threads)
    if together > 1:
        return measure_step_together(config, together, warmup=3, steps=10)
    return float(measure_step(config, warmup=3, steps=10)["tokens_per_second"])


def measure_for_equal_time(
    base: TrainConfig, missing: Mapping[str, TrainConfig], known: Speeds, measure: Callable[[TrainConfig], float]
) -> dict[str, float]:
    """Returns the speed of each config in `missing`, by key: the fastest of several rounds over all configs.

    If the speed of `base` is `known` from an earlier phase, the new speeds are scaled to agree with it, since the load
    on the machine may have changed.
    """
    base = resolved(base)
    base_key = step_time_key(base)
    configs = {base_key: base, **missing}
    rounds = [{key: measure(config) for key, config in configs.items()} for _ in range(ROUNDS)]
    best = {key: max(speeds[key] for speeds in rounds) for key in configs}
    scale = known.get(base_key, best[base_key]) / best[base_key]
    return {key: speed * scale for key, speed in best.items() if key not in known}


def measure_speeds(trials: Iterable[tuple[TrainConfig, int]], threads: int) -> None:
    """Times each shape once and stores its speed. `trials` pairs a config with the number of trials per process."""
    shapes = {(step_time_key(config), together): config for config, together in trials}
    records = []
    for (shape, together), config in shapes.items():
        speed = measure_tokens_per_second(config, threads=threads, together=together)
        device = device_key(config, threads)
        records.append(SpeedRecord(device=device, shape=shape, together=together, tokens_per_second=speed))
    _append(records)


def measure_rank_speeds(configs: Iterable[TrainConfig], resources: Resources) -> None:
    """Times each shape once with the ranks and the strategy of a campaign, on this host, and stores its speed.

    Raises RanksNotMeasured if a rank fails, dies or hangs.
    """
    threads, n_ranks = resources.cpus_per_rank, resources.ranks_per_trial
    shapes = {step_time_key(config): config for config in configs}
    shared = [override(config, {"distributed.strategy": resources.strategy}) for config in shapes.values()]
    speeds = measure_on_ranks(shared, n_ranks, threads=threads) if shared else []
    key = ranks_key(resources)
    _append(
        SpeedRecord(device=device_key(config, threads, ranks=key), shape=shape, together=1, tokens_per_second=speed)
        for (shape, config), speed in zip(shapes.items(), speeds, strict=True)
    )


def remember_speeds(campaign: Campaign, state: CampaignState, configs: Mapping[str, TrainConfig]) -> None:
    """Stores the speeds of shapes whose trials finished in this session at the first attempt. `configs` are by id."""
    resources = campaign.resources
    device = device_key(campaign.base, resources.cpus_per_rank, ranks=ranks_key(resources))
    speeds = {}
    for trial_id, config in configs.items():
        result = state.results.get(trial_id)
        if result is None or result["status"] != "finished" or result["attempt"] != 1 or result["seconds"] <= 0:
            continue
        was_alone = result["provenance"].get("vectorised", 1) == 1  # in its process
        if was_alone and result["time"] >= state.campaign["time"]:
            speeds[step_time_key(config)] = trial_work(config) / result["seconds"]
    _append(SpeedRecord(device=device, shape=name, together=1, tokens_per_second=x) for name, x in speeds.items())


def known_speeds(device: str) -> dict[tuple[str, int], float]:
    """The newest tokens per second on a device, by (`step_time_key`, number of trials that share the process)."""
    return {(r.shape, r.together): r.tokens_per_second for r in _read(SpeedRecord) if r.device == device}


def known_curve(device: str, shape: str, *, max_trials: int, together: int = 1) -> CurveRecord | None:
    """The newest curve of this device, shape and group size that was measured up to at least `max_trials` processes.

    Curves of other code do not count: its trials may need other memory, or train at another speed.
    """
    key = (device, shape, together, current_code().digest)
    matching = (r for r in _read(CurveRecord) if (r.device, r.shape, r.together, r.code) == key)
    return next((r for r in reversed(list(matching)) if r.max_trials >= max_trials), None)


def remember_curve(
    device: str, shape: str, curve: list[ThroughputPoint], *, max_trials: int, together: int = 1
) -> CurveRecord:
    """Stores a new curve for later campaigns on this machine, and returns its record."""
    now, code = datetime.now(UTC).isoformat(timespec="seconds"), current_code().digest
    record = CurveRecord(
        device=device,
        shape=shape,
        together=together,
        code=code,
        max_trials=max_trials,
        measured_at=now,
        curve=curve,
    )
    _append([record])
    return record


def _read(kind: type[Record]) -> Iterator[Record]:
    """The stored records of one kind, oldest first."""
    records: list[SpeedRecord | CurveRecord] = []
    with optional_cache("measured speeds"):
        records = read_json_lines(cache_folder() / STORE, ANY_RECORD.validate_json)
    yield from (record for record in records if isinstance(record, kind))


def _append(records: Iterable[SpeedRecord | CurveRecord]) -> None:
    if rows := [record.model_dump() for record in records]:
        with optional_cache("measured speeds"):
            append_json_lines(cache_folder() / STORE, rows)
