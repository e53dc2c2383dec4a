"""Plans a campaign using the results in its journal: known winners, and trials still to be planned."""

from collections import Counter, defaultdict
from dataclasses import asdict, replace
from typing import Any

from ngpt.training.config import TrainConfig
from tune.analysis.readings import NoisePrior
from tune.analysis.sequential import judge_by_looks
from tune.planning.confirmation import best_arm
from tune.planning.equal_time import step_time_key
from tune.planning.optuna_search import optuna_version
from tune.planning.plan import PhaseResult, PlannedPhase, preview, trial_flops, trial_work
from tune.spec.inherited_seeds import keep_shift
from tune.spec.schema import Campaign
from tune.storage.records import BetterArm, SearchRecord, TrialWork
from tune.storage.state import DONE, CampaignState
from tune.storage.summaries import to_json


def phase_planned_event(phase: PlannedPhase) -> dict[str, Any]:
    """The fields of a `phase_planned` event."""
    return {
        "phase": phase.name,
        "inherit": phase.inherit,
        "base": dict(phase.base),
        "baseline": phase.baseline,
        "seeds": list(phase.seeds),
        "fresh": _draw_fields(phase) if phase.fresh else None,
        "swept": {name: list(values) for name, values in phase.swept.items()},
        "search": _search_record(phase),
        "confirms": phase.confirms,
        "hands_on_best": phase.hands_on_best,
        **({"most_seeds": phase.most_seeds, "looks": to_json(phase.looks)} if phase.most_seeds else {}),
        "arms": [
            {
                "arm": arm.name,
                "overrides": dict(arm.overrides),
                "trials": [[trial.seed, trial.trial_id] for trial in arm.trials],
                "work": asdict(_work(arm.trials[0].config)),
                **({"sources": list(arm.sources)} if arm.sources else {}),
            }
            for arm in phase.arms
        ],
    }


def _search_record(phase: PlannedPhase) -> dict[str, Any] | None:
    """The question of a search and, for optuna, the fields of a `SearchRecord`; None if the file lists the arms."""
    if phase.question is None or phase.proposed is None:
        return None if phase.question is None else {"question": dict(phase.question)}
    return asdict(SearchRecord([dict(arm) for arm in phase.proposed], dict(phase.question), optuna_version()))


def _draw_fields(phase: PlannedPhase) -> dict[str, Any]:
    """The fields of a draw, without its seeds if the event has them anyway; a phase in rounds has not used all yet."""
    assert phase.fresh is not None
    is_known = phase.most_seeds is None
    return {name: value for name, value in asdict(phase.fresh).items() if name != "seeds" or not is_known}


def _work(config: TrainConfig) -> TrialWork:
    return TrialWork(step_time_key(config), trial_work(config), trial_flops(config))


def has_result(campaign: Campaign, state: CampaignState, phase: str, trial_id: str) -> bool:
    """Whether a trial has a result that counts in a phase. Stopped trials only count in phases with early stopping."""
    status = state.results[trial_id]["status"] if trial_id in state.results else None
    is_done = status in DONE and (status != "stopped" or stops_early(campaign, phase))
    return is_done and not lacks_scores(campaign, state, phase, trial_id)


def lacks_scores(campaign: Campaign, state: CampaignState, phase: str, trial_id: str) -> bool:
    """Whether a trained trial is still to be evaluated for a phase; no, if this session has tried in vain."""
    result, evaluation = state.results.get(trial_id), campaign.evaluation
    if evaluation is None or not evaluation.asks(phase) or result is None or result["status"] != "finished":
        return False
    about = result["provenance"].get("evaluation") or {}
    return trial_id not in state.unscored and ("error" in about or about.get("asked") != evaluation.asked())


def stops_early(campaign: Campaign, phase: str) -> bool:
    """Whether a phase uses early stopping."""
    return campaign.early_stop is not None and next(p.stops_early for p in campaign.phases if p.name == phase)


