"""Measures how many trials should share one device, as `gpus_per_trial: auto` does."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ngpt.data.dataset import prepare
from ngpt.system import gpus
from ngpt.system.cgroups import usable_cpus
from ngpt.system.device import pick_device
from ngpt.training.config import TrainConfig, read_config, resolved
from tune.bench.campaigns import Metrics, tiny_campaign
from tune.machine.concurrency_benchmark import SECONDS, measure_concurrent_trials
from tune.machine.gpu_sharing import TRIAL_COUNTS, fastest_point
from tune.machine.throughput import device_key, remember_curve
from tune.planning.equal_time import step_time_key


def packing(*, config: Path | None = None, set: Sequence[str] = (), seconds: float = SECONDS) -> Metrics:
    """Finds how many concurrent trials, each in its own process, train the most tokens per second on this device.

    config, set: settings of the trial, as for ngpt.train; by default, the tiny trial of `campaign`. seconds: training
    time per point of the curve. On a CPU the trials divide the cores, with at most one trial per core. Returns best
    (number of concurrent trials), tokens_per_second (their total), gain (relative to one trial) and the curve: trials,
    threads, tokens_per_second, memory_bytes (per trial), room (number of such trials that fit in memory) and fits.
    The curve of a GPU is cached for campaigns.
    """
    trial = read_config(config, list(set)) if config or set else tiny_campaign(2, steps=1, workers=1).base
    prepare(trial.data, log=lambda line: None)
    return packing_of(resolved(trial), seconds=seconds)


def packing_of(config: TrainConfig, *, seconds: float = SECONDS) -> Metrics:
    """Returns the results of `packing` for a resolved config."""
    cpus, on_gpu = usable_cpus(), gpus.is_gpu(pick_device(config.device))
    counts = [count for count in TRIAL_COUNTS if count <= cpus]

    def threads(count: int) -> int:
        return 1 if on_gpu else max(1, cpus // count)

    curve = measure_concurrent_trials(config, counts=counts, threads=threads, seconds=seconds)
    device = device_key(config, 1)
    if on_gpu:
        remember_curve(device, step_time_key(config), curve, max_trials=counts[-1])
    best = fastest_point(curve, max_trials=counts[-1])
    return {
        "best": best.trials,
        "tokens_per_second": best.tokens_per_second,
        "gain": best.tokens_per_second / curve[0].tokens_per_second,
        "curve": [asdict(point) | {"fits": point.fits} for point in curve],
        "device": device,
        "dtype": config.dtype,
        "compiled": config.compile,
    }
