"""Which configs take equally long per step: the key under which measured speeds are kept."""

from functools import lru_cache
from typing import Any

from ngpt.config.base import content_hash
from ngpt.model.gpt import ModelConfig
from ngpt.training.config import TrainConfig
from tune.spec.schema import MOST_TRIALS

SPEED_SETTINGS = ("batch_size", "micro_batch_size", "dtype")  # besides all of `model.`


NOT_SPEED = ("model.alpha", "model.logit_scale", "model.rope_base")


def shape_key(config: TrainConfig, together: int = 1) -> str:
    """Configs with the same key take equally long per step, where so many of them are trained `together`."""
    free = {name.removeprefix("model."): None for name in NOT_SPEED}
    key = _shape(config.model.model_copy(update=free), *(getattr(config, name) for name in SPEED_SETTINGS))
    return key if together == 1 else f"{key} x {together}"


@lru_cache(maxsize=MOST_TRIALS)
def _shape(model: ModelConfig, *rest: Any) -> str:
    """The hash of a shape: thousands of trials have a few of them."""
    others: dict[str, Any] = dict(zip(SPEED_SETTINGS, rest, strict=True))
    return content_hash(model, leave_out={name.removeprefix("model.") for name in NOT_SPEED}, extra=others)
