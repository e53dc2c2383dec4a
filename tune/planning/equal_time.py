"""`hold: seconds`: gives every arm of a phase the number of steps that takes as long as its baseline.

A trial that stops by the clock ends at a different step each time. Here the shapes of a phase are timed beforehand
(tune/machine/throughput.py), and the speeds are kept in the journal: a resumed campaign keeps its steps and trial ids.
An arm's steps are those of its baseline times the ratio of the two speeds, or of the FLOP counts until speeds are
measured (`--plan`).

"Equal time" is time inside training steps, without evaluations, checkpoints and start-up, for a trial that has the
device to itself; use `workers: 1` for an exact comparison. The time of a step is a median, so work done in one step of
ten, such as a projection every 10 steps, is not counted.
"""

from collections.abc import Mapping
from functools import lru_cache

from ngpt.config.base import content_hash, settings
from ngpt.model.flops import flops_per_token
from ngpt.training.config import TrainConfig, resolved

# The time of a step depends on these settings and on all of `model.` except the free ones.
STEP_TIME_SETTINGS = (
    *("batch_size", "micro_batch_size", "dtype", "compile"),
    *("optim.name", "optim.ns_steps", "project_every"),
)
FREE_SETTINGS = ("model.alpha", "model.logit_scale", "model.rope_base")

Speeds = Mapping[str, float]  # training tokens per second by `step_time_key`


def step_time_key(config: TrainConfig) -> str:
    """A hash that resolved configs share if their steps take equally long. Measured speeds are stored under it."""
    return _hash(config.model_copy(update={"seed": 0}))


@lru_cache(maxsize=10_000)
def _hash(config: TrainConfig) -> str:
    relevant = {name for name in settings(TrainConfig) if name in STEP_TIME_SETTINGS or name.startswith("model.")}
    return content_hash(config, leave_out=settings(TrainConfig).keys() - relevant | set(FREE_SETTINGS))


def steps_of_equal_time(baseline: TrainConfig, config: TrainConfig, speeds: Speeds) -> int:
    """Returns the steps in which `config` trains for as long as `baseline` does, at least one."""
    config, baseline = resolved(config), resolved(baseline)
    key, baseline_key = step_time_key(config), step_time_key(baseline)
    if key == baseline_key:
        return baseline.steps
    if key in speeds and baseline_key in speeds:
        ratio = speeds[key] / speeds[baseline_key]
    else:
        ratio = flops_per_token(baseline.model) / flops_per_token(config.model)
    return max(1, round(baseline.steps * ratio * baseline.tokens_per_step / config.tokens_per_step))
