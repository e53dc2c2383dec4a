"""The phases of a campaign on their way: each is planned once the winners that it needs are known, and closed when all
its trials are over. It knows the plan, the journal and the verdicts; tune/session/session.py hands the trials out.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ngpt.training.state import Metrics
from tune import format as fmt
from tune.analysis.asha import RUNG_REACHED, Asha
from tune.planning.equal_time import measure, pace_key
from tune.planning.forecast import expected_stages, phase_planned_event, stops_early
from tune.planning.plan import PlannedPhase, PlannedTrial, configs_to_time, inherited_overrides, plan_phase
from tune.results.summary import Summary, settings_text, write_phase
from tune.spec.schema import Campaign, Phase
from tune.storage.journal import Event
from tune.storage.records import BetterArm
from tune.storage.state import CampaignState


class PhaseTracker:
    """What is planned, what waits or trains, and what is known of the phases that are over."""

    def __init__(
        self,
        campaign: Campaign,
        root: Path,
        *,
        append: Callable[..., None],
        message: Callable[[str], None],
        timer: Callable[..., Any],
    ) -> None:
        """Nothing is planned before `advance`.

        Args:
            campaign: what to run; replaced by one that knows more speeds when these are measured.
            root: the results directory, for the files of each phase that is over.
            append: writes an event of this name with these fields into the journal, and applies it to `state` and here.
            message: says a line to people.
            timer: times training steps, for `hold: seconds`.
        """
        self.campaign, self._root = campaign, root
        self._append, self._message, self._timer = append, message, timer
        self.state = CampaignState()
        self.planned: dict[str, PlannedPhase] = {}
        self.summaries: dict[str, Summary] = {}  # of the phases that are over
        self.queue: deque[PlannedTrial] = deque()
        self.trials: dict[str, PlannedTrial] = {}  # queued or running, by id
        self._asha: Asha | None = None  # of early stopping, where the campaign has it

    def resume(self, state: CampaignState, events: Iterable[Event]) -> None:
        """Takes over what a journal says: its state, the speeds that were measured, the rungs that were reached."""
        self.state, self.campaign = state, replace(self.campaign, speeds=state.speeds)
        if rule := self.campaign.early_stop:
            self._asha = Asha(rule, metric=self.campaign.metric.name, goal=self.campaign.metric.goal)
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Takes an event of the journal into account, once `state` has."""
        if self._asha:
            self._asha.apply(event)

    def advance(self) -> None:
        """Closes phases whose trials are all done and plans those that have become possible, until neither happens."""
        moved = False
        while self._moves():
            moved = True
        if moved and (stages := self._to_come()) != self.state.expected_stages:
            self._append("trials_expected", stages=stages)

    def _moves(self) -> bool:
        moved = False
        for phase in self.campaign.phases:
            if phase.name not in self.planned and phase.needs <= self._winners().keys():
                self._plan(phase)
                moved = True
            planned = self.planned.get(phase.name)
            if planned and phase.name not in self.summaries and self._is_complete(planned):
                if phase.search and len(self._expanded(phase).arms) > len(planned.arms):
                    self._plan(phase)  # the next batch
                else:
                    self._close(planned)
                moved = True
        return moved

    def _to_come(self) -> list[list[dict[str, Any]]]:
        """What is expected besides what is planned; nothing is computed where that is nothing."""
        known = {phase.name for phase in self.campaign.phases if phase.name in self.planned and not phase.search}
        is_whole = len(known | self.summaries.keys()) == len(self.campaign.phases)
        return [] if is_whole else expected_stages(self.campaign, self.state)

    def has_all_winners(self) -> bool:
        """Whether every phase is over."""
        return len(self.state.phases) == len(self.campaign.phases) and all(
            phase.winner for phase in self.state.phases.values()
        )

    def is_settled(self, phase: str, trial_id: str) -> bool:
        """Whether a trial has a result that counts in a phase: one that was stopped early does where that is done."""
        result = self.state.results.get(trial_id)
        return result is not None and (result["status"] != "stopped" or stops_early(self.campaign, phase))

    def report_rung(self, trial: PlannedTrial, metrics: Metrics) -> None:
        """Journals the rung that a trial has come to by an evaluation, if it has come to one."""
        if self._asha is None or not stops_early(self.campaign, trial.phase):
            return
        phase = self.planned[trial.phase]
        steps = next(arm.trials[0].config.steps for arm in phase.arms if arm.name == phase.baseline)
        reached = self._asha.record_rung(
            trial_id=trial.trial_id,
            phase=trial.phase,
            arm=trial.arm,
            seed=trial.seed,
            step=int(metrics["steps"] or 0),
            share=(trial.config.steps, steps),
            value=metrics.get(self.campaign.metric.name),
            may_stop=self._may_stop(trial),
        )
        if reached:
            self._append(RUNG_REACHED, **reached)

    def stop_reason(self, trial: PlannedTrial) -> str | None:
        """Why early stopping ends a trial; None if it goes on."""
        dropped = self._asha and self._asha.stop_reason(trial.phase, trial.arm)
        return f"its arm fell behind: {dropped}" if dropped and self._may_stop(trial) else None

    def _may_stop(self, trial: PlannedTrial) -> bool:
        """Whether early stopping may end a trial: not the yardstick, and nothing that another phase must have."""
        if not stops_early(self.campaign, trial.phase) or trial.arm == self.planned[trial.phase].baseline:
            return False
        others = (phase for phase in self.planned.values() if not stops_early(self.campaign, phase.name))
        return not any(other.trial_id == trial.trial_id for phase in others for other in phase.trials)

    def _plan(self, phase: Phase) -> None:
        planned = self._expanded(phase)
        if (phase.hold or self.campaign.hold) == "seconds":
            self._measure_speeds(planned)
            planned = self._expanded(phase)
            self._say_steps(planned)
        self.planned[phase.name] = planned
        self._append("phase_planned", **phase_planned_event(planned))
        ids = self.trials.keys()
        missing = [t for t in planned.trials if t.trial_id not in ids and not self.is_settled(phase.name, t.trial_id)]
        self.trials |= {trial.trial_id: trial for trial in missing}
        self.queue.extend(missing)
        n = len(list(planned.trials))
        size = f"{fmt.counted(len(planned.arms), 'arm')} x {fmt.counted(len(planned.seeds), 'seed')}"
        base = f" on {settings_text(planned.base)}" if planned.base else ""
        reused = f", {n - len(missing)} of them known already" if len(missing) < n else ""
        self._message(f"phase {phase.name}: {size} = {fmt.counted(n, 'trial')}{base}{reused}")

    def _expanded(self, phase: Phase) -> PlannedPhase:
        better = {name: done.better for name, done in self.state.phases.items() if done.winner}
        return plan_phase(self.campaign, phase, self._winners(), better, self.state.outcome)

    def _measure_speeds(self, phase: PlannedPhase) -> None:
        """Times what was never timed, and keeps it for good."""
        if missing := configs_to_time(self.campaign, phase):
            self._message(
                f"phase {phase.name}: timing {fmt.counted(len(missing), 'shape')} of model, batch and optimizer"
            )
            speeds = measure(self.campaign.base, missing, self.campaign.speeds, self._timer)
            self._append("speeds_measured", phase=phase.name, speeds=speeds)
            self.campaign = replace(self.campaign, speeds=self.state.speeds)

    def _say_steps(self, phase: PlannedPhase) -> None:
        for arm in phase.arms:
            config = arm.trials[0].config
            speed = fmt.count(self.campaign.speeds[pace_key(config)])
            self._message(f"phase {phase.name}: {arm.name} trains {speed} tokens/s, so it gets {config.steps} steps")

    def _is_complete(self, phase: PlannedPhase) -> bool:
        return all(self.is_settled(phase.name, trial.trial_id) for trial in phase.trials)

    def _close(self, phase: PlannedPhase) -> None:
        summary = write_phase(self._root, self.state, self.state.phases[phase.name])
        self.summaries[phase.name] = summary
        self._append(
            "phase_finished",
            phase=phase.name,
            winner=summary["winner"],
            winner_overrides=dict(inherited_overrides(phase, summary["winner"])),
            better=self._better(summary),
            why=summary["why"],
        )
        self._message(f"phase {phase.name}: {summary['why']}")

    def _better(self, summary: Summary) -> list[dict[str, Any]]:
        """The arms of a phase that are better than its baseline, for phases that combine them."""
        sign = 1 if self.campaign.metric.goal == "maximize" else -1
        arms = [arm for arm in summary["arms"] if arm["verdict"] == "better"]
        return [asdict(BetterArm(arm["arm"], arm["overrides"], sign * arm["delta"]["mean"])) for arm in arms]

    def _winners(self) -> dict[str, Mapping[str, Any]]:
        finished = (phase for phase in self.state.phases.values() if phase.winner)
        return {phase.name: phase.winner_overrides for phase in finished}
