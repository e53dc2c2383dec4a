"""How many trials at once on one device train the most tokens per second: measured, not guessed.

A small model leaves most of a GPU idle between its kernels, and a second trial fills the gaps; too many get in each
other's way, or do not fit. So for `gpus_per_trial: auto` a short calibration (tune/machine/concurrency_benchmark.py) lets 1, 2, 3, 4, 6, ...
trials take real steps at the same time. The curve is kept beside the measured speeds, by device, shape and dtype, so
that the next campaign does not wait for it.

A packed trial is slower than one that has the device for itself: every record says how many shared it (`packed`), and
tokens per second compare only between equal numbers. What a trial computes does not depend on it.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ngpt.model.flops import flops_per_token
from ngpt.system.cache import cache_folder
from ngpt.system.device import pick_device
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.machine.concurrency_benchmark import (
    CalibrationError,
    ThroughputPoint,
    describe_device,
    measure_concurrent_trials,
)
from tune.machine.environment import usable_cpus
from tune.planning.equal_time import pace_key
from tune.planning.forecast import expected_phases
from tune.planning.plan import trial_flops, trial_tokens
from tune.spec.schema import Campaign, Resources
from tune.storage.state import DONE, CampaignState

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # trials at once that are tried, in this order
SAME = 0.99  # of the most tokens per second: the fewest trials that reach it are taken
WORTH = 90.0  # seconds of training, one trial at a time on each device: a shorter campaign is not worth a calibration

Log = Callable[[str], None]


@dataclass(frozen=True)
class GpuSharing:
    """How many trials share a device, and why."""

    trials_per_device: int
    why: str
    device: str
    curve: tuple[ThroughputPoint, ...] = ()
    measured_at: str | None = None  # UTC; None: nothing was measured


def fastest_point(curve: Sequence[ThroughputPoint], *, most: int) -> ThroughputPoint:
    """The point of the most tokens per second among those that fit into the memory and have at most `most` trials.

    Of points that are as fast (`SAME`) the one with the fewest trials. The first of `curve` is one trial.
    """
    fitting = [point for point in curve if point.fits and point.trials <= most] or list(curve[:1])
    fastest = max(point.tokens_per_second for point in fitting)
    return next(point for point in fitting if point.tokens_per_second >= SAME * fastest)


def pack(campaign: Campaign, state: CampaignState, log: Log) -> GpuSharing | None:
    """How many trials of a campaign are to share each GPU; None where that is not for us to choose.

    It measures unless the shape is known, or what is left to train is over sooner than a calibration would be.
    """
    if campaign.resources.gpus_per_trial != "auto" or pick_device(campaign.base.device).type != "cuda":
        return None
    configs, devices = _left(campaign, state), torch.cuda.device_count()
    most = _most(campaign.resources, len(configs), devices)
    return choose(configs, most=most, devices=devices, threads=campaign.resources.cpus_per_trial, log=log)


def known_trials_per_device(campaign: Campaign) -> int:
    """How many trials `pack` would let share each GPU, as far as it need not measure; else 1."""
    configs, threads = _left(campaign, CampaignState()), campaign.resources.cpus_per_trial
    most = _most(campaign.resources, len(configs), torch.cuda.device_count())
    main = _most_worked_on(configs)
    known = known_curve(describe_device(main, threads), pace_key(main), threads=threads, most=1)
    return fastest_point(known[0], most=most).trials if known else 1


def choose(configs: Sequence[TrainConfig], *, most: int, devices: int, threads: int, log: Log) -> GpuSharing | None:
    """How many of the trials `configs` are to share each of so many devices, at most `most`; None for one.

    The shape that most of the arithmetic goes into decides the speed, the trial with the largest steps the memory.
    """
    if most < 2:
        return None
    main = _most_worked_on(configs)
    device, shape = describe_device(main, threads), pace_key(main)
    known = known_curve(device, shape, threads=threads, most=most)
    if known is not None:
        curve, measured_at = known
        why = f"measured on {measured_at[:10]}"
    else:
        tokens = sum(map(trial_tokens, configs)) / devices

        def too_short(curve: Sequence[ThroughputPoint]) -> bool:
            return len(curve) == 1 and tokens < WORTH * curve[0].tokens_per_second

        log("measuring how many trials at once are fastest ...")
        counts = [count for count in COUNTS if count <= most]
        try:
            curve = measure_concurrent_trials(main, counts=counts, threads=lambda _: threads, enough=too_short, log=log)
        except CalibrationError as error:  # the campaign's own trials will say why, each in its record
            return GpuSharing(1, f"not measured: {error}", device)
        if too_short(curve):
            seconds = fmt.duration(tokens / curve[0].tokens_per_second)
            return GpuSharing(
                1, f"not measured: on their own the trials take {seconds} of training", device, tuple(curve)
            )
        measured_at, why = datetime.now(UTC).isoformat(timespec="seconds"), "measured at the start of this campaign"
        remember_curve(device, shape, curve, threads=threads, most=most, measured_at=measured_at)
    best = fastest_point(curve, most=min(most, _room_for_the_largest(configs, main, threads, log)))
    gain = best.tokens_per_second / curve[0].tokens_per_second
    return GpuSharing(best.trials, f"{gain:.2f} x the tokens/s of one, {why}", device, tuple(curve), measured_at)


def _most(resources: Resources, trials: int, devices: int) -> int:
    """How many trials on a device could have something to do, and CPUs to do it on."""
    slots = min(resources.workers or trials, trials)
    return min(-(-slots // devices), usable_cpus() // (resources.cpus_per_trial * devices))


def _left(campaign: Campaign, state: CampaignState) -> list[TrainConfig]:
    """What there is to train, as far as the winners are known."""
    done = {trial_id for trial_id, result in state.results.items() if result["status"] in DONE}
    trials = {trial.trial_id: trial.config for phase in expected_phases(campaign, state) for trial in phase.trials}
    return [config for trial_id, config in trials.items() if trial_id not in done]


def _most_worked_on(configs: Sequence[TrainConfig]) -> TrainConfig:
    work: Counter[str] = Counter()
    for config in configs:
        work[pace_key(config)] += round(trial_flops(config))
    shape = max(work, key=work.__getitem__)
    return next(config for config in configs if pace_key(config) == shape)


def _room_for_the_largest(configs: Sequence[TrainConfig], main: TrainConfig, threads: int, log: Log) -> int:
    """How many of the trial with the most arithmetic at once fit on a device together."""

    def at_once(config: TrainConfig) -> float:
        rows = config.micro_batch_size or config.batch_size
        return rows * config.model.block_size * flops_per_token(config.model)

    largest = max(configs, key=at_once)
    if at_once(largest) <= at_once(main):
        return COUNTS[-1]
    device, shape = describe_device(largest, threads), pace_key(largest)
    known = known_curve(device, shape, threads=threads, most=1)
    if known is None:
        log("measuring the memory of the largest trial ...")
        try:
            curve = measure_concurrent_trials(largest, counts=(1,), threads=lambda _: threads, log=log)
        except CalibrationError:
            return 1
        measured_at = datetime.now(UTC).isoformat(timespec="seconds")
        remember_curve(device, shape, curve, threads=threads, most=1, measured_at=measured_at)
        known = curve, measured_at
    return max(1, known[0][0].room)


# ---- what was measured before ----------------------------------------------------------------------------------------


def known_curve(device: str, shape: str, *, threads: int, most: int) -> tuple[list[ThroughputPoint], str] | None:
    """The newest curve of this device and shape, and when it was measured; None unless it went as far as `most`."""
    path = _curves_file()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for row in filter(None, map(_parse, reversed(lines))):
        if (row["device"], row["shape"], row["threads"]) == (device, shape, threads) and row["most"] >= most:
            return [ThroughputPoint(**point) for point in row["curve"]], row["measured_at"]
    return None


def remember_curve(
    device: str, shape: str, curve: Sequence[ThroughputPoint], *, threads: int, most: int, measured_at: str
) -> None:
    """Keeps a curve for later campaigns on this machine; `most` is how far it would have gone at most."""
    path = _curves_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"device": device, "shape": shape, "threads": threads, "most": most, "measured_at": measured_at}
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(row | {"curve": [asdict(point) for point in curve]}) + "\n")


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the file; None for one that a crash tore, which costs a calibration and nothing else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    wanted = {"device", "shape", "threads", "most", "measured_at", "curve"}
    return row if isinstance(row, dict) and row.keys() >= wanted else None


def _curves_file() -> Path:
    return cache_folder() / "packing.jsonl"
