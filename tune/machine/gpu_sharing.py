"""Chooses how many trials share a GPU, by measuring which number trains the most tokens per second.

A small model leaves a GPU idle between kernels, and more trials fill the gaps. A short calibration measures real steps
(tune/machine/concurrency_benchmark.py). Sharing does not change the results of a trial, but slows it down: tokens per
second are only comparable between records with the same `packed`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ngpt.data.text.progress import Log
from ngpt.model.flops import flops_per_token
from ngpt.system import gpus
from ngpt.system.cgroups import usable_cpus
from ngpt.system.device import pick_device
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.machine.concurrency_benchmark import CalibrationError, ThroughputPoint, measure_concurrent_trials
from tune.machine.throughput import device_key, known_curve, remember_curve
from tune.planning.equal_time import step_time_key
from tune.planning.forecast import expected_phases
from tune.planning.plan import trial_flops, trial_tokens
from tune.spec.schema import Campaign, Resources
from tune.storage.state import DONE, CampaignState

TRIAL_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # numbers of concurrent trials to measure, in this order
EQUALLY_FAST = 0.99  # share of the highest throughput; the smallest number of trials that reaches it is chosen
MIN_TRAINING_SECONDS = 90.0  # with one trial per device; in a shorter campaign, calibrating costs more than it saves


@dataclass(frozen=True)
class GpuSharing:
    """How many trials share a device, and why. The journal keeps it as `packing_chosen`."""

    trials_per_device: int
    why: str
    device: str
    curve: tuple[ThroughputPoint, ...] = ()
    measured_at: str | None = None  # UTC; None if there was no measurement


def fastest_point(curve: Sequence[ThroughputPoint], *, max_trials: int) -> ThroughputPoint:
    """The point with the highest throughput that fits into memory and has at most `max_trials` trials.

    Among equally fast points, returns the one with the fewest trials; if none fits, the first point (one trial).
    """
    fitting = [point for point in curve if point.fits and point.trials <= max_trials] or list(curve[:1])
    fastest = max(point.tokens_per_second for point in fitting)
    return next(point for point in fitting if point.tokens_per_second >= EQUALLY_FAST * fastest)


def choose_gpu_sharing(campaign: Campaign, state: CampaignState, log: Log) -> GpuSharing | None:
    """Chooses how many trials share each GPU; None on a CPU or if the campaign file fixes the number.

    Measures, unless a curve of this shape is stored or the remaining trials take too little time.
    """
    if campaign.resources.gpus_per_trial != "auto" or not gpus.is_gpu(pick_device(campaign.base.device)):
        return None
    configs, devices = _trials_left(campaign, state), gpus.count()
    max_trials, threads = _max_trials(campaign.resources, len(configs), devices), campaign.resources.cpus_per_trial
    return choose_trials_per_device(configs, max_trials=max_trials, devices=devices, threads=threads, log=log)


def known_trials_per_device(campaign: Campaign) -> int:
    """The number of trials per GPU by a stored measurement, or 1 if there is none. Measures nothing."""
    configs = _trials_left(campaign, CampaignState())
    dominant = _dominant_config(configs)
    known = known_curve(device_key(dominant, campaign.resources.cpus_per_trial), step_time_key(dominant), max_trials=1)
    max_trials = _max_trials(campaign.resources, len(configs), gpus.count())
    return fastest_point(known.curve, max_trials=max_trials).trials if known else 1


def choose_trials_per_device(
    configs: Sequence[TrainConfig], *, max_trials: int, devices: int, threads: int, log: Log
) -> GpuSharing | None:
    """Chooses how many of the trials `configs` share each of `devices`; None if `max_trials` is 1.

    Speed is measured for the shape with the most FLOPs in total, memory for the trial with the most FLOPs per step.
    """
    if max_trials < 2:
        return None
    dominant = _dominant_config(configs)
    device, shape = device_key(dominant, threads), step_time_key(dominant)
    if known := known_curve(device, shape, max_trials=max_trials):
        why = f"measured on {known.measured_at[:10]}"
    else:
        tokens = sum(map(trial_tokens, configs)) / devices

        def is_too_short(curve: Sequence[ThroughputPoint]) -> bool:
            return len(curve) == 1 and tokens < MIN_TRAINING_SECONDS * curve[0].tokens_per_second

        log("measuring how many concurrent trials are fastest ...")
        counts = [count for count in TRIAL_COUNTS if count <= max_trials]
        try:
            curve = measure_concurrent_trials(
                dominant, counts=counts, threads=lambda _: threads, is_enough=is_too_short, log=log
            )
        except CalibrationError as error:  # the trials will fail for the same reason, each with its own record
            return GpuSharing(1, f"not measured: {error}", device)
        if is_too_short(curve):
            seconds = fmt.duration(tokens / curve[0].tokens_per_second)
            why = f"not measured: run sequentially, the trials take only {seconds}"
            return GpuSharing(1, why, device, tuple(curve))
        known = remember_curve(device, shape, curve, max_trials=max_trials)
        why = "measured at the start of this campaign"
    room = _room_for_largest(configs, dominant, threads, log)
    best = fastest_point(known.curve, max_trials=min(max_trials, room))
    why = f"{best.tokens_per_second / known.curve[0].tokens_per_second:.2f} x the tokens/s of one, {why}"
    return GpuSharing(best.trials, why, device, tuple(known.curve), known.measured_at)


def _max_trials(resources: Resources, trials: int, devices: int) -> int:
    """The largest number of trials per device that the trials, workers and CPUs allow."""
    slots = min(resources.workers or trials, trials)
    return min(-(-slots // devices), usable_cpus() // (resources.cpus_per_trial * devices))


def _trials_left(campaign: Campaign, state: CampaignState) -> list[TrainConfig]:
    """Configs of all expected trials without a result."""
    trials = {trial.trial_id: trial.config for phase in expected_phases(campaign, state) for trial in phase.trials}
    return [config for i, config in trials.items() if i not in state.results or state.results[i]["status"] not in DONE]


def _dominant_config(configs: Sequence[TrainConfig]) -> TrainConfig:
    """The first config of the shape with the most FLOPs in total."""
    flops = Counter[str]()
    for config in configs:
        flops[step_time_key(config)] += round(trial_flops(config))
    return next(config for config in configs if step_time_key(config) == flops.most_common(1)[0][0])


def _room_for_largest(configs: Sequence[TrainConfig], dominant: TrainConfig, threads: int, log: Log) -> int:
    """The number of concurrent trials with the most FLOPs per step that fit into the memory of a device."""

    def flops_per_step(config: TrainConfig) -> float:
        rows = config.micro_batch_size or config.batch_size
        return rows * config.model.block_size * flops_per_token(config.model)

    largest = max(configs, key=flops_per_step)
    if flops_per_step(largest) <= flops_per_step(dominant):
        return TRIAL_COUNTS[-1]
    device, shape = device_key(largest, threads), step_time_key(largest)
    known = known_curve(device, shape, max_trials=1)
    if known is None:
        log("measuring the memory of the largest trial ...")
        try:
            curve = measure_concurrent_trials(largest, counts=(1,), threads=lambda _: threads, log=log)
        except CalibrationError:
            return 1
        known = remember_curve(device, shape, curve, max_trials=1)
    return max(1, known.curve[0].room)
