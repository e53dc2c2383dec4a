"""Plans the arms and trials of each phase of a campaign. All functions are pure."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from ngpt.config.base import ConfigError, content_hash, override, settings
from ngpt.data.dataset import fingerprint, order_settings
from ngpt.model.flops import flops_per_token
from ngpt.training.config import LOCATIONS, TrainConfig, resolved, rollback_settings
from tune.analysis.readings import NoisePrior
from tune.analysis.sequential import SequentialRule, replay_looks
from tune.planning.combine import join_better_arms
from tune.planning.equal_time import step_time_key, steps_of_equal_time
from tune.planning.optuna_search import arm_score, propose_arms, reusable_arms
from tune.planning.seeds import content_of, find_draw, phase_seeds
from tune.spec.schema import Campaign, Phase, UntilDecided
from tune.spec.search_space import random_arms
from tune.spec.sweeps import BASELINE, ArmSpec
from tune.storage.records import BetterArm, FreshDraw, Look, SearchRecord, TrialOutcome
from tune.storage.state import Overrides

NOTHING: Mapping[str, Any] = {}
NO_DRAWS: Mapping[tuple[str, str], FreshDraw] = {}


class PhaseResult(NamedTuple):
    """The winner of a phase, its arms with the verdict `better`, and the best arm (see `best_arm`)."""

    winner: str
    better: Sequence[BetterArm]
    best: BetterArm | None = None


def unknown_outcome(trial_id: str) -> TrialOutcome:
    """The outcome of every trial before a campaign has run."""
    return TrialOutcome("missing")


@dataclass(frozen=True)
class PlannedTrial:
    """One arm with one seed: a complete config to train once."""

    trial_id: str
    phase: str
    arm: str
    seed: int
    overrides: Overrides  # relative to the campaign's base
    config: TrainConfig

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that identify the trial in the journal."""
        return {"trial_id": self.trial_id, "phase": self.phase, "arm": self.arm, "seed": self.seed}


@dataclass(frozen=True)
class PlannedArm:
    """One variant of a phase, with a trial for each seed."""

    name: str
    overrides: Overrides  # relative to the phase's base
    trials: tuple[PlannedTrial, ...]
    sources: tuple[str, ...] = ()  # the phases whose winners, or better arms, it has beyond the phase's base


@dataclass(frozen=True)
class PlannedPhase:
    """A phase whose base is known, with all its arms, baseline first."""

    name: str
    inherit: str | None
    base: Overrides  # of all arms, relative to the campaign's base
    pinned: Overrides  # the part of `base` that this phase sets itself (`set:`)
    baseline: str
    arms: tuple[PlannedArm, ...]
    seeds: tuple[int, ...]
    swept: Mapping[str, tuple[Any, ...]]
    question: Mapping[str, Any] | None = None  # of its search, see `Search.question`
    confirms: str | None = None  # the search phase whose best arm it compares again
    proposed: tuple[Overrides, ...] | None = None  # by optuna so far, in order; None if the file determines the arms
    fresh: FreshDraw | None = None  # how `seeds: fresh` was drawn; None for other phases and before the draw
    most_seeds: int | None = None  # the largest number of seeds of an arm, with `until: decided`
    looks: tuple[Look, ...] = ()  # with `until: decided`: one after each complete round of seeds
    hands_on_best: bool = False  # see `Phase.hands_on_best`

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The settings that tell its trials from those of the campaign's base, by dotted name."""
        space = (self.question or {}).get("space", {})  # of a search, whose arms are not all known yet
        return tuple(dict.fromkeys([*self.base, *space, *(name for arm in self.arms for name in arm.overrides)]))

    @property
    def identities(self) -> list[str]:
        """What each arm computes: its trial ids without the seed, baseline first."""
        return [arm.trials[0].trial_id.rpartition("-s")[0] for arm in self.arms]

    @property
    def trials(self) -> Iterator[PlannedTrial]:
        """All trials, seed by seed, so that every arm gets a first result early."""
        for i in range(len(self.seeds)):
            for arm in self.arms:
                yield from arm.trials[i : i + 1]

    @property
    def most_trials(self) -> int:
        """The number of trials if no arm is decided before its seeds are used up."""
        if self.most_seeds is None:
            return sum(len(arm.trials) for arm in self.arms)
        runs_on = [arm.name for arm in self.arms] if not self.looks else self.looks[-1].runs_on
        return sum(self.most_seeds if arm.name in runs_on else len(arm.trials) for arm in self.arms)

    @property
    def later_trials(self) -> int:
        """The number of trials of rounds that are not planned yet, if no arm is decided early."""
        return self.most_trials - sum(len(arm.trials) for arm in self.arms)


