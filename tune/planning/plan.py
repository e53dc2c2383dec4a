"""From phases to arms to trials: pure functions that know neither Ray nor the clock."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ngpt.config.base import ConfigError, content_hash, override, settings
from ngpt.data.dataset import fingerprint, order_settings
from ngpt.model.flops import flops_per_token
from ngpt.training.config import TrainConfig, resolved, rollback_settings
from tune.planning.combine import join_better_arms
from tune.planning.equal_time import step_time_key, steps_of_equal_time
from tune.planning.optuna_search import arm_score, propose_arms
from tune.spec.schema import Campaign, FreshSeeds, Phase
from tune.spec.search_space import random_arms
from tune.spec.sweeps import BASELINE, ArmSpec
from tune.storage.records import BetterArm, TrialOutcome

Overrides = Mapping[str, Any]
PhaseResult = tuple[str, Sequence[BetterArm]]  # of a phase: its winner, and the arms that were better
NOTHING: Mapping[str, Any] = {}


def unknown_outcome(trial_id: str) -> TrialOutcome:
    """Of a trial before the first one has run."""
    return TrialOutcome("missing")


@dataclass(frozen=True)
class PlannedTrial:
    """One arm with one seed: a complete config to be trained once."""

    trial_id: str
    phase: str
    arm: str
    seed: int
    overrides: Overrides  # relative to the campaign's base
    config: TrainConfig


@dataclass(frozen=True)
class PlannedArm:
    """One setting of what a phase varies, with a trial of each seed."""

    name: str
    overrides: Overrides  # relative to the phase's base
    trials: tuple[PlannedTrial, ...]


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
    def trials(self) -> Iterator[PlannedTrial]:
        """Seed by seed, so that every arm has a first result early."""
        for i in range(len(self.seeds)):
            for arm in self.arms:
                yield arm.trials[i]


def plan_phase(
    campaign: Campaign,
    phase: Phase,
    winners: Mapping[str, Overrides],
    better: Mapping[str, Sequence[BetterArm]] = NOTHING,
    outcome: Callable[[str], TrialOutcome] = unknown_outcome,
) -> PlannedPhase:
    """The trials of `phase`, given the overrides that the winners of the phases it needs stand for.

    A phase that combines others joins the arms that were `better` in them (tune/planning/combine.py). One that optuna searches
    has the arms proposed so far: the next batch when every trial of those before it has an `outcome`, by trial id.

    An arm that equals the baseline is the baseline: it is trained once, under the arm's name. A winner that an arm
    inherits comes on top of the phase's base, but for what the phase itself pins with `set:`.
    """
    campaign, winners = _as_held(campaign, phase), _with_chained(campaign, winners)
    return _planned(campaign, phase, winners, _arms(campaign, phase, winners, better, outcome))


def _as_held(campaign: Campaign, phase: Phase) -> Campaign:
    """The campaign with what this phase holds equal between its arms."""
    return replace(campaign, hold=phase.hold or campaign.hold)


def _arms(
    campaign: Campaign,
    phase: Phase,
    winners: Mapping[str, Overrides],
    better: Mapping[str, Sequence[BetterArm]],
    outcome: Callable[[str], TrialOutcome],
) -> Sequence[ArmSpec]:
    """The arms of a phase, as far as they are known, without the baseline."""
    if phase.search is None:
        found = [arm.without(phase.pinned) for name in phase.combine for arm in better[name]]
        reference = baseline_config(campaign, _inherited(phase, winners), phase.pinned)
        return [*phase.arms, *join_better_arms(found, lambda changes: _is_possible(campaign, reference, changes))]
    scores: list[float] = []
    while True:
        arms = propose_arms(phase.search, tuple(scores))
        new = [_score(campaign, phase, winners, arm, outcome) for arm in arms[len(scores) :]]
        if None in new or len(arms) == phase.search.trials:
            return arms
        scores += [score for score in new if score is not None]


def _score(
    campaign: Campaign,
    phase: Phase,
    winners: Mapping[str, Overrides],
    arm: ArmSpec,
    outcome: Callable[[str], TrialOutcome],
) -> float | None:
    """What optuna is told of an arm; None while one of its trials is not over."""
    alone = _planned(campaign, phase, winners, [arm]).arms[-1]
    outcomes = [outcome(trial.trial_id) for trial in alone.trials]
    if any(seen.status == "missing" for seen in outcomes):
        return None
    return arm_score([seen.value for seen in outcomes], campaign.metric.goal)


def _inherited(phase: Phase, winners: Mapping[str, Overrides]) -> dict[str, Any]:
    return dict(winners[phase.inherit]) if phase.inherit else {}


def _with_chained(campaign: Campaign, winners: Mapping[str, Overrides]) -> dict[str, Overrides]:
    """The winners, with those that the file takes from other results directories."""
    return dict(winners) | {path: winner.overrides for path, winner in campaign.inherited.items()}


def _planned(
    campaign: Campaign, phase: Phase, winners: Mapping[str, Overrides], found: Sequence[ArmSpec]
) -> PlannedPhase:
    """The trials of a phase whose arms are known."""
    inherited = _inherited(phase, winners)
    base = inherited | dict(phase.pinned)
    seeds = phase.seeds if isinstance(phase.seeds, tuple) else fresh_seeds(campaign, phase)
    reference = baseline_config(campaign, inherited, phase.pinned)
    whole = resolved(reference)
    arms = {whole: PlannedArm(BASELINE.name, {}, ())}
    for arm in found:
        winner = winners[arm.inherit] if arm.inherit else {}
        start = {name: value for name, value in winner.items() if name not in phase.pinned}
        changes = start | dict(arm.overrides)
        same_data = not any(name.startswith("data.") for name in changes)  # then the vocabulary is known
        config = arm_config(campaign, whole if same_data else reference, changes)
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

    With `hold: tokens` an inherited batch size or context does not change how many tokens are trained on, with `hold:
    seconds` an inherited setting that costs speed does not change for how long.
    """
    own = override(campaign.base, pinned)
    changes = {name: value for name, value in inherited.items() if name not in pinned}
    return _holding(campaign, own, changes)


