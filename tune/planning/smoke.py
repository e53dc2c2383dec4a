"""`--smoke`: shrinks a campaign to a tiny model, few steps and two seeds, to test in a minute that its file runs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ngpt.config.base import flatten, override
from ngpt.data.tokens.tokenizer import parse_spec
from ngpt.training.config import TrainConfig
from tune.spec.schema import Campaign, FreshSeeds, Phase
from tune.spec.search_space import random_arms

# Upper limits; smaller values of a campaign are kept.
LIMITS = {
    "steps": 8,
    "batch_size": 4,
    "micro_batch_size": 1,  # which divides every batch
    "eval_every": 4,
    "eval_tokens": 256,
    "model.n_layer": 2,
    "model.block_size": 32,
    "schedule.warmup_steps": 2,
}
HEAD_DIM = 8
VOCAB_SIZE = 512  # of a tokenizer that is trained
SEEDS = 2


def shrink_campaign(campaign: Campaign) -> Campaign:
    """The campaign with every size limited. Arms that differ only in a size may become equal."""
    limits = LIMITS | {"model.n_embd": _width(campaign)}
    base = override(campaign.base, _limited(_small_vocabulary(campaign.base), limits))
    return replace(campaign, base=base, phases=tuple(_shrunk_phase(phase, limits) for phase in campaign.phases))


def _width(campaign: Campaign) -> int:
    """A model width that every number of heads in the campaign divides into heads of even size."""
    arms = [arm for phase in campaign.phases for arm in (*phase.arms, *(phase.search.probes() if phase.search else ()))]
    given = [phase.pinned for phase in campaign.phases] + [arm.overrides for arm in arms]
    heads = {campaign.base.model.n_head} | {
        settings["model.n_head"] for settings in given if "model.n_head" in settings
    }
    common = math.lcm(*heads)
    return common * max(2, 2 * math.ceil(max(heads) * HEAD_DIM / common / 2))


def _small_vocabulary(base: TrainConfig) -> dict[str, Any]:
    kind, size = parse_spec(base.data.tokenizer)
    small = kind == "sentencepiece" and int(size) > VOCAB_SIZE
    return flatten(base) | ({"data.tokenizer": f"sentencepiece:{VOCAB_SIZE}"} if small else {})


def _shrunk_phase(phase: Phase, limits: Mapping[str, int]) -> Phase:
    """The phase with every size limited; a batch of random arms replaces a search."""
    arms = (*phase.arms, *(random_arms(phase.search)[: phase.search.parallel] if phase.search else ()))
    return replace(
        phase,
        search=None,
        pinned=_limited(phase.pinned, limits),
        arms=tuple(replace(arm, overrides=_limited(arm.overrides, limits)) for arm in arms),
        seeds=FreshSeeds(min(phase.seeds.n, SEEDS)) if isinstance(phase.seeds, FreshSeeds) else phase.seeds[:SEEDS],
    )


def _limited(settings: Mapping[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
    """The settings within their limits. The vocabulary is the tokenizer's, without the padding that a preset adds."""
    return {
        name: min(value, limits[name]) if name in limits and value is not None else value
        for name, value in settings.items()
    } | ({"model.vocab_size": None} if "model.vocab_size" in settings else {})