def plan_phase(
    campaign: Campaign,
    phase: Phase,
    winners: Mapping[str, Overrides],
    better: Mapping[str, Sequence[BetterArm]] = NOTHING,
    outcome: Callable[[str], TrialOutcome] = unknown_outcome,
    draws: Mapping[tuple[str, str], FreshDraw] = NO_DRAWS,
    *,
    record: SearchRecord | None = None,
    best: BetterArm | None = None,
    fill: bool = False,
) -> PlannedPhase:
    """Plans the trials of `phase`.

    An arm that equals the baseline replaces it and keeps the name of the arm. If an arm inherits a winner of its own,
    the winner's overrides are applied to the phase's base, except for settings that the phase pins with `set:`.

    Args:
        winners: overrides of the winners of the phases that this one needs.
        better: arms with the verdict `better`, by phase; a combining phase joins them (tune/planning/combine.py).
        outcome: maps a trial id to its outcome. Optuna proposes the next batch once all earlier trials have one, and
            `until: decided` gives the next seeds.
        draws: the seeds drawn for phases with `seeds: fresh`, by phase and content; without one, they are provisional.
        record: what the journal says of the phase's search. Arms that optuna has proposed are kept.
        best: the arm that the phase confirms, if it is a confirmation (see `seeds_to_confirm`).
        fill: adds random arms in place of those that optuna has not proposed yet.
    """
    campaign = replace(campaign, hold=phase.hold or campaign.hold)
    winners = {**winners, **{path: winner.overrides for path, winner in campaign.inherited.items()}}
    rest: dict[str, Any] = {"winners": winners, "better": better, "outcome": outcome, "record": record, "fill": fill}
    rest |= {"best": best}
    planned = _plan_with_seeds(campaign, phase.with_seeds(phase_seeds(campaign, phase)), **rest)
    if phase.known_seeds is None:
        draw = find_draw(draws, campaign, phase.name, content_of(phase, planned.identities))
        if draw is not None:
            planned = replace(_plan_with_seeds(campaign, phase.with_seeds(draw.seeds), **rest), fresh=draw)
    if isinstance(phase.seeds, UntilDecided):
        return _rounds_so_far(campaign, phase.seeds, planned, outcome)
    return planned


def seeds_to_confirm(phase: Phase, best: BetterArm | None, searched: Sequence[int]) -> Phase:
    """The phase, with a single seed of those that were `searched` if it has nothing to confirm.

    It then has the baseline alone, whose trial is done already.
    """
    return phase if phase.confirms is None or best else phase.with_seeds(tuple(searched[:1]))


def _plan_with_seeds(
    campaign: Campaign,
    phase: Phase,
    *,
    winners: Mapping[str, Overrides],
    better: Mapping[str, Sequence[BetterArm]],
    outcome: Callable[[str], TrialOutcome],
    record: SearchRecord | None,
    best: BetterArm | None,
    fill: bool,
) -> PlannedPhase:
    """Plans the trials of a phase whose seeds and winners are known."""
    if phase.confirms is not None:
        specs = [ArmSpec(best.arm, best.overrides, sources=(phase.confirms,))] if best else []
        return replace(_plan_arms(campaign, phase, winners, specs), confirms=phase.confirms)
    if phase.search is None:
        to_join = [arm.without(phase.pinned) for name in phase.combine for arm in better[name]]
        baseline = baseline_config(campaign, winners[phase.inherit] if phase.inherit else {}, phase.pinned)

        def is_valid(changes: Overrides) -> bool:
            with contextlib.suppress(ConfigError):
                return bool(arm_config(campaign, baseline, changes))
            return False

        joined = [
            replace(arm, sources=_joined_phases(arm, phase, better)) for arm in join_better_arms(to_join, is_valid)
        ]
        return _plan_arms(campaign, phase, winners, [*phase.arms, *joined])
    given = reusable_arms(phase.search, record)
    if record is None or record.question is not None:
        return _plan_search(campaign, phase, winners, outcome, given, fill=fill)
    # An older journal lacks arms that equal an earlier one, so the replay is more exact if it gives the same arms.
    planned = _plan_search(campaign, phase, winners, outcome, (), fill=fill)
    if {phase.search.arm(values).name for values in given} <= {arm.name for arm in planned.arms}:
        return planned
    return _plan_search(campaign, phase, winners, outcome, given, fill=fill)


def _joined_phases(arm: ArmSpec, phase: Phase, better: Mapping[str, Sequence[BetterArm]]) -> tuple[str, ...]:
    """The phases that a combining phase took the arm's settings from."""
    settings = arm.overrides.items()
    parts = {name: [each.without(phase.pinned).overrides for each in better[name]] for name in phase.combine}
    return tuple(name for name in parts if any(part and part.items() <= settings for part in parts[name]))


