"""Measures how many trials sharing one device are fastest: the calibration of `gpus_per_trial: auto`."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ngpt.data.dataset import prepare
from ngpt.system.device import pick_device
from ngpt.training.config import TrainConfig, read_config, resolved
from tune.bench.campaigns import Figures, tiny_campaign
from tune.machine.concurrency_benchmark import SECONDS, measure_concurrent_trials
from tune.machine.environment import usable_cpus
from tune.machine.gpu_sharing import TRIAL_COUNTS, fastest_point
from tune.machine.throughput import device_key, remember_curve
from tune.planning.equal_time import step_time_key


def packing(*, config: Path | None = None, set: Sequence[str] = (), seconds: float = SECONDS) -> Figures:
    """Finds how many trials, each in its own process, train the most tokens per second on this device.

    config, set: the trial, as for ngpt.train; default: the tiny one of `campaign`. seconds: of training per point.
    On a CPU the cores are divided among the trials, at most one trial per core. Returns best (trials at once),
    tokens_per_second (of all of them), gain (over one trial) and the curve: trials, threads, tokens_per_second,
    memory_bytes (of each), room (how many such trials the memory holds), fits. Campaigns reuse the curve of a GPU.
    """
    if config is None and not set:
        with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
            trial = tiny_campaign(Path(folder), 2, steps=1, workers=1).base
    else:
        trial = read_config(config, list(set))
    prepare(trial.data, log=lambda line: None)
    return packing_of(resolved(trial), seconds=seconds)


def packing_of(config: TrainConfig, *, seconds: float = SECONDS) -> Figures:
    """The figures of `packing` for a resolved config."""
    cpus, on_gpu = usable_cpus(), pick_device(config.device).type == "cuda"
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
