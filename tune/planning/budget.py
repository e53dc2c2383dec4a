"""`budget:` limits the number of trials that a campaign starts and the hours that it takes, over all sessions.

When the budget is reached, running trials finish and no new ones start; a larger budget continues the campaign. Every
trial ever started in the results directory counts, as does the total time of all sessions, including evaluations and
waiting.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tune.storage.state import CampaignState

if TYPE_CHECKING:  # it needs torch, and results are read without
    from tune.spec.schema import Budget

STOPPED_BY_BUDGET = "stopped by budget"


def budget_allows(budget: "Budget", state: CampaignState, trial_id: str, seconds: float) -> bool:
    """Whether a trial may start when all sessions have taken `seconds`. A trial that is retried counts once."""
    if budget.hours is not None and seconds >= budget.hours * 3600:
        return False
    return budget.trials is None or trial_id in state.attempts or len(state.attempts) < budget.trials


def describe_budget(budget: "Budget") -> str:
    """The budget as text, like `5 trials, 2 hours`; empty if there is none."""
    parts = {"trials": budget.trials, "hours": budget.hours}
    return ", ".join(f"{value:g} {name[:-1] if value == 1 else name}" for name, value in parts.items() if value)


def left_out_sentence(left_out: Mapping[str, int]) -> str:
    """A sentence with the number of trials per phase that the budget left out."""
    listed = ", ".join(f"{count} trial{'s' * (count != 1)} of {phase}" for phase, count in left_out.items())
    return f"the budget was reached: left out {listed}"
