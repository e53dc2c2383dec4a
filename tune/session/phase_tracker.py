"""Plans each phase once the winners it needs are known, and closes it once its trials are done."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ngpt.training.state import Metrics
from tune import format as fmt
from tune.analysis.asha import RUNG_REACHED, Asha
from tune.analysis.sequential import look_text
from tune.machine.throughput import measure_for_equal_time
from tune.planning.confirmation import best_arm
from tune.planning.equal_time import step_time_key
from tune.planning.forecast import (
    expected_phases,
    expected_stages,
    has_result,
    lacks_scores,
    phase_planned_event,
    stops_early,
    with_shifts_of,
)
from tune.planning.plan import (
    PlannedPhase,
    PlannedTrial,
    configs_to_time,
    inherited_overrides,
    plan_phase,
    seeds_to_confirm,
    unknown_outcome,
)
from tune.results.answer import settings_text
from tune.results.summary import write_phase
from tune.session.datasets import check_not_edited
from tune.session.fresh_seeds import SeedAllocator
from tune.session.trial_queue import TrialQueue
from tune.spec.schema import Campaign, Phase
from tune.storage.journal import Event
from tune.storage.records import BetterArm, FreshDraw, TrialOutcome
from tune.storage.state import CampaignState
from tune.storage.summaries import PhaseSummary


class PhaseTracker:
    """Tracks planned and closed phases of a campaign. Nothing is planned before the first `advance`.

    When a phase is planned, its trials are added to `queue`; when it is closed, its files are written into `root`.
    `append` journals an event and applies it to `state` and to this tracker. `message` prints one line for the user.
    `timer` measures training speed for `hold: seconds`; the new speeds are then part of `campaign`.
    """

    def __init__(
        self,
        campaign: Campaign,
        root: Path,
        state: CampaignState,
        queue: TrialQueue,
        *,
        append: Callable[..., None],
        message: Callable[[str], None],
        timer: Callable[..., Any],
    ) -> None:
        self.campaign = replace(with_shifts_of(campaign, state), speeds=state.speeds)
        self.planned: dict[str, PlannedPhase] = {}
        self.summaries: dict[str, PhaseSummary] = {}
        self.unusable: frozenset[str] = frozenset()  # trials of other code, to train anew if a phase needs them
        self._root, self._state, self._queue = root, state, queue
        self._append, self._message, self._timer = append, message, timer
        self._seeds = SeedAllocator(root, state, message=message)
        self._draws: dict[tuple[str, str], FreshDraw] = {}  # of this session; the journal has those of earlier ones
        rule, metric = campaign.early_stop, campaign.metric
        self._asha = Asha(rule, metric=metric.name, goal=metric.goal) if rule else None

    def apply(self, event: Event) -> None:
        """Applies a journal event that `state` has already applied."""
        if self._asha:
            self._asha.apply(event)

    def advance(self) -> None:
        """Closes phases whose trials are all done and plans those whose winners are known, until nothing changes."""
        has_changed = False
        while self._advance_once():
            has_changed = True
        if not has_changed:
            return
        open_phases = (phase for phase in self.campaign.phases if phase.name not in self.summaries)
        is_planned = all(phase.name in self.planned and not phase.search for phase in open_phases)
        stages = [] if is_planned else expected_stages(self.campaign, self._state)
        if stages != self._state.expected_stages:
            self._append("trials_expected", stages=stages)

    def has_all_winners(self) -> bool:
        """Returns whether every phase is closed."""
        phases = self._state.phases
        return len(phases) == len(self.campaign.phases) and all(phase.winner for phase in phases.values())

    def missing_trials(self) -> dict[str, str]:
        """Returns the first phase that needs each trial still to be trained, by trial id, given the known winners."""
        missing: dict[str, str] = {}
        for phase in expected_phases(self.campaign, self._state):
            for trial in phase.trials:
                if not has_result(self.campaign, self._state, phase.name, trial.trial_id):
                    missing.setdefault(trial.trial_id, phase.name)
        return missing

    def report_rung(self, trial: PlannedTrial, metrics: Metrics) -> None:
        """Journals the early-stopping rung that a trial has reached with this evaluation, if any."""
        if self._asha is None or not stops_early(self.campaign, trial.phase):
            return
        phase = self.planned[trial.phase]
        baseline_steps = next(arm.trials[0].config.steps for arm in phase.arms if arm.name == phase.baseline)
        reached = self._asha.record_rung(
            **trial.identity,
            step=int(metrics["steps"] or 0),
            total_steps=trial.config.steps,
            baseline_steps=baseline_steps,
            value=metrics.get(self.campaign.metric.name),
            may_stop=self._may_stop(trial),
        )
        if reached:
            self._append(RUNG_REACHED, **reached)

    @property
    def stops_trials(self) -> bool:
        """Whether a phase of the campaign may stop trials early."""
        return self._asha is not None

    def stop_reason(self, trial: PlannedTrial) -> str | None:
        """Returns why early stopping ends a trial, or None if it does not."""
        dropped = self._asha and self._asha.stop_reason(trial.phase, trial.arm)
        return f"its arm fell behind: {dropped}" if dropped and self._may_stop(trial) else None

    def _may_stop(self, trial: PlannedTrial) -> bool:
        """Returns False for trials of the baseline, and for those that a phase without early stopping also needs."""
        if not stops_early(self.campaign, trial.phase) or trial.arm == self.planned[trial.phase].baseline:
            return False
        full_phases = (phase for phase in self.planned.values() if not stops_early(self.campaign, phase.name))
        return not any(other.trial_id == trial.trial_id for phase in full_phases for other in phase.trials)

    def _advance_once(self) -> bool:
        has_changed = False
        for phase in self.campaign.phases:
            if phase.name not in self.planned and phase.needs <= self._winners().keys():
                self._plan(phase)
                has_changed = True
            planned = self.planned.get(phase.name)
            if planned is None or phase.name in self.summaries:
                continue
            if self._has_ended(planned):
                if self._has_more(phase, planned):
                    self._plan(phase)
                else:
                    self._close(planned)
                has_changed = True
        return has_changed

    def _has_ended(self, phase: PlannedPhase) -> bool:
        """Returns whether all planned trials have results. Looks at the last ones first, since they end last."""
        trials = (trial for arm in reversed(phase.arms) for trial in reversed(arm.trials))
        return all(self._is_settled(phase.name, trial.trial_id) for trial in trials)

    def _has_more(self, phase: Phase, planned: PlannedPhase) -> bool:
        """Returns whether the results lead to another batch of arms, or to a look at the arms."""
        if not phase.search and planned.most_seeds is None:
            return False
        expanded = self._expand(phase)
        return len(expanded.arms) > len(planned.arms) or len(expanded.looks) > len(planned.looks)

    def _plan(self, phase: Phase) -> None:
        check_not_edited(self.campaign.base.data, self._state.campaign["data"])
        if phase.confirms:
            searched = self._state.phases[phase.confirms]
            phase = seeds_to_confirm(phase, searched.best, searched.seeds)
        planned = self._expand(phase)
        if (phase.hold or self.campaign.hold) == "seconds":
            self._measure_speeds(planned)
            planned = self._expand(phase)
            for arm in planned.arms:
                config = arm.trials[0].config
                speed = fmt.count(self.campaign.speeds[step_time_key(config)])
                text = f"{arm.name} trains {speed} tokens/s, so it gets {config.steps} steps"
                self._message(f"phase {phase.name}: {text}")
        seen = ()
        if phase.known_seeds is None:
            draw = self._seeds.draw(self.campaign, phase, planned, self.summaries)
            self._draws[phase.name, draw.content] = draw
            planned = self._expand(phase)
        else:
            seen = self._seeds.record_listed(self.campaign, phase, planned)
        self._discard_unusable(planned)
        self.planned[phase.name] = planned
        self._append("phase_planned", **phase_planned_event(planned), seen=list(seen))
        trials = list(planned.trials)
        queued = self._queue.unfinished
        missing = [t for t in trials if t.trial_id not in queued and not self._is_settled(phase.name, t.trial_id)]
        self._queue.add(missing)
        if planned.looks:
            self._message(f"phase {phase.name}: {look_text(planned.looks[-1])}")
            return
        size = f"{fmt.counted(len(planned.arms), 'arm')} x {fmt.counted(len(planned.seeds), 'seed')}"
        base = f" on {settings_text(planned.base)}" if planned.base else ""
        done = f", {len(trials) - len(missing)} of them already done" if len(missing) < len(trials) else ""
        most = f", at most {planned.most_trials}, decided after each round" if planned.most_seeds else ""
        self._message(f"phase {phase.name}: {size} = {fmt.counted(len(trials), 'trial')}{most}{base}{done}")

    def _expand(self, phase: Phase) -> PlannedPhase:
        better = {name: done.better for name, done in self._state.phases.items() if done.winner}
        record = self._state.searches.get(phase.name)
        draws = {**self._state.draws, **self._draws}
        options = {"record": record, "best": self._state.phases[phase.confirms].best if phase.confirms else None}
        return plan_phase(self.campaign, phase, self._winners(), better, self._outcome, draws, **options)

    def _outcome(self, trial_id: str) -> TrialOutcome:
        """The outcome of a trial; those of other code do not count before they are trained anew."""
        return unknown_outcome(trial_id) if trial_id in self.unusable else self._state.outcome(trial_id)

    def _discard_unusable(self, planned: PlannedPhase) -> None:
        """Discards trials of other code that nobody knew this phase would need."""
        needed = [trial.trial_id for trial in planned.trials if trial.trial_id in self.unusable]
        self.unusable -= frozenset(needed)
        if needed:
            self._append("trials_discarded", trial_ids=needed, reason="their code has changed")
            self._message(
                f"phase {planned.name}: other code trained {fmt.counted(len(needed), 'trial')} of it; trained anew"
            )

    def _measure_speeds(self, phase: PlannedPhase) -> None:
        if missing := configs_to_time(self.campaign, phase):
            count = fmt.counted(len(missing), "combination")
            self._message(f"phase {phase.name}: timing {count} of model, batch size and optimizer")
            speeds = measure_for_equal_time(self.campaign.base, missing, self.campaign.speeds, self._timer)
            self._append("speeds_measured", phase=phase.name, speeds=speeds)
            self.campaign = replace(self.campaign, speeds=self._state.speeds)

    def _is_settled(self, phase: str, trial_id: str) -> bool:
        """Returns whether a trial has a result; `stopped` counts only if the phase uses early stopping."""
        result = self._state.results.get(trial_id)
        is_done = result is not None and (result["status"] != "stopped" or stops_early(self.campaign, phase))
        return is_done and not lacks_scores(self.campaign, self._state, phase, trial_id)

    def awaits_evaluation(self, trial_id: str) -> bool:
        """Returns whether a planned phase needs the scores of a trial that is trained."""
        return any(
            lacks_scores(self.campaign, self._state, name, trial_id)
            for name, phase in self.planned.items()
            if any(trial.trial_id == trial_id for trial in phase.trials)
        )

    def _close(self, phase: PlannedPhase) -> None:
        summary = write_phase(self._root, self._state, self._state.phases[phase.name])
        assert summary.winner is not None, "all trials of the phase have ended"
        self.summaries[phase.name] = summary
        sign = 1 if self.campaign.metric.goal == "maximize" else -1
        deltas = [(arm, arm.delta) for arm in summary.arms if arm.verdict == "better"]
        better = [asdict(BetterArm(arm.arm, arm.overrides, sign * delta.mean)) for arm, delta in deltas if delta]
        overrides = {arm.arm: arm.overrides for arm in summary.arms}
        best = best_arm(summary.arms, overrides, winner=summary.winner, baseline=phase.baseline)
        is_confirmed = phase.name in {other.confirms for other in self.campaign.phases}  # `--smoke` has no searches
        needs_best = phase.question or is_confirmed or phase.hands_on_best
        result = {
            "winner": summary.winner,
            "winner_overrides": dict(inherited_overrides(phase, summary.handed_on or summary.winner)),
            "best": asdict(best) if best and needs_best else None,
        }
        self._append("phase_finished", phase=phase.name, **result, better=better, why=summary.why)
        self._message(f"phase {phase.name}: {summary.why}")

    def _winners(self) -> dict[str, Mapping[str, Any]]:
        return {name: phase.winner_overrides for name, phase in self._state.phases.items() if phase.winner}
