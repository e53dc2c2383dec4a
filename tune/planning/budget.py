"""`budget:`: how many trials a campaign may start, and how many hours it may take, over all its sessions.

At the budget, running trials are finished and no new one starts; a larger budget continues. All trials that were ever
started in the results directory count, and the whole time of all sessions, evaluations and waiting included.
"""

from collections.abc import Mapping

from tune.spec.schema import Budget
from tune.storage.state import CampaignState

STOPPED_BY_BUDGET = "stopped by budget"


def budget_allows(budget: Budget, state: CampaignState, trial_id: str, seconds: float) -> bool:
    """Whether a trial may start after `seconds` of all sessions. A trial that is started again counts once."""
    if budget.hours is not None and seconds >= budget.hours * 3600:
        return False
    return budget.trials is None or trial_id in state.attempts or len(state.attempts) < budget.trials


def describe_budget(budget: Budget) -> str:
    """The budget as text, like `5 trials, 2 hours`; empty without a budget."""
    parts = {"trials": budget.trials, "hours": budget.hours}
    return ", ".join(f"{value:g} {name[:-1] if value == 1 else name}" for name, value in parts.items() if value)


def left_out_sentence(left_out: Mapping[str, int]) -> str:
    """The number of trials per phase that a budget left out, as a sentence."""
    listed = ", ".join(f"{count} trial{'s' * (count != 1)} of {phase}" for phase, count in left_out.items())
    return f"the budget was reached: left out {listed}"