def arm_config(campaign: Campaign, reference: TrainConfig, changes: Overrides) -> TrainConfig:
    """An arm's complete config: its phase's baseline `reference` with the arm's own changes and those it inherits.

    With `hold: tokens` its steps are such that it sees as many tokens as the baseline, with `hold: seconds` such that
    it trains for as long, by the speeds that the campaign knows (tune/planning/equal_time.py). An arm that changes `steps`
    itself, or inherits from a winner that did, gets just these: then tokens differ, and the summary warns of it.
    """
    return resolved(_holding(campaign, reference, changes))


def _holding(campaign: Campaign, reference: TrainConfig, changes: Overrides) -> TrainConfig:
    config = override(reference, changes)
    if campaign.hold == "steps" or "steps" in changes:
        return config
    if campaign.hold == "seconds":
        return override(config, {"steps": steps_of_equal_time(reference, config, campaign.speeds)})
    if config.tokens_per_step == reference.tokens_per_step:
        return config
    return override(config, {"steps": max(1, round(trial_tokens(reference) / config.tokens_per_step))})


def _is_possible(campaign: Campaign, reference: TrainConfig, changes: Overrides) -> bool:
    try:
        arm_config(campaign, reference, changes)
    except ConfigError:
        return False
    return True


def configs_to_time(campaign: Campaign, planned: PlannedPhase) -> dict[str, TrainConfig]:
    """The configs, by `step_time_key`, whose speeds `hold: seconds` needs for this phase and the campaign does not know."""
    own = resolved(override(campaign.base, planned.pinned))
    configs = [own, *(arm.trials[0].config for arm in planned.arms)]
    return {key: config for config in configs if (key := step_time_key(config)) not in campaign.speeds}


def trial_id(config: TrainConfig) -> str:
    """Depends on what is computed, the seed and the data's content only: the same on every machine, in any order.

    Where the data lie does not matter, so corpus, path and tokenizer enter through the fingerprint of their content.
    """
    return f"{_identity(config)}-s{config.seed}"


def _identity(config: TrainConfig) -> str:
    """What the ids of an arm's trials have in common."""
    data = {name for name in settings(TrainConfig) if name.startswith("data.")}
    extra = {"data": fingerprint(config.data)} | order_settings(config.data) | rollback_settings(config)
    return content_hash(config, leave_out=data | {"seed"}, extra=extra)


def fresh_seeds(campaign: Campaign, phase: Phase) -> tuple[int, ...]:
    """Seeds that no list and no other phase of the campaign has, whatever the order of the phases.

    Each phase takes the first unused ones from a number that its name gives; phases choose by the alphabet.
    """
    used = {seed for other in campaign.phases if isinstance(other.seeds, tuple) for seed in other.seeds}
    chosen: dict[str, tuple[int, ...]] = {}
    for other in sorted(campaign.phases, key=lambda other: other.name):
        if isinstance(other.seeds, FreshSeeds):
            start = 100 + zlib.crc32(other.name.encode()) % 900
            unused = (seed for seed in itertools.count(start) if seed not in used)
            chosen[other.name] = tuple(itertools.islice(unused, other.seeds.n))
            used.update(chosen[other.name])
    return chosen[phase.name]


def preview(
    campaign: Campaign,
    end: Callable[[PlannedPhase], PhaseResult | None] = lambda phase: None,
    outcome: Callable[[str], TrialOutcome] = unknown_outcome,
) -> list[PlannedPhase]:
    """All phases before they have run; where nobody knows the `end` of one, the first arm but the baseline has won.

    It is also the only one that was better. For arms that optuna has not proposed yet, arms drawn at random from the
    same space stand in.
    """
    winners = _with_chained(campaign, {})
    better: dict[str, Sequence[BetterArm]] = {}
    phases = []
    for phase in campaign.phases:
        held = _as_held(campaign, phase)
        arms = _arms(held, phase, winners, better, outcome)
        rest = random_arms(phase.search)[len(arms) :] if phase.search else []
        planned = _planned(held, phase, winners, [*arms, *rest])
        others = [arm for arm in planned.arms if arm.name != planned.baseline]
        guessed = [BetterArm(arm.name, arm.overrides, 0.0) for arm in others[:1]]
        winner, better[phase.name] = end(planned) or (others[0].name if others else planned.baseline, guessed)
        winners[phase.name] = inherited_overrides(planned, winner)
        phases.append(planned)
    return phases


def inherited_overrides(phase: PlannedPhase, winner: str) -> Overrides:
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
) -> Iterator[PlannedTrial]:
    identity, overrides = _identity(config), dict(base) | dict(arm.overrides)
    for seed in seeds:
        seeded = config.model_copy(update={"seed": seed})
        yield PlannedTrial(f"{identity}-s{seed}", phase.name, arm.name, seed, overrides, seeded)
