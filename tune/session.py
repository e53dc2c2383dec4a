"""One run of a campaign on one results directory: what to train next, what a result means, when a phase is over.

It knows the plan, the journal and the statistics, and no executor: Ray and the inline loop both ask `next_trial` and
report to `trial_ended`. Stopping it at any moment loses nothing but the trials in flight, and those continue from
their checkpoints when the same command is given again.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ngpt.config import ConfigError, flatten
from ngpt.durable import write_atomic, write_json
from tune import format as fmt
from tune.budget import STOPPED, allows
from tune.campaign import Campaign, Phase
from tune.combine import Better
from tune.console import Snapshot, trial_line
from tune.estimate import remember_speeds
from tune.journal import Journal
from tune.pace import measure, pace_key, timer
from tune.plan import PlannedPhase, Trial, inheritance, plan_phase, preview, unmeasured
from tune.progress import expected_phases, planned_event
from tune.state import DONE, replay
from tune.status import LOCK_FILE, take_snapshot
from tune.summary import Summary, settings_text, write_campaign, write_phase
from tune.trial import TrialResult, TrialSpec

MOST_RETRIES = 3  # of a trial whose worker died under it, in one session
PATIENCE = 1.0  # seconds to wait for the lock, which `status` also takes for a moment

Message = Callable[[str], None]


class Busy(Exception):
    """Another process runs a campaign on this results directory."""


class ExecutorLost(Exception):
    """What runs the trials is gone before the campaign was over; the same command goes on."""


class Session:
    """Holds the lock of a results directory from `__enter__` to `__exit__`; all it learns goes to the journal."""

    def __init__(self, campaign: Campaign, root: Path, *, command: str, environment: Mapping[str, Any]) -> None:
        self.campaign, self.root = campaign, root
        self.command, self.environment = command, dict(environment)
        self.wandb_mode = campaign.base.tracker.wandb  # of every trial; `auto` leaves it to each of them
        self.workers = 1  # trials at once, set by the executor
        self.message: Message = lambda text: None
        self.dashboard_url: str | None = None
        self.timer = timer(campaign.resources.cpus_per_trial)  # of training steps, for `hold: seconds`
        self.stop_requested = False
        self.stop_signal = 0  # that asked for it
        self._phases: dict[str, PlannedPhase] = {}
        self._queue: deque[Trial] = deque()
        self._trials: dict[str, Trial] = {}  # queued or running, by id
        self._summaries: dict[str, Summary] = {}
        self._deaths: Counter[str] = Counter()  # of workers, by the trial they died under
        self._lock = FileLock(root / LOCK_FILE)

    # ---- begin and end ---------------------------------------------------------------------------------------------

    def __enter__(self) -> "Session":
        """Takes the lock and reads the journal.

        Raises:
            Busy: somebody else has the lock.
            OSError: the directory cannot be written, or its journal is damaged.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise Busy(f"{self.root} is in use by {self._holder()}") from None
        try:
            write_atomic(self.root / "campaign.pid", f"{os.getpid()}\n")
            self.journal = Journal(self.root / "journal.jsonl")
            self.state = replay(self.journal.events)
            self.campaign = replace(self.campaign, speeds=self.state.speeds)
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.journal.close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        (self.root / "campaign.pid").unlink(missing_ok=True)
        self._lock.release()

    def _holder(self) -> str:
        pid_file = self.root / "campaign.pid"
        pid = pid_file.read_text().strip() if pid_file.exists() else "unknown"
        return f"another run (process {pid})"

    def begin(self, data: Mapping[str, Any]) -> None:
        """Journals the start. `data` describes the corpus; it must be the one the directory's results are from.

        Raises:
            ConfigError: the corpus has changed since the first trial here.
        """
        before = self.state.campaign.get("data")
        if before and before["fingerprint"] == data["fingerprint"] and before["sha256"] != data["sha256"]:
            text = f"the corpus {data['corpus']} has changed since this campaign began ({before['sha256'][:12]} then, "
            raise ConfigError(f"{text}{data['sha256'][:12]} now); put it back, or choose another --out")
        write_atomic(self.root / "campaign.yaml", self.campaign.text)
        self._started = time.monotonic()
        self._append(
            "campaign_started",
            campaign=self.campaign.name,
            description=self.campaign.description,
            metric=self.campaign.metric.model_dump(),
            confidence=self.campaign.confidence,
            min_effect=self.campaign.min_effect,
            command=self.command,
            workers=self.workers,
            dashboard_url=self.dashboard_url,
            environment=self.environment,
            data=dict(data),
            base=flatten(self.campaign.base),
            claims=[asdict(claim) for claim in self.campaign.claims],
            expected_trials={phase.name: len(list(phase.trials)) for phase in preview(self.campaign)},
        )
        manifest = {name: self.state.campaign[name] for name in ("campaign", "command", "environment", "data")}
        manifest["inherited"] = {path: asdict(chained) for path, chained in self.campaign.chained.items()}
        config = flatten(self.campaign.base)
        write_json(
            self.root / "manifest.json", manifest | {"base": config, "settings": list(self.campaign.assignments)}
        )

    def end(self) -> Summary:
        """Journals the end, writes all derived files and returns the campaign's summary."""
        status = "interrupted" if self.stop_requested else STOPPED if self._out_of_budget() else "incomplete"
        status = "finished" if self._has_all_winners() else status
        left_out = Counter(phase for phase, trial_id in self._missing() if trial_id not in self.state.results)
        left_out = dict(left_out) if status == STOPPED else {}
        self._append("campaign_ended", status=status, seconds=time.monotonic() - self._started, left_out=left_out)
        trials = {trial.trial_id: trial.config for phase in self._phases.values() for trial in phase.trials}
        remember_speeds(self.campaign, self.state, trials)
        return write_campaign(self.root, self.state)

    # ---- what to do next -------------------------------------------------------------------------------------------

    def next_trial(self) -> TrialSpec | None:
        """The next trial to start, or None when there is none now; then ask `is_over` whether to wait for one."""
        if self.stop_requested:
            return None
        if not self._queue:
            self._advance()
        trial = next(filter(self._may_start, self._queue), None)
        if trial is None:
            return None
        self._queue.remove(trial)
        attempt = self.state.attempts.get(trial.trial_id, 0) + 1
        self._append(
            "trial_started",
            trial_id=trial.trial_id,
            phase=trial.phase,
            arm=trial.arm,
            seed=trial.seed,
            steps=trial.config.steps,
            attempt=attempt,
        )
        return TrialSpec(
            trial_id=trial.trial_id,
            phase=trial.phase,
            arm=trial.arm,
            seed=trial.seed,
            config=self._with_tracking(trial),
            folder=(self.root / "trials" / trial.trial_id).absolute(),
            threads=self.campaign.resources.cpus_per_trial,
            attempt=attempt,
        )

    def has_work(self) -> bool:
        """Whether any trial is left to train, within the budget and as far as the journal knows the winners."""
        seconds = self.state.seconds + self.state.session_seconds()
        return any(allows(self.campaign.budget, self.state, trial_id, seconds) for _, trial_id in self._missing())

    def is_over(self) -> bool:
        """Whether every phase has its winner, or the budget is used up and no trial is running."""
        return self._has_all_winners() or self._out_of_budget()

    def _has_all_winners(self) -> bool:
        return len(self.state.phases) == len(self.campaign.phases) and all(
            phase.winner for phase in self.state.phases.values()
        )

    def _out_of_budget(self) -> bool:
        """Whether trials are waiting and none of them may start. One whose worker dies under it may start again."""
        return bool(self._queue) and not self.state.running and not any(map(self._may_start, self._queue))

    def _may_start(self, trial: Trial) -> bool:
        seconds = self.state.seconds + time.monotonic() - self._started
        again = trial.trial_id in self._deaths  # it was under way when the budget was reached, and is to be finished
        return again or allows(self.campaign.budget, self.state, trial.trial_id, seconds)

    def _missing(self) -> Iterator[tuple[str, str]]:
        """Trials to be trained, after the first phase that needs each, as far as the journal knows the winners."""
        done = {trial_id for trial_id, result in self.state.results.items() if result["status"] in DONE}
        for phase in expected_phases(self.campaign, self.state):
            for trial in phase.trials:
                if trial.trial_id not in done:
                    done.add(trial.trial_id)
                    yield phase.name, trial.trial_id

    def _with_tracking(self, trial: Trial) -> Any:
        """The trial's config with its place in the campaign, as W&B shows it; nothing here changes what is computed."""
        place = {"group": self.campaign.name, "job_type": trial.phase, "run_name": f"{trial.arm} seed {trial.seed}"}
        tracker = trial.config.tracker.model_copy(update=place | {"wandb": self.wandb_mode})
        return trial.config.model_copy(update={"tracker": tracker})

    def _advance(self) -> None:
        """Closes phases whose trials are all done and plans those that have become possible, until neither happens."""
        moved = True
        while moved:
            moved = False
            for phase in self.campaign.phases:
                if phase.name not in self._phases and phase.needs <= self._winners().keys():
                    self._plan(phase.name)
                    moved = True
                planned = self._phases.get(phase.name)
                if planned and phase.name not in self._summaries and self._complete(planned):
                    if phase.search and len(self._expanded(phase).arms) > len(planned.arms):
                        self._plan(phase.name)  # the next batch
                    else:
                        self._close(planned)
                    moved = True

    def _plan(self, name: str) -> None:
        phase = next(phase for phase in self.campaign.phases if phase.name == name)
        planned = self._expanded(phase)
        if (phase.hold or self.campaign.hold) == "seconds":
            self._measure_speeds(planned)
            planned = self._expanded(phase)
            self._say_steps(planned)
        self._phases[name] = planned
        self._append("phase_planned", **planned_event(planned))
        missing = [t for t in planned.trials if t.trial_id not in self.state.results and t.trial_id not in self._trials]
        self._trials |= {trial.trial_id: trial for trial in missing}
        self._queue.extend(missing)
        n = len(list(planned.trials))
        reused = f", {n - len(missing)} of them known already" if len(missing) < n else ""
        base = f" on {settings_text(planned.base)}" if planned.base else ""
        self.message(f"phase {name}: {len(planned.arms)} arms x {len(planned.seeds)} seeds = {n} trials{reused}{base}")

    def _expanded(self, phase: Phase) -> PlannedPhase:
        better = {name: done.better for name, done in self.state.phases.items() if done.winner}
        return plan_phase(self.campaign, phase, self._winners(), better, self.state.outcome)

    def _measure_speeds(self, phase: PlannedPhase) -> None:
        """Times what was never timed, and keeps it for good."""
        if missing := unmeasured(self.campaign, phase):
            self.message(f"phase {phase.name}: timing {len(missing)} shapes of model, batch and optimizer")
            speeds = measure(self.campaign.base, missing, self.campaign.speeds, self.timer)
            self._append("speeds_measured", phase=phase.name, speeds=speeds)
            self.campaign = replace(self.campaign, speeds=self.state.speeds)

    def _say_steps(self, phase: PlannedPhase) -> None:
        for arm in phase.arms:
            config = arm.trials[0].config
            speed = fmt.count(self.campaign.speeds[pace_key(config)])
            self.message(f"phase {phase.name}: {arm.name} trains {speed} tokens/s, so it gets {config.steps} steps")

    def _complete(self, phase: PlannedPhase) -> bool:
        return all(trial.trial_id in self.state.results for trial in phase.trials)

    def _close(self, phase: PlannedPhase) -> None:
        summary = write_phase(self.root, self.state, self.state.phases[phase.name])
        self._summaries[phase.name] = summary
        overrides = inheritance(phase, summary["winner"])
        self._append(
            "phase_finished",
            phase=phase.name,
            winner=summary["winner"],
            winner_overrides=dict(overrides),
            better=self._better(summary),
            why=summary["why"],
        )
        self.message(f"phase {phase.name}: {summary['why']}")

    def _better(self, summary: Summary) -> list[dict[str, Any]]:
        """The arms of a phase that are better than its baseline, for phases that combine them."""
        sign = 1 if self.campaign.metric.goal == "maximize" else -1
        arms = [arm for arm in summary["arms"] if arm["verdict"] == "better"]
        return [asdict(Better(arm["arm"], arm["overrides"], sign * arm["delta"]["mean"])) for arm in arms]

    def _winners(self) -> dict[str, Mapping[str, Any]]:
        finished = (phase for phase in self.state.phases.values() if phase.winner)
        return {phase.name: phase.winner_overrides for phase in finished}

    # ---- what came of it -------------------------------------------------------------------------------------------

    def trial_ended(self, trial_id: str, result: TrialResult) -> None:
        """Records what came of a trial that `next_trial` gave out."""
        trial = self._trials.pop(trial_id)
        self._append(
            "trial_finished",
            trial_id=trial_id,
            phase=trial.phase,
            arm=trial.arm,
            seed=trial.seed,
            attempt=self.state.attempts[trial_id],
            config=flatten(self._with_tracking(trial)),
            **asdict(result),
        )
        snapshot = self.snapshot()
        self.message(
            trial_line(
                done=snapshot.done,
                total=snapshot.total,
                phase=trial.phase,
                arm=trial.arm,
                seed=trial.seed,
                status=result.status,
                metric=self.campaign.metric.name,
                loss=result.metrics.get(self.campaign.metric.name),
                tokens_per_second=result.metrics.get("tokens_per_second"),
                seconds=result.seconds,
                error=_last_line(result.error),
                total_is_final=snapshot.total_is_final,
            )
        )
        self._advance()

    def worker_died(self, trial_id: str, reason: str) -> None:
        """The process of a trial is gone without a result: tried again from its checkpoint, at most three times."""
        trial = self._trials[trial_id]
        self._append("worker_died", trial_id=trial_id, attempt=self.state.attempts[trial_id], reason=reason)
        self._deaths[trial_id] += 1
        if self._deaths[trial_id] <= MOST_RETRIES:
            self.message(f"{trial.phase}  {trial.arm} seed {trial.seed}  worker died ({reason}), trying again")
            self._queue.appendleft(trial)
            return
        error = f"the worker process died {self._deaths[trial_id]} times: {reason}"
        self.trial_ended(trial_id, TrialResult("failed", error=error))

    def snapshot(self) -> Snapshot:
        """The live view's data."""
        state = self.state.copy()  # the view is drawn by another thread
        return take_snapshot(
            self.root,
            state,
            running=not state.ended,
            finished_phases=list(self._summaries.values()),
            dashboard_url=self.dashboard_url,
        )

    def _append(self, event: str, **fields: Any) -> None:
        self.state.apply(self.journal.append(event, **fields))


def _last_line(error: str | None) -> str | None:
    return error.strip().splitlines()[-1] if error else None
