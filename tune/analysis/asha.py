"""ASHA: stops a trial of a search early if its metric is worse than that of earlier trials.

The rule is that of Ray Tune's `AsyncHyperBandScheduler` with one bracket (Li et al., A System for Massively Parallel
Hyperparameter Tuning, MLSys 2020, arXiv:1810.05934): a trial that reaches a rung is compared with those that reached it
before, and is stopped unless it is among the best 1/`reduction` of them, by percentile. The first trial at a rung
always continues. No trial waits for another, so which trials are stopped depends on the order in which they ran.
Decisions are journaled, so a resumed campaign keeps them.

A rung is a fraction of a trial's training, given in steps of the phase's baseline; a trial with a different number of
steps is judged at its first evaluation at or after that fraction. Trials are compared only with trials of the same
seed, because a seed shifts all arms. Once one trial of an arm is stopped, the arm cannot get a verdict, so its other
seeds are stopped or not started. The baseline is never stopped, nor is a trial that another phase needs in full.

An arm with a stopped trial has no verdict, since values at different steps are not comparable. The remaining arms were
selected by their results, so Holm's correction still counts all arms (tune/analysis/verdicts.py): a stopped arm is a
comparison that is not significant. This does not correct for a second effect: arms selected by luck are also more alike
than all arms were, so the noise is underestimated. In simulations without true effects, with one rung whose values
correlate 0.9 with the final ones, `reduction: 3` gives a false verdict in 2 % of phases with 20 or 60 arms x 3 seeds;
`reduction: 2` in 6 % with 60 x 3 and 11 % with 100 x 2. Fresh seeds are not affected by this selection.
"""

from collections.abc import Sequence
from typing import Any

from tune.spec.schema import EarlyStop
from tune.storage.journal import Event

RUNG_REACHED = "rung_reached"


class Asha:
    """The metric values and stop decisions at each rung of a campaign, rebuilt from journal events."""

    def __init__(self, rule: EarlyStop, *, metric: str, goal: str) -> None:
        self._rule, self._metric, self._sign = rule, metric, 1.0 if goal == "maximize" else -1.0
        self._values: dict[tuple[str, int, int], dict[str, float]] = {}  # by (phase, seed, rung), then by trial id
        self._stop_reasons: dict[tuple[str, str], tuple[str, str]] = {}  # trial id and reason, by (phase, arm)

    def apply(self, event: Event) -> None:
        """Updates the state with a journal event."""
        if event["event"] == RUNG_REACHED:
            rung = (event["phase"], event["seed"], event["rung"])
            self._values.setdefault(rung, {})[event["trial_id"]] = event["value"]
            if event["stops"]:
                self._stop_reasons.setdefault((event["phase"], event["arm"]), (event["trial_id"], event["why"]))
        elif event["event"] == "trials_discarded":
            self._forget(event["trial_ids"])

    def _forget(self, trial_ids: Sequence[str]) -> None:
        """Drops trials that are trained anew."""
        for values in self._values.values():
            for trial_id in trial_ids:
                values.pop(trial_id, None)
        reasons = self._stop_reasons.items()
        self._stop_reasons = {arm: reason for arm, reason in reasons if reason[0] not in trial_ids}

    def record_rung(
        self,
        *,
        trial_id: str,
        phase: str,
        arm: str,
        seed: int,
        step: int,
        total_steps: int,
        baseline_steps: int,
        value: float | None,
        may_stop: bool,
    ) -> dict[str, Any] | None:
        """Returns the fields of a `rung_reached` event, or None if the trial has reached no new rung.

        `baseline_steps` is the number of steps that rungs refer to, `total_steps` that of this trial. `value` is the
        metric at `step`; None means that the trial is diverging and needs no decision. If not `may_stop`, the trial
        always continues, and its value is only used to judge later trials.
        """
        passed = [rung for rung in self._rule.rungs(baseline_steps) if step * baseline_steps >= rung * total_steps]
        if not passed or value is None:
            return None
        earlier = self._values.get((phase, seed, passed[-1]), {})
        if trial_id in earlier:
            return None
        limit = cutoff([self._sign * other for other in earlier.values()], self._rule.reduction)
        stops = may_stop and limit is not None and self._sign * value < limit
        why = f"{self._metric} {value:.4f} at step {step} of {total_steps} is not among the best "
        why += f"1/{self._rule.reduction} of the {len(earlier)} trials of seed {seed} that reached it before"
        fields = {"trial_id": trial_id, "phase": phase, "arm": arm, "seed": seed, "rung": passed[-1], "step": step}
        return fields | {"value": value, "stops": stops, "why": why if stops else None}

    def stop_reason(self, phase: str, arm: str) -> str | None:
        """Why an arm was stopped; None if it was not."""
        return self._stop_reasons[phase, arm][1] if (phase, arm) in self._stop_reasons else None


def cutoff(rewards: Sequence[float], reduction: int) -> float | None:
    """The lowest reward (higher is better) that lets a trial continue; None if there are no earlier rewards."""
    import numpy as np

    return float(np.percentile(rewards, (1 - 1 / reduction) * 100)) if rewards else None
