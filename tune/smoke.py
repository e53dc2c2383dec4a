"""`--smoke`: the same campaign with a tiny model, few steps and two seeds, to see in a minute that a file runs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ngpt.config import override
from ngpt.train import TrainConfig
from tune.campaign import Campaign, Fresh, Phase

# Upper limits; what a campaign asks for below them it gets.
LIMITS = {
    "steps": 8,
    "batch_size": 4,
    "eval_every": 4,
    "eval_tokens": 256,
    "model.n_layer": 2,
    "model.block_size": 32,
    "schedule.warmup_steps": 2,
}
HEAD_DIM = 8
SEEDS = 2


def shrunk(campaign: Campaign) -> Campaign:
    """The campaign with every size cut down; arms that differ in a size alone may come out the same."""
    phases = tuple(_shrunk_phase(phase) for phase in campaign.phases)
    return replace(campaign, base=_shrunk_base(campaign.base), phases=phases)


def _shrunk_base(base: TrainConfig) -> TrainConfig:
    small = _limited({name: _value(base, name) for name in LIMITS})
    small |= {"model.n_embd": min(base.model.n_embd, base.model.n_head * HEAD_DIM), "micro_batch_size": None}
    if base.data.tokenizer.startswith("sentencepiece:"):
        small["data.tokenizer"] = "sentencepiece:512"
    return override(base, small)


def _shrunk_phase(phase: Phase) -> Phase:
    arms = tuple(replace(arm, overrides=_limited(arm.overrides)) for arm in phase.arms)
    seeds = Fresh(min(phase.seeds.n, SEEDS)) if isinstance(phase.seeds, Fresh) else phase.seeds[:SEEDS]
    return replace(phase, pinned=_limited(phase.pinned), arms=arms, seeds=seeds)


def _limited(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: min(value, LIMITS[name]) if name in LIMITS else value for name, value in settings.items()}


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
