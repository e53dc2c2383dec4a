"""`hold: seconds`: gives every arm of a phase as many steps as fit into the training time of its baseline.

A trial that is stopped by a timer ends at a different step each time. Instead, the model shapes of a phase are timed
beforehand (tune/machine/throughput.py), and the speeds are stored in the journal, so a resumed campaign keeps its steps
and trial ids. An arm gets the steps of its baseline times the ratio of their speeds, or of their FLOP counts until
speeds are measured (`--plan`).

"Equal time" is time inside training steps, without evaluations, checkpoints and startup, for a trial that has the
device to itself; use `workers: 1` for an exact comparison. The time per step is a median, so work done only in some
steps, such as a projection every 10 steps, is not counted.
"""

from collections.abc import Mapping
from functools import lru_cache

from ngpt.config.base import content_hash, settings
from ngpt.model.flops import flops_per_token
from ngpt.training.config import TrainConfig, resolved

# Step time depends on these settings and on all `model.` settings except `FREE_SETTINGS`.
STEP_TIME_SETTINGS = (
    *("batch_size", "micro_batch_size", "dtype", "compile"),
    *("optim.name", "optim.ns_steps", "project_every"),
)
FREE_SETTINGS = ("model.alpha", "model.logit_scale", "model.rope_base")

Speeds = Mapping[str, float]  # training tokens per second by `step_time_key`


def step_time_key(config: TrainConfig) -> str:
    """A hash that is equal for resolved configs whose steps take equally long; the key of measured speeds."""
    return _hash(config.model_copy(update={"seed": 0}))


@lru_cache(maxsize=10_000)
def _hash(config: TrainConfig) -> str:
    relevant = {name for name in settings(TrainConfig) if name in STEP_TIME_SETTINGS or name.startswith("model.")}
    return content_hash(config, leave_out=settings(TrainConfig).keys() - relevant | set(FREE_SETTINGS))


def steps_of_equal_time(baseline: TrainConfig, config: TrainConfig, speeds: Speeds) -> int:
    """The number of steps, at least one, in which `config` takes as long as `baseline`."""
    config, baseline = resolved(config), resolved(baseline)
    key, baseline_key = step_time_key(config), step_time_key(baseline)
    if key == baseline_key:
        return baseline.steps
    if key in speeds and baseline_key in speeds:
        ratio = speeds[key] / speeds[baseline_key]
    else:
        ratio = flops_per_token(baseline.model) / flops_per_token(config.model)
    return max(1, round(baseline.steps * ratio * baseline.tokens_per_step / config.tokens_per_step))
