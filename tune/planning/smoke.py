"""`--smoke`: shrinks a campaign to a tiny model, few steps and two seeds, to check in a minute that it runs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ngpt.config.base import flatten, override
from ngpt.data.tokens.tokenizer import parse_spec
from tune.spec.schema import Campaign, FreshSeeds, Phase, SeedRule, UntilDecided
from tune.spec.search_space import random_arms

# Smaller values in a campaign are kept.
MAX_VALUES = {
    "steps": 8,
    "batch_size": 4,
    "micro_batch_size": 1,  # divides every batch size
    "eval_every": 4,
    "eval_tokens": 256,
    "model.n_layer": 2,
    "model.block_size": 32,
    "schedule.warmup_steps": 2,
}
HEAD_DIM = 8
MAX_VOCAB_SIZE = 512  # of a trained tokenizer
MAX_SEEDS = 2
MAX_EXAMPLES = 12  # of a downstream task; more than those that CORE shows before each one


def shrink_campaign(campaign: Campaign) -> Campaign:
    """Limits every size in the campaign. Arms that differ only in a size may become equal."""
    limits = MAX_VALUES | {"model.n_embd": _width(campaign)}
    kind, size = parse_spec(campaign.base.data.tokenizer)
    needs_smaller_vocab = kind == "sentencepiece" and int(size) > MAX_VOCAB_SIZE
    settings = flatten(campaign.base)
    if needs_smaller_vocab:
        settings["data.tokenizer"] = f"sentencepiece:{MAX_VOCAB_SIZE}"
    base = override(campaign.base, _limited(settings, limits))
    phases = tuple(_shrunk_phase(phase, limits) for phase in campaign.phases)
    evaluation = campaign.evaluation
    if evaluation is not None:
        limit = min(evaluation.limit or MAX_EXAMPLES, MAX_EXAMPLES)
        evaluation = evaluation.model_copy(update={"limit": limit})
    return replace(campaign, base=base, phases=phases, evaluation=evaluation, smoke=True)


def _width(campaign: Campaign) -> int:
    """A model width that gives an even head size for every number of heads in the campaign."""
    arms = [arm for phase in campaign.phases for arm in (*phase.arms, *(phase.search.probes() if phase.search else ()))]
    settings = [flatten(campaign.base), *(p.pinned for p in campaign.phases), *(arm.overrides for arm in arms)]
    heads = {values["model.n_head"] for values in settings if "model.n_head" in values}
    common = math.lcm(*heads)
    return common * max(2, 2 * math.ceil(max(heads) * HEAD_DIM / common / 2))


def _shrunk_phase(phase: Phase, limits: Mapping[str, int]) -> Phase:
    """Limits every size in the phase; replaces a search by one batch of random arms."""
    arms = (*phase.arms, *(random_arms(phase.search)[: phase.search.parallel] if phase.search else ()))
    return replace(
        phase,
        search=None,
        question=None,
        pinned=_limited(phase.pinned, limits),
        arms=tuple(replace(arm, overrides=_limited(arm.overrides, limits)) for arm in arms),
        seeds=_fewer_seeds(phase.seeds),
    )


def _fewer_seeds(seeds: SeedRule) -> SeedRule:
    if isinstance(seeds, UntilDecided):  # one round
        return replace(seeds, start=min(seeds.start, MAX_SEEDS), most=min(seeds.most, MAX_SEEDS))
    return FreshSeeds(min(seeds.most, MAX_SEEDS)) if isinstance(seeds, FreshSeeds) else seeds[:MAX_SEEDS]


def _limited(settings: Mapping[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
    """Caps settings at their limits. The vocabulary size becomes the tokenizer's, without padding by a preset."""
    limited = {n: min(x, limits[n]) if n in limits and x is not None else x for n, x in settings.items()}
    return limited | ({"model.vocab_size": None} if "model.vocab_size" in settings else {})
