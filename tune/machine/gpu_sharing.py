"""Chooses how many trials share a GPU, by measuring which number trains the most tokens per second.

A small model leaves a GPU idle between kernels, and more trials fill the gaps. A short calibration measures real steps
(tune/machine/concurrency_benchmark.py) of processes that do what the workers will do: with `vectorise`, each trains a
group. Sharing does not change the results of a trial, but slows it down: tokens per second are only comparable between
records with the same `packed`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ngpt.data.text.progress import Log
from ngpt.ensemble.train import ensemble_incompatibility, graph_settings
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
from tune.trials.trial_group import group_size

TRIAL_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # numbers of concurrent trials to measure, in this order
EQUALLY_FAST = 0.99  # share of the highest throughput; the smallest number of trials that reaches it is chosen
MIN_TRAINING_SECONDS = 90.0  # with one trial per device; in a shorter campaign, calibrating costs more than it saves


@dataclass(frozen=True)
class GpuSharing:
    """How many trials, or groups of trials, share a device, and why. The journal keeps it as `packing_chosen`."""

    trials_per_device: int  # processes, of which each trains one trial or a group
    why: str
    device: str
    curve: tuple[ThroughputPoint, ...] = ()
    measured_at: str | None = None  # UTC; None if there was no measurement
    together: int = 1  # trials in each group, as measured


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
    has_gpus_alone = campaign.resources.gpus_per_trial != "auto" or campaign.resources.ranks_per_trial > 1
    if has_gpus_alone or not gpus.is_gpu(pick_device(campaign.base.device)):
        return None
    configs, devices, resources = _trials_left(campaign, state), len(gpus.visible_ids()), campaign.resources
    groups = GroupSizes(configs, devices=devices, max_size=resources.vectorise)
    max_trials = _max_trials(resources, groups.count, devices)
    return choose_trials_per_device(
        configs, max_trials=max_trials, devices=devices, threads=resources.cpus_per_trial, log=log, groups=groups
    )


def known_trials_per_device(campaign: Campaign, state: CampaignState) -> int:
    """What `choose_gpu_sharing` chooses, by stored measurements alone; 1 if there are none. Measures nothing."""
    configs, devices, resources = _trials_left(campaign, state), len(gpus.visible_ids()), campaign.resources
    if not configs:
        return 1
    groups, dominant = GroupSizes(configs, devices=devices, max_size=resources.vectorise), _dominant_config(configs)
    device, shape = device_key(dominant, resources.cpus_per_trial), step_time_key(dominant)
    known = known_curve(device, shape, max_trials=1, together=groups.of(dominant))
    max_trials = _max_trials(resources, groups.count, devices)
    if known is None or max_trials < 2:
        return 1
    room = _room_for_largest(configs, dominant, groups, resources.cpus_per_trial, log=None)
    return fastest_point(known.curve, max_trials=min(max_trials, room)).trials


class GroupSizes:
    """How many of the trials `configs` one worker trains as a group, if each of `devices` has at least one worker."""

    def __init__(self, configs: Sequence[TrainConfig], *, devices: int, max_size: int) -> None:
        graphs = Counter(map(_graph, configs))
        self._sizes = {
            graph: 1 if graph is None else group_size(trials, devices, max_size=max_size)
            for graph, trials in graphs.items()
        }
        self.count = sum(-(-trials // self._sizes[graph]) for graph, trials in graphs.items())  # of groups

    def of(self, config: TrainConfig) -> int:
        """The size of the groups of one of the configs."""
        return self._sizes[_graph(config)]


def choose_trials_per_device(
    configs: Sequence[TrainConfig],
    *,
    max_trials: int,
    devices: int,
    threads: int,
    log: Log,
    groups: GroupSizes | None = None,
) -> GpuSharing | None:
    """Chooses how many of the trials `configs`, or of their groups, share each of `devices`; None if `max_trials` is 1.

    Speed is measured for the shape with the most FLOPs in total, memory for that with the most FLOPs per step.
    """
    if max_trials < 2:
        return None
    groups = groups or GroupSizes(configs, devices=devices, max_size=1)
    dominant = _dominant_config(configs)
    device, shape, together = device_key(dominant, threads), step_time_key(dominant), groups.of(dominant)
    if known := known_curve(device, shape, max_trials=max_trials, together=together):
        why = f"measured on {known.measured_at[:10]}"
    else:
        tokens = sum(map(trial_tokens, configs)) / devices

        def is_too_short(curve: Sequence[ThroughputPoint]) -> bool:
            return len(curve) == 1 and tokens < MIN_TRAINING_SECONDS * curve[0].tokens_per_second

        what = "trials" if together == 1 else f"groups of {together} trials"
        log(f"measuring how many concurrent {what} are fastest ...")
        counts = [count for count in TRIAL_COUNTS if count <= max_trials]
        try:
            curve = measure_concurrent_trials(
                dominant,
                counts=counts,
                threads=lambda _: threads,
                together=together,
                is_enough=is_too_short,
                log=log,
            )
        except CalibrationError as error:  # the trials will fail for the same reason, each with its own record
            return GpuSharing(1, f"not measured: {error}", device, together=together)
        if is_too_short(curve):
            seconds = fmt.duration(tokens / curve[0].tokens_per_second)
            why = f"not measured: run sequentially, the trials take only {seconds}"
            return GpuSharing(1, why, device, tuple(curve), together=together)
        known = remember_curve(device, shape, curve, max_trials=max_trials, together=together)
        why = "measured at the start of this campaign"
    room = _room_for_largest(configs, dominant, groups, threads, log)
    best = fastest_point(known.curve, max_trials=min(max_trials, room))
    why = f"{best.tokens_per_second / known.curve[0].tokens_per_second:.2f} x the tokens/s of one, {why}"
    return GpuSharing(best.trials, why, device, tuple(known.curve), known.measured_at, together)


def _graph(config: TrainConfig) -> str | None:
    """What trials must share to be trained as a group; None if this one cannot be trained in a group."""
    return None if ensemble_incompatibility([config]) else repr(graph_settings(config))


def _max_trials(resources: Resources, trials: int, devices: int) -> int:
    """The largest number of trials or groups per device that their number, workers and CPUs allow."""
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


def _room_for_largest(
    configs: Sequence[TrainConfig], dominant: TrainConfig, groups: GroupSizes, threads: int, log: Log | None
) -> int:
    """The number of processes with the most FLOPs per step that fit into the memory of a device.

    Without `log`, measures nothing: if the largest trial was not measured, it counts like the dominant one.
    """

    def flops_per_step(config: TrainConfig) -> float:
        rows = groups.of(config) * (config.micro_batch_size or config.batch_size)
        return rows * config.model.block_size * flops_per_token(config.model)

    largest = max(configs, key=flops_per_step)
    if flops_per_step(largest) <= flops_per_step(dominant):
        return TRIAL_COUNTS[-1]
    device, shape, together = device_key(largest, threads), step_time_key(largest), groups.of(largest)
    known = known_curve(device, shape, max_trials=1, together=together)
    if known is None and log is None:
        return TRIAL_COUNTS[-1]
    if known is None:
        assert log is not None
        log("measuring the memory of the largest trial ...")
        try:
            curve = measure_concurrent_trials(
                largest, counts=(1,), threads=lambda _: threads, together=together, log=log
            )
        except CalibrationError:
            return 1
        known = remember_curve(device, shape, curve, max_trials=1, together=together)
    return max(1, known.curve[0].room)
