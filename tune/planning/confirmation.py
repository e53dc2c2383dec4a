"""Chooses the arm of a search that is compared with the baseline again, on fresh seeds (tune/spec/confirmation.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

from tune.storage.records import BetterArm
from tune.storage.summaries import ArmSummary

NOT_JUDGED = ("diverged", "failed", "incomplete")


def best_arm(
    arms: Sequence[ArmSummary], overrides: Mapping[str, Mapping[str, Any]], *, winner: str, baseline: str
) -> BetterArm | None:
    """Returns the winner of a phase or, if the baseline stays, the arm with the best mean; `arms` are ranked.

    Few arms of a search are better than the baseline beyond the noise, and the confirmation is to find out. Returns
    None if no arm that finished all its seeds has a better mean than the baseline.
    """
    for arm in arms:
        if winner == baseline == arm.arm:
            return None
        if arm.arm == winner or (winner == baseline and arm.verdict not in NOT_JUDGED):
            return BetterArm(arm.arm, overrides[arm.arm], abs(arm.delta.mean) if arm.delta else 0.0)
    return None