def _plan_search(
    campaign: Campaign,
    phase: Phase,
    winners: Mapping[str, Overrides],
    outcome: Callable[[str], TrialOutcome],
    given: tuple[tuple[Any, ...], ...],
    *,
    fill: bool,
) -> PlannedPhase:
    """Plans a phase whose arms optuna proposes; `given` are the values of those that it has proposed already."""
    search = phase.search
    assert search is not None
    scores: list[float] = []
    while True:
        arms = propose_arms(search, tuple(scores), given)
        planned = [_plan_arms(campaign, phase, winners, [arm]).arms[-1] for arm in arms[len(scores) :]]
        outcomes = [[outcome(trial.trial_id) for trial in arm.trials] for arm in planned]
        if len(arms) == search.trials or any(result.status == "missing" for row in outcomes for result in row):
            proposed = tuple(arm.overrides for arm in arms)
            rest = random_arms(search)[len(arms) :] if fill else []
            return replace(_plan_arms(campaign, phase, winners, [*arms, *rest]), proposed=proposed)
        scores += [arm_score([result.value for result in row], campaign.metric.goal) for row in outcomes]


def _plan_arms(
    campaign: Campaign, phase: Phase, winners: Mapping[str, Overrides], specs: Sequence[ArmSpec]
) -> PlannedPhase:
    """Plans the trials of the baseline and of the arms `specs`."""
    inherited = dict(winners[phase.inherit]) if phase.inherit else {}
    base = inherited | dict(phase.pinned)
    seeds = phase.known_seeds
    assert seeds is not None, "fresh seeds are resolved before"
    baseline = baseline_config(campaign, inherited, phase.pinned)
    resolved_baseline = resolved(baseline)
    arms = {resolved_baseline: PlannedArm(BASELINE.name, {}, ())}
    for arm in specs:
        winner = winners[arm.inherit] if arm.inherit else {}
        inherited_by_arm = {name: value for name, value in winner.items() if name not in phase.pinned}
        changes = inherited_by_arm | dict(arm.overrides)
        # With a vocabulary or initial weights of its own, which are to be filled in.
        is_resolved = not any(name.startswith(("data.", "init_")) for name in changes)
        config = arm_config(campaign, resolved_baseline if is_resolved else baseline, changes)
        new = {k: v for k, v in inherited_by_arm.items() if k not in base or base[k] != v}
        if config not in arms or (arms[config].name == BASELINE.name and not arm.inherit):
            sources = (arm.inherit,) if arm.inherit else arm.sources
            arms[config] = PlannedArm(arm.name, new | dict(arm.overrides), (), sources)
    planned = []
    for config, arm in arms.items():
        overrides = base | dict(arm.overrides)
        trials = [
            PlannedTrial(name, phase.name, arm.name, seed, overrides, config.model_copy(update={"seed": seed}))
            for name, seed in zip(trial_ids(config, seeds), seeds, strict=True)
        ]
        planned.append(replace(arm, trials=tuple(trials)))
    pinned, baseline_name = dict(phase.pinned), planned[0].name
    asked = (phase.inherit, base, pinned, baseline_name, tuple(planned), seeds, phase.swept, phase.question)
    return PlannedPhase(phase.name, *asked, hands_on_best=phase.hands_on_best)


def _rounds_so_far(
    campaign: Campaign, seeds: UntilDecided, full: PlannedPhase, outcome: Callable[[str], TrialOutcome]
) -> PlannedPhase:
    """The rounds of seeds that the outcomes allow; `full` has all seeds for every arm."""
    draw = full.fresh
    rule = SequentialRule(
        seeds.start,
        seeds.most,
        (draw and draw.confidence) or campaign.confidence,
        campaign.min_effect,
        goal="maximize" if campaign.metric.goal == "maximize" else "minimize",
        prior=NoisePrior(*draw.prior) if draw and draw.prior else None,
    )
    ids = {arm.name: [trial.trial_id for trial in arm.trials] for arm in full.arms}
    looks, n_seeds = replay_looks(ids, full.seeds, full.baseline, rule, outcome)
    arms = tuple(replace(arm, trials=arm.trials[: n_seeds[arm.name]]) for arm in full.arms)
    used = full.seeds[: max(n_seeds.values())]
    return replace(full, arms=arms, seeds=used, most_seeds=seeds.most, looks=tuple(looks))


def baseline_config(campaign: Campaign, inherited: Overrides, pinned: Overrides) -> TrainConfig:
    """A phase's baseline: the campaign's base with the inherited winner's overrides and the settings the phase pins.

    Inherited settings do not change what `hold:` keeps equal (steps, tokens or seconds).
    """
    changes = {name: value for name, value in inherited.items() if name not in pinned}
    return _hold_equal(campaign, override(campaign.base, pinned), changes)


