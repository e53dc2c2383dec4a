"""`budget:` how many trials a campaign may begin, and for how long it may go on, over all its sessions.

A budget that is reached ends a campaign without a loss: no new trial begins, those that train are finished, and the
status is `stopped by budget`. The same command with a larger budget goes on. What counts is in the journal: trials that
were ever begun here, and the time of all sessions from their start to their end, evaluations and waiting included.
"""

from collections.abc import Mapping

from tune.spec.schema import Budget
from tune.storage.state import CampaignState

STOPPED_BY_BUDGET = "stopped by budget"


def budget_allows(budget: Budget, state: CampaignState, trial_id: str, seconds: float) -> bool:
    """Whether a trial may begin, or go on, after `seconds` of all sessions. One that was begun before counts once."""
    if budget.hours is not None and seconds >= budget.hours * 3600:
        return False
    return budget.trials is None or trial_id in state.attempts or len(state.attempts) < budget.trials


def describe_budget(budget: Budget) -> str:
    """`5 trials, 2 hours`; empty without a budget."""
    parts = {"trials": budget.trials, "hours": budget.hours}
    return ", ".join(f"{value:g} {name[:-1] if value == 1 else name}" for name, value in parts.items() if value)


def left_out_sentence(left_out: Mapping[str, int]) -> str:
    """What a budget has left undone, by phase."""
    listed = ", ".join(f"{count} trial{'s' * (count != 1)} of {phase}" for phase, count in left_out.items())
    return f"the budget was reached: left out {listed}"
