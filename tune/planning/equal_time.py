"""`hold: seconds`: arms that train for equally long, by steps that are fixed from speeds measured once.

A trial that stops by the clock ends elsewhere each time. So the clock is asked before: the shapes of a phase are timed
side by side, round after round, each takes its fastest round, and the journal keeps the speeds. From then on an arm is
an ordinary trial with so many steps: what its baseline takes, times the ratio of the two speeds. A resumed campaign
reads the speeds and has the same steps, and so the same trial ids; another results directory measures for itself.

What is equal is the time inside training steps, without evaluations, checkpoints and start-up, as if each trial had the
device to itself while it is timed. Where workers share a device or the memory's bandwidth ("packed"), all get slower,
and not all by the same factor; for an exact answer run exclusively: `workers: 1`. The time of a step is a median, so
what happens in one step of ten, such as a projection every 10 steps, is not in it. Before anything was measured
(`--plan`), the FLOP counts stand in.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

from ngpt.config.base import content_hash, settings
from ngpt.model.flops import flops_per_token
from ngpt.training.config import TrainConfig, resolved

ROUNDS = 3
# What the time of a step depends on, besides all of `model.` but values that cost no time.
SHAPING = ("batch_size", "micro_batch_size", "dtype", "compile", "optim.name", "optim.ns_steps", "project_every")
FREE = ("model.alpha", "model.logit_scale", "model.rope_base")

Speeds = Mapping[str, float]  # training tokens per second by `pace_key`
Timer = Callable[[TrainConfig], float]


@lru_cache(maxsize=10_000)
def pace_key(config: TrainConfig) -> str:
    """Configs with the same key train equally many tokens a second. `config` is resolved."""
    kept = {name for name in settings(TrainConfig) if name in SHAPING or name.startswith("model.")}
    return content_hash(config, leave_out=set(settings(TrainConfig)) - kept | set(FREE))


def steps_of_equal_time(reference: TrainConfig, config: TrainConfig, speeds: Speeds) -> int:
    """The steps in which `config` trains for as long as `reference` does, at least one."""
    ours, theirs = resolved(config), resolved(reference)
    key, other = pace_key(ours), pace_key(theirs)
    if key == other:
        return reference.steps
    if key in speeds and other in speeds:
        ratio = speeds[key] / speeds[other]
    else:
        ratio = flops_per_token(theirs.model) / flops_per_token(ours.model)
    return max(1, round(reference.steps * ratio * reference.tokens_per_step / config.tokens_per_step))


def measure(base: TrainConfig, missing: Mapping[str, TrainConfig], known: Speeds, time: Timer) -> dict[str, float]:
    """The speeds of the configs in `missing`, by key.

    `base` is timed along with them: where its speed is `known`, from an earlier phase and perhaps a busier machine, the
    new speeds are scaled to it, so that all that the journal holds can be compared.
    """
    yardstick = pace_key(resolved(base))
    configs = {yardstick: resolved(base), **missing}
    rounds = [{key: time(config) for key, config in configs.items()} for _ in range(ROUNDS)]
    best = {key: max(speeds[key] for speeds in rounds) for key in configs}
    scale = known.get(yardstick, best[yardstick]) / best[yardstick]
    return {key: speed * scale for key, speed in best.items() if key not in known}


def timer(threads: int) -> Timer:
    """Times real training steps on as many threads as a trial gets: training tokens per second."""

    def time(config: TrainConfig) -> float:
        import torch

        from ngpt.training.throughput import measure_step

        torch.set_num_threads(threads)
        return float(measure_step(config, warmup=2, steps=8)["tokens_per_second"])

    return time