def arm_config(campaign: Campaign, baseline: TrainConfig, changes: Overrides) -> TrainConfig:
    """An arm's complete config: `baseline` with the arm's own and inherited overrides.

    Its steps follow from `hold:`, unless the overrides set `steps`. Then its tokens differ from those of other arms,
    and the summary warns about it.
    """
    return resolved(_hold_equal(campaign, baseline, changes))


def _hold_equal(campaign: Campaign, baseline: TrainConfig, changes: Overrides) -> TrainConfig:
    config = override(baseline, changes)
    if campaign.hold == "steps" or "steps" in changes:
        return config
    if campaign.hold == "seconds":
        return override(config, {"steps": steps_of_equal_time(baseline, config, campaign.speeds)})
    if config.tokens_per_step == baseline.tokens_per_step:
        return config
    return override(config, {"steps": max(1, round(trial_tokens(baseline) / config.tokens_per_step))})


def configs_to_time(campaign: Campaign, planned: PlannedPhase) -> dict[str, TrainConfig]:
    """The configs whose speeds `hold: seconds` needs in this phase and does not know yet, by `step_time_key`."""
    own = resolved(override(campaign.base, planned.pinned))
    configs = [own, *(arm.trials[0].config for arm in planned.arms)]
    return {key: config for config in configs if (key := step_time_key(config)) not in campaign.speeds}


def trial_ids(config: TrainConfig, seeds: Iterable[int]) -> list[str]:
    """The trial id for each seed: a hash of the settings that affect the result, and of the contents of the data.

    Corpus and tokenizer enter as a hash of their contents, so ids do not depend on paths, machine or the YAML's order.
    """
    data = {name for name in settings(TrainConfig) if name.startswith("data.")}
    extra = {"data": fingerprint(config.data)} | order_settings(config.data) | rollback_settings(config)
    identity = content_hash(config, leave_out=data | {"seed", *LOCATIONS}, extra=extra)
    return [f"{identity}-s{seed}" for seed in seeds]


def preview(
    campaign: Campaign,
    result: Callable[[PlannedPhase], PhaseResult | None] = lambda phase: None,
    outcome: Callable[[str], TrialOutcome] = unknown_outcome,
    records: Mapping[str, SearchRecord] | None = None,
    draws: Mapping[tuple[str, str], FreshDraw] = NO_DRAWS,
) -> list[PlannedPhase]:
    """Plans all phases, also those whose earlier phases have no result yet.

    If the `result` of a phase is None, its first arm after the baseline is assumed to be the winner and the only better
    arm. Arms that optuna has not proposed yet are replaced by random arms from the same space; `records` are what the
    journal says of each search.
    """
    winners: dict[str, Overrides] = {}
    better: dict[str, Sequence[BetterArm]] = {}
    best: dict[str | None, BetterArm | None] = {}
    phases = []
    for phase in campaign.phases:
        record = (records or {}).get(phase.name)
        chosen = best.get(phase.confirms)
        phase = seeds_to_confirm(phase, chosen, next((p.seeds for p in phases if p.name == phase.confirms), ()))
        planned = plan_phase(campaign, phase, winners, better, outcome, draws, record=record, best=chosen, fill=True)
        guess = [BetterArm(arm.name, arm.overrides, 0.0) for arm in planned.arms[1:2]]  # the baseline comes first
        guessed = PhaseResult(guess[0].arm if guess else planned.baseline, guess, next(iter(guess), None))
        winner, better[phase.name], best[phase.name] = result(planned) or guessed
        first = best[phase.name] if phase.hands_on_best else None
        winners[phase.name] = inherited_overrides(planned, first.arm if first else winner)
        phases.append(planned)
    return phases


def inherited_overrides(phase: PlannedPhase, winner: str) -> Overrides:
    """The overrides that a later phase inherits from the arm `winner`, without those that this phase pins."""
    arm = next(arm for arm in phase.arms if arm.name == winner)
    unpinned = {name: value for name, value in phase.base.items() if name not in phase.pinned}
    return unpinned | dict(arm.overrides)


def trial_tokens(config: TrainConfig) -> int:
    """Training tokens of one trial."""
    return config.steps * config.tokens_per_step


def trial_work(config: TrainConfig) -> float:
    """The cost of a trial in training tokens; an evaluation token counts as a third of a training token."""
    evaluations = 2 + (config.steps - 1) // config.eval_every
    return trial_tokens(config) + config.eval_tokens * evaluations / 3


def trial_flops(config: TrainConfig) -> float:
    """FLOPs of one trial, including evaluations."""
    return trial_work(config) * flops_per_token(config.model)
