"""Chooses the seeds of phases: fresh ones that nobody has looked at, and how many; counts confirmations.

A *family* is what must share a seed for its trials to be alike: the contents of the corpus, the size of the model, and
whether it is an nGPT or a GPT. Within a family no seed is fresh twice.

A *question* is the metric and the baseline of a phase that confirms a winner. Who edits a campaign and confirms again
asks the same question again, and will be told `better` in the end by chance. So the confirmations of a question are
counted, and each is tested at a level of its own: `level_of_look`, an alpha-spending rule (Foster and Stine 2008; Tian
and Ramdas 2021). `python -m tune.bench confirmations` simulates such loops.
"""

import hashlib
import itertools
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ngpt.config.base import override
from ngpt.data.dataset import fingerprint
from tune import format as fmt
from tune.spec.schema import FEWEST_FRESH, MOST_FRESH, Campaign, Phase, UntilDecided
from tune.storage.records import FreshDraw
from tune.storage.seed_ledger import plan_content

SEED_RANGE = (100_000, 1_000_000)  # of fresh seeds; listed seeds are usually smaller
FAMILY_SETTINGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # of `model:`


def seed_family(campaign: Campaign, phase: Phase) -> str:
    """A digest of the corpus and the recipe of a phase, without what it inherits or varies."""
    config = override(campaign.base, phase.pinned)
    kind = "GPT" if config.model.residual == "add" else "nGPT"
    sizes = [getattr(config.model, name) for name in FAMILY_SETTINGS]
    return _digest([fingerprint(config.data), kind, *sizes])


def seed_question(campaign: Campaign, baseline: str) -> str:
    """A digest of what a confirmation asks: the metric, and the baseline by its trial id without the seed."""
    return _digest([campaign.metric.name, campaign.metric.goal, baseline])


def level_of_look(alpha: float, look: int) -> float:
    """The level at which the `look`-th confirmation of a question is tested: alpha, then alpha / (look (look - 1)).

    A false confirmation is a false `better`, and half of the level is on that side. The levels add up to 2 alpha, so
    any number of confirmations has a false one with probability alpha at most.
    """
    return alpha if look < 2 else alpha / (look * (look - 1))


def draw_seeds(content: str, n: int, taken: Collection[int]) -> tuple[int, ...]:
    """Draws `n` seeds that are not `taken` from the hash `content`; the same arguments give the same seeds."""
    low, high = SEED_RANGE
    used, seeds = set(taken), list[int]()
    for i in itertools.count():
        if len(seeds) == n:
            return tuple(seeds)
        number = int.from_bytes(hashlib.sha256(f"{content}:{i}".encode()).digest()[:8])
        seed = low + number % ((high - low) * (1 + i // 100_000))  # a wider range if most seeds are taken
        if seed not in used:
            used.add(seed)
            seeds.append(seed)
    raise AssertionError("unreachable")


def phase_seeds(campaign: Campaign, phase: Phase) -> tuple[int, ...]:
    """The seeds of a phase, in the order in which they are used; provisional ones if they are fresh.

    Provisional seeds stand in until the phase is planned and its seeds are drawn. No other phase has them.
    """
    if phase.known_seeds is not None:
        return phase.known_seeds
    used = {seed for other in campaign.phases for seed in other.known_seeds or ()}
    chosen: dict[str, tuple[int, ...]] = {}
    for other in sorted(campaign.phases, key=lambda other: other.name):
        if other.known_seeds is None:
            start = 100 + zlib.crc32(other.name.encode()) % 900
            unused = (seed for seed in itertools.count(start) if seed not in used)
            chosen[other.name] = tuple(itertools.islice(unused, number_of_fresh(other) or FEWEST_FRESH))
            used.update(chosen[other.name])
    return chosen[phase.name]


def number_of_fresh(phase: Phase) -> int | None:
    """How many fresh seeds the phase asks for; None if that depends on the effect that was found."""
    assert not isinstance(phase.seeds, tuple)
    return phase.seeds.most if isinstance(phase.seeds, UntilDecided) else phase.seeds.n


def describe_seeds(phase: Phase, seeds: Sequence[int], *, is_drawn: bool) -> str:
    """The seeds of a phase as text for a plan; fresh seeds are not known before they are drawn."""
    if phase.known_seeds is not None or is_drawn:
        return fmt.listing(map(str, seeds), most=6)
    n = number_of_fresh(phase)
    return f"{n or f'{FEWEST_FRESH} to {MOST_FRESH}'} fresh ones, drawn when the phase starts"


def find_draw(
    draws: Mapping[tuple[str, str], FreshDraw], campaign: Campaign, phase: str, content: str
) -> FreshDraw | None:
    """The seeds drawn earlier for this content in this results directory; None if there are none.

    `draws` are by phase and content. A phase may have been renamed since.
    """
    if (phase, content) in draws:
        return draws[phase, content]
    names = {phase.name for phase in campaign.phases}
    return next((draw for (name, other), draw in draws.items() if other == content and name not in names), None)


def content_of(phase: Phase, identities: Sequence[str]) -> str:
    """The digest of what a phase with fresh seeds trains; `identities` of its arms, baseline first.

    The arms of an optuna search are known batch by batch, so the search itself stands for them.
    """
    n = number_of_fresh(phase)
    if phase.search is None:
        return plan_content(identities, n)
    space = [(d.setting, d.kind, d.values) for d in phase.search.space]
    search = (phase.search.method, phase.search.trials, phase.search.seed, space)
    return plan_content([identities[0], repr(search)], n)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
