"""Learning-rate schedules and periodic events, as pure functions of the step, so that resuming needs no state.

A schedule is a function (progress, cfg) -> multiplier in `SCHEDULES`; progress goes from 0 to 1 after warm-up.
"""

import math
from typing import Annotated

from pydantic import Field

from ngpt.config.base import Config, one_of

Share = Annotated[float, Field(ge=0, le=1)]


def constant(progress: float, cfg: "ScheduleConfig") -> float:
    """Keeps the full learning rate."""
    return 1.0


def cosine(progress: float, cfg: "ScheduleConfig") -> float:
    """Cosine decay from 1 to `final_ratio` (SGDR, arXiv 1608.03983, without restarts)."""
    return cfg.final_ratio + (1 - cfg.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(progress: float, cfg: "ScheduleConfig") -> float:
    """Warm-up, stable, decay: 1 until the last `decay_fraction` of the steps, then linear to `final_ratio`."""
    remaining = (1 - progress) / cfg.decay_fraction if cfg.decay_fraction else 1.0
    return cfg.final_ratio + (1 - cfg.final_ratio) * min(1.0, remaining)


def logarithmic(progress: float, cfg: "ScheduleConfig") -> float:
    """Decays as 1 - log(1 + k p) / log(1 + k), rescaled to end at `final_ratio`, with k = `log_steepness`.

    "Training nGPT" (arXiv 2608.01284) uses logarithmic decay after 10 % of warm-up; this formula is our own.
    """
    decay = math.log1p(cfg.log_steepness * progress) / math.log1p(cfg.log_steepness)
    return cfg.final_ratio + (1 - cfg.final_ratio) * (1 - decay)


SCHEDULES = {"constant": constant, "cosine": cosine, "trapezoid": trapezoid, "logarithmic": logarithmic}


class ScheduleConfig(Config):
    """Learning-rate schedule, a multiplier of all rates in `optim`."""

    name: Annotated[str, one_of(SCHEDULES, "schedule")] = "cosine"
    """Shape of the learning rates after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Steps of the linear warm-up, which starts at lr / warmup_steps."""
    final_ratio: Share = 0.0
    """Final learning rate, divided by the peak."""
    decay_fraction: Share = 0.2
    """Share of the steps after the warm-up in which the rate falls; `trapezoid` only."""
    log_steepness: Annotated[float, Field(gt=0)] = 9.0
    """Larger values fall faster at first; `logarithmic` only."""


def lr_multiplier(step: int, total: int, cfg: ScheduleConfig) -> float:
    """Returns the multiplier of the learning rates at `step`, in 0 ... total - 1."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, total - cfg.warmup_steps)
    return SCHEDULES[cfg.name](min(1.0, progress), cfg)


def is_due(step: int, every: int, *, last: bool = False) -> bool:
    """Whether an event that occurs every `every` steps is due at `step`; it always is at the `last` step."""
    return last or step % every == 0