def known_result(campaign: Campaign, state: CampaignState, phase: PlannedPhase) -> PhaseResult | None:
    """Judges a phase by the rules in the current campaign file; None while some of its trials have no result."""
    if not all(has_result(campaign, state, phase.name, trial.trial_id) for trial in phase.trials):
        return None
    name, overrides = campaign.metric.name, {arm.name: arm.overrides for arm in phase.arms}
    judgement = judge_by_looks(
        {arm.name: {trial.seed: state.outcome(trial.trial_id, name) for trial in arm.trials} for arm in phase.arms},
        phase.looks,
        baseline=phase.baseline,
        goal="maximize" if campaign.metric.goal == "maximize" else "minimize",
        confidence=(phase.fresh and phase.fresh.confidence) or campaign.confidence,
        min_effect=campaign.min_effect,
        prior=NoisePrior(*phase.fresh.prior) if phase.fresh and phase.fresh.prior else None,
    )
    deltas = {arm.arm: arm.delta for arm in judgement.arms if arm.verdict == "better"}
    better = [BetterArm(arm, overrides[arm], abs(delta.mean)) for arm, delta in deltas.items() if delta]
    best = best_arm(judgement.arms, overrides, winner=judgement.winner, baseline=phase.baseline)
    return PhaseResult(judgement.winner, better, best)


def expected_phases(campaign: Campaign, state: CampaignState) -> list[PlannedPhase]:
    """Plans all phases, using the results in the journal.

    If the winner of a phase is not known, the winner in the journal is assumed if the phase still has that arm, since
    adding a seed rarely changes it. Otherwise the winner is guessed (see `preview`).
    """

    def result(phase: PlannedPhase) -> PhaseResult | None:
        return known_result(campaign, state, phase) or _last_result(state, phase)

    return preview(with_shifts_of(campaign, state), result, state.outcome, state.searches, state.draws)


def with_shifts_of(campaign: Campaign, state: CampaignState) -> Campaign:
    """The campaign with the seeds that this results directory gave to phases without `seeds:`; see `keep_shift`."""
    phases = (keep_shift(phase, state.last_seeds.get(phase.name, ())) for phase in campaign.phases)
    return replace(campaign, phases=tuple(phases))


def _last_result(state: CampaignState, phase: PlannedPhase) -> PhaseResult | None:
    """The last result of the phase in the journal, without arms that it no longer has; None if the winner is gone."""
    last, arms = state.phases.get(phase.name), {arm.name: arm.overrides for arm in phase.arms}
    if last is None or last.winner not in arms:
        return None
    better = [replace(arm, overrides=arms[arm.arm]) for arm in last.better if arm.arm in arms]
    best = last.best if last.best and last.best.arm in arms else next(iter(better), None)
    return PhaseResult(last.winner, better, best)


def expected_stages(campaign: Campaign, state: CampaignState) -> list[list[dict[str, Any]]]:
    """For each stage, the number of trials still to be planned and their compute cost, by phase and kind of trial.

    The first stage has the arms that optuna has yet to propose in planned phases; each later stage needs winners of the
    stage before it. A trial that several phases share counts once.
    """
    seen = {trial_id for phase in state.phases.values() for trial_id in phase.trial_ids}
    needs = {phase.name: phase.needs for phase in campaign.phases}
    decided = {phase.name for phase in state.phases.values() if phase.winner is not None}
    stage_of: dict[str, int] = {}
    stages: defaultdict[int, Counter[tuple[str, TrialWork]]] = defaultdict(Counter)
    for phase in expected_phases(campaign, state):
        stage_of[phase.name] = max((stage_of[name] + 1 for name in needs[phase.name] - decided), default=0)
        for arm in phase.arms:
            ids = {trial.trial_id for trial in arm.trials} - seen
            if new := {trial_id for trial_id in ids if not has_result(campaign, state, phase.name, trial_id)}:
                seen |= new
                stages[stage_of[phase.name]][phase.name, _work(arm.trials[0].config)] += len(new)
    rows = [counts.items() for _, counts in sorted(stages.items())]
    return [[{"phase": name, "trials": n, "work": asdict(work)} for (name, work), n in row] for row in rows]
