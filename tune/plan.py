"""From phases to arms to trials: pure functions that know neither Ray nor the clock."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ngpt.config import content_hash, override, settings
from ngpt.data.corpora import fingerprint, order_settings
from ngpt.flops import flops_per_token
from ngpt.train import TrainConfig, resolved
from tune.arms import BASELINE
from tune.campaign import Campaign, Fresh, Phase

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One arm with one seed: a complete config to be trained once."""

    trial_id: str
    phase: str
    arm: str
    seed: int
    overrides: Overrides  # relative to the campaign's base
    config: TrainConfig


@dataclass(frozen=True)
class PlannedArm:
    name: str
    overrides: Overrides  # relative to the phase's base
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its base known: every trial of it, the baseline's first."""

    name: str
    inherit: str | None
    base: Overrides  # relative to the campaign's base, in force for all arms
    pinned: Overrides  # the part of `base` that is this phase's own (`set:`) and is not inherited
    baseline: str
    arms: tuple[PlannedArm, ...]
    seeds: tuple[int, ...]
    swept: Mapping[str, tuple[Any, ...]]

    @property
    def trials(self) -> Iterator[Trial]:
        """Seed by seed, so that every arm has a first result early."""
        for i in range(len(self.seeds)):
            for arm in self.arms:
                yield arm.trials[i]


def plan_phase(campaign: Campaign, phase: Phase, winners: Mapping[str, Overrides]) -> PlannedPhase:
    """The trials of `phase`, given the overrides that the winners of the phases it needs stand for.

    An arm that equals the baseline is the baseline: it is trained once, under the arm's name. A winner that an arm
    inherits comes on top of the phase's base, but for what the phase itself pins with `set:`.
    """
    inherited = dict(winners[phase.inherit]) if phase.inherit else {}
    base = inherited | dict(phase.pinned)
    seeds = phase.seeds if isinstance(phase.seeds, tuple) else fresh_seeds(campaign, phase)
    reference = baseline_config(campaign, inherited, phase.pinned)
    arms = {resolved(reference): PlannedArm(BASELINE.name, {}, ())}
    for arm in phase.arms:
        winner = winners[arm.inherit] if arm.inherit else {}
        start = {name: value for name, value in winner.items() if name not in phase.pinned}
        config = arm_config(campaign, reference, start | dict(arm.overrides))
        changed = {k: v for k, v in start.items() if k not in base or base[k] != v} | dict(arm.overrides)
        if config not in arms or (arms[config].name == BASELINE.name and not arm.inherit):
            arms[config] = PlannedArm(arm.name, changed, ())
    planned = [
        PlannedArm(arm.name, arm.overrides, tuple(_trials(phase, arm, base, config, seeds)))
        for config, arm in arms.items()
    ]
    return PlannedPhase(
        name=phase.name,
        inherit=phase.inherit,
        base=base,
        pinned=dict(phase.pinned),
        baseline=planned[0].name,
        arms=tuple(planned),
        seeds=seeds,
        swept=phase.swept,
    )


def baseline_config(campaign: Campaign, inherited: Overrides, pinned: Overrides) -> TrainConfig:
    """A phase's baseline: the campaign's base, what the winner before has changed, and what the phase pins.

    With `hold: tokens` an inherited batch size or context does not change how many tokens are trained on.
    """
    own = override(campaign.base, pinned)
    changes = {name: value for name, value in inherited.items() if name not in pinned}
    return _holding_tokens(campaign, own, changes)


def arm_config(campaign: Campaign, reference: TrainConfig, changes: Overrides) -> TrainConfig:
    """An arm's complete config: its phase's baseline `reference` with the arm's own changes and those it inherits.

    With `hold: tokens` its steps are such that it sees as many tokens as the baseline. An arm that changes `steps`
    itself, or inherits from a winner that did, gets just these: then tokens differ, and the summary warns of it.
    """
    return resolved(_holding_tokens(campaign, reference, changes))


def _holding_tokens(campaign: Campaign, reference: TrainConfig, changes: Overrides) -> TrainConfig:
    config = override(reference, changes)
    if campaign.hold != "tokens" or "steps" in changes or config.tokens_per_step == reference.tokens_per_step:
        return config
    return override(config, {"steps": max(1, round(trial_tokens(reference) / config.tokens_per_step))})


def trial_id(config: TrainConfig) -> str:
    """Depends on what is computed, the seed and the data's content only: the same on every machine, in any order.

    Where the data lie does not matter, so corpus, path and tokenizer enter through the fingerprint of their content.
    """
    data = {name for name in settings(TrainConfig) if name.startswith("data.")}
    extra = {"data": fingerprint(config.data)} | order_settings(config.data)
    return f"{content_hash(config, leave_out=data | {'seed'}, extra=extra)}-s{config.seed}"


def fresh_seeds(campaign: Campaign, phase: Phase) -> tuple[int, ...]:
    """Seeds that no list and no other phase of the campaign has, whatever the order of the phases.

    Each phase takes the first unused ones from a number that its name gives; phases choose by the alphabet.
    """
    used = {seed for other in campaign.phases if isinstance(other.seeds, tuple) for seed in other.seeds}
    chosen: dict[str, tuple[int, ...]] = {}
    for other in sorted(campaign.phases, key=lambda other: other.name):
        if isinstance(other.seeds, Fresh):
            start = 100 + zlib.crc32(other.name.encode()) % 900
            unused = (seed for seed in itertools.count(start) if seed not in used)
            chosen[other.name] = tuple(itertools.islice(unused, other.seeds.n))
            used.update(chosen[other.name])
    return chosen[phase.name]


def preview(
    campaign: Campaign, known_winner: Callable[[PlannedPhase], str | None] = lambda phase: None
) -> list[PlannedPhase]:
    """All phases before they have run; for a winner that is not known the first arm but the baseline stands in."""
    winners: dict[str, Overrides] = {}
    phases = []
    for phase in campaign.phases:
        planned = plan_phase(campaign, phase, winners)
        guess = next((arm.name for arm in planned.arms if arm.name != planned.baseline), planned.baseline)
        winners[phase.name] = inheritance(planned, known_winner(planned) or guess)
        phases.append(planned)
    return phases


def inheritance(phase: PlannedPhase, winner: str) -> Overrides:
    """What a later phase takes over from the arm `winner`: everything but what this phase pinned for itself."""
    arm = next(arm for arm in phase.arms if arm.name == winner)
    kept = {name: value for name, value in phase.base.items() if name not in phase.pinned}
    return kept | dict(arm.overrides)


def trial_tokens(config: TrainConfig) -> int:
    """Training tokens of one trial."""
    return config.steps * config.tokens_per_step


def trial_work(config: TrainConfig) -> float:
    """What a trial takes in training tokens, its evaluations included: they cost a third as much per token."""
    evaluations = 2 + (config.steps - 1) // config.eval_every
    return trial_tokens(config) + config.eval_tokens * evaluations / 3


def trial_flops(config: TrainConfig) -> float:
    """Arithmetic of one trial: training and evaluations."""
    return trial_work(config) * flops_per_token(config.model)


def _trials(
    phase: Phase, arm: PlannedArm, base: Overrides, config: TrainConfig, seeds: tuple[int, ...]
) -> Iterator[Trial]:
    for seed in seeds:
        seeded = config.model_copy(update={"seed": seed})
        yield Trial(trial_id(seeded), phase.name, arm.name, seed, dict(base) | dict(arm.overrides), seeded)
