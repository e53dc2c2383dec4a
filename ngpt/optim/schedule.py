"""Learning-rate schedules, and which events are due at a step: pure functions of the step, so resuming needs no state.

A schedule is a function (progress, cfg) -> multiplier in `SCHEDULES`; progress runs from 0 to 1 after the warm-up.
"""

import math
from typing import Annotated

from pydantic import Field

from ngpt.config.base import Config, one_of

Share = Annotated[float, Field(ge=0, le=1)]


def constant(progress: float, cfg: "ScheduleConfig") -> float:
    """The full learning rate throughout."""
    return 1.0


def cosine(progress: float, cfg: "ScheduleConfig") -> float:
    """Half a cosine from 1 to `final_ratio` (SGDR, arXiv 1608.03983, without restarts)."""
    return cfg.final_ratio + (1 - cfg.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(progress: float, cfg: "ScheduleConfig") -> float:
    """Full until the last `decay_fraction` of the run, then linearly to `final_ratio` (warm-up, stable, decay)."""
    left = (1 - progress) / cfg.decay_fraction if cfg.decay_fraction else 1.0
    return cfg.final_ratio + (1 - cfg.final_ratio) * min(1.0, left)


def logarithmic(progress: float, cfg: "ScheduleConfig") -> float:
    """1 - log(1 + k p) / log(1 + k), down to `final_ratio`: fast at first, then slower; k is `log_steepness`.

    "Training nGPT" (arXiv 2608.01284) decays logarithmically after 10 % of warm-up; the formula here is our own.
    """
    fall = math.log1p(cfg.log_steepness * progress) / math.log1p(cfg.log_steepness)
    return cfg.final_ratio + (1 - cfg.final_ratio) * (1 - fall)


SCHEDULES = {"constant": constant, "cosine": cosine, "trapezoid": trapezoid, "logarithmic": logarithmic}


class ScheduleConfig(Config):
    """How all learning rates change over the run, as a multiple of those in `optim`."""

    name: Annotated[str, one_of(SCHEDULES, "schedule")] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # linear, from lr / warmup_steps at the first step
    final_ratio: Share = 0.0  # of the learning rate at the end
    decay_fraction: Share = 0.2  # of the steps after the warm-up; `trapezoid` only
    log_steepness: Annotated[float, Field(gt=0)] = 9.0  # how much faster it falls at first; `logarithmic` only


def lr_multiplier(step: int, total: int, cfg: ScheduleConfig) -> float:
    """The factor of the learning rates in step `step` of `total`, counted from 0."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, total - cfg.warmup_steps)
    return SCHEDULES[cfg.name](min(1.0, progress), cfg)


def is_due(step: int, every: int, *, last: bool = False) -> bool:
    """Whether an event that happens every `every` steps is due at `step`; at the `last` step it always is."""
    return last or step % every == 0
