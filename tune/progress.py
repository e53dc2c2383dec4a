"""A plan in the light of the journal: what of it is known by now, and how a planned phase is written into it."""

from typing import Any

from tune.campaign import Campaign
from tune.plan import PlannedPhase, preview
from tune.state import State


def planned_event(phase: PlannedPhase) -> dict[str, Any]:
    """The fields of `phase_planned`."""
    return {
        "phase": phase.name,
        "inherit": phase.inherit,
        "base": dict(phase.base),
        "baseline": phase.baseline,
        "seeds": list(phase.seeds),
        "swept": {name: list(values) for name, values in phase.swept.items()},
        "arms": [
            {
                "arm": arm.name,
                "overrides": dict(arm.overrides),
                "trials": [[trial.seed, trial.trial_id] for trial in arm.trials],
            }
            for arm in phase.arms
        ],
    }


def past_winner(state: State, phase: PlannedPhase) -> str | None:
    """The arm that has won the phase already, if it is still the same phase."""
    past = state.phases.get(phase.name)
    same = past and set(past.trial_ids) == {trial.trial_id for trial in phase.trials}
    return past.winner if past and same and past.winner in [arm.name for arm in phase.arms] else None


def expected_phases(campaign: Campaign, state: State) -> list[PlannedPhase]:
    """All phases as they are planned from what the journal knows; see `preview` for what it does not know."""
    return preview(
        campaign,
        known_winner=lambda phase: past_winner(state, phase),
        known_better=lambda phase: state.phases[phase.name].better,
        outcome=state.outcome,
    )
