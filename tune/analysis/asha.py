"""Early stopping: which trials of a search go on, and which end before all their steps, by what they reached so far.

ASHA (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, arXiv:1810.05934) by the rule of Ray
Tune's `AsyncHyperBandScheduler` with one bracket: at each rung a trial is held against those that came there before it
and is stopped unless it is among the best 1/`reduction` of them, by percentile. The first at a rung goes on. Nobody
waits for anybody, so which trials are stopped depends on the order in which they ran; what was decided is in the
journal, and stays when a campaign is resumed.

A rung is a share of a trial's training, given in steps of its phase's baseline; a trial with another number of steps is
looked at in its first evaluation at that share or after it. Trials of one seed are held against each other, since what
a seed does to all arms alike says nothing about an arm. An arm that lost a trial is out: it cannot be judged any more,
so its other seeds are stopped, too, or never begun. The baseline is never stopped, and neither is a trial that a phase
without early stopping needs.

What it means for the verdicts: an arm with a stopped trial has none, since values at different steps do not compare.
The arms that are left were chosen by the results, so Holm's correction still counts all of them (tune/analysis/verdicts.py):
a stopped arm is a comparison that was made, and not significant. What it cannot correct is that arms which passed by
luck are also more alike than all were, so that the noise looks smaller. Simulated without any effects, one rung whose
values correlate 0.9 with the last ones: 2 % of phases err with 20 or 60 arms x 3 seeds and `reduction: 3`; with 2, it
is 6 % of 60 x 3 and 11 % of 100 x 2. What fresh seeds measure is not chosen by such luck.
"""

from collections.abc import Sequence
from typing import Any

from tune.spec.schema import EarlyStop
from tune.storage.journal import Event

RUNG_REACHED = "rung_reached"


class Asha:
    """What the trials of a campaign had reached at each rung, and what was decided there: a fold over the journal."""

    def __init__(self, rule: EarlyStop, *, metric: str, goal: str) -> None:
        self._rule, self._metric, self._sign = rule, metric, 1.0 if goal == "maximize" else -1.0
        self._values: dict[tuple[str, int, int], dict[str, float]] = {}  # by phase, seed and rung; by trial
        self._out: dict[tuple[str, str], str] = {}  # why, by phase and arm

    def apply(self, event: Event) -> None:
        """Takes an event of the journal into account."""
        if event["event"] == RUNG_REACHED:
            rung = (event["phase"], event["seed"], event["rung"])
            self._values.setdefault(rung, {})[event["trial_id"]] = event["value"]
            if event["stops"]:
                self._out.setdefault((event["phase"], event["arm"]), event["why"])

    def record_rung(
        self,
        *,
        trial_id: str,
        phase: str,
        arm: str,
        seed: int,
        step: int,
        share: tuple[int, int],
        value: float | None,
        may_stop: bool,
    ) -> dict[str, Any] | None:
        """The event of a trial that has come to a rung, for the journal; None if it has come to none that is new.

        Args:
            trial_id, phase, arm, seed: of the trial.
            step: that it has reached.
            share: all steps of the trial, and all of its phase's baseline: what a rung is scaled by.
            value: of the metric at this step; a trial without one is diverging and ends by itself.
            may_stop: whether it can be stopped, or only counts.
        """
        own, baseline = share
        passed = [rung for rung in self._rule.rungs(baseline) if step * baseline >= rung * own]
        if not passed or value is None:
            return None
        before = self._values.get((phase, seed, passed[-1]), {})
        if trial_id in before:
            return None
        limit = cutoff([self._sign * other for other in before.values()], self._rule.reduction)
        stops = may_stop and limit is not None and self._sign * value < limit
        why = f"{self._metric} {value:.4f} at step {step} of {own} is not among the best 1/{self._rule.reduction} of "
        why += f"the {len(before)} trials of seed {seed} that came there before"
        place = {"trial_id": trial_id, "phase": phase, "arm": arm, "seed": seed, "rung": passed[-1], "step": step}
        return place | {"value": value, "stops": stops, "why": why if stops else None}

    def stop_reason(self, phase: str, arm: str) -> str | None:
        """Why an arm has no trial any more that goes on, or None."""
        return self._out.get((phase, arm))


def cutoff(rewards: Sequence[float], reduction: int) -> float | None:
    """What a trial must reach at a rung where others had these rewards (more is better); None for the first one."""
    import numpy as np

    return float(np.percentile(rewards, (1 - 1 / reduction) * 100)) if rewards else None
