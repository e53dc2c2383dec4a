"""`--smoke`: shrinks a campaign to a tiny model, few steps and two seeds, to test in a minute that its file runs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ngpt.config.base import flatten, override
from ngpt.data.tokens.tokenizer import parse_spec
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
    kind, size = parse_spec(campaign.base.data.tokenizer)
    small = kind == "sentencepiece" and int(size) > VOCAB_SIZE
    settings = flatten(campaign.base) | ({"data.tokenizer": f"sentencepiece:{VOCAB_SIZE}"} if small else {})
    base = override(campaign.base, _limited(settings, limits))
    return replace(campaign, base=base, phases=tuple(_shrunk_phase(phase, limits) for phase in campaign.phases))


def _width(campaign: Campaign) -> int:
    """A model width that every number of heads in the campaign divides into heads of even size."""
    arms = [arm for phase in campaign.phases for arm in (*phase.arms, *(phase.search.probes() if phase.search else ()))]
    given = [flatten(campaign.base), *(p.pinned for p in campaign.phases), *(arm.overrides for arm in arms)]
    heads = {settings["model.n_head"] for settings in given if "model.n_head" in settings}
    common = math.lcm(*heads)
    return common * max(2, 2 * math.ceil(max(heads) * HEAD_DIM / common / 2))


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
    limited = {n: min(x, limits[n]) if n in limits and x is not None else x for n, x in settings.items()}
    return limited | ({"model.vocab_size": None} if "model.vocab_size" in settings else {})
