"""One run of a campaign on one results directory: what to train next, what a result means, when a phase is over.

It knows the plan, the journal and the statistics, and no executor: Ray and the inline loop both ask `next_trial` and
report to `trial_ended`. Stopping it at any moment loses nothing but the trials in flight, and those continue from
their checkpoints when the same command is given again.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ngpt.config import ConfigError, flatten
from ngpt.durable import write_atomic, write_json
from tune.campaign import Campaign
from tune.console import Snapshot, trial_line
from tune.estimate import remember_speeds
from tune.journal import Journal
from tune.plan import PlannedPhase, Trial, inheritance, plan_phase, preview
from tune.state import DONE, past_winner, planned_event, replay
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
            expected_trials={phase.name: len(list(phase.trials)) for phase in preview(self.campaign)},
        )
        manifest = {name: self.state.campaign[name] for name in ("campaign", "command", "environment", "data")}
        config = flatten(self.campaign.base)
        write_json(
            self.root / "manifest.json", manifest | {"base": config, "settings": list(self.campaign.assignments)}
        )

    def end(self) -> Summary:
        """Journals the end, writes all derived files and returns the campaign's summary."""
        status = "finished" if self.is_over() else "interrupted" if self.stop_requested else "incomplete"
        self._append("campaign_ended", status=status, seconds=time.monotonic() - self._started)
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
        if not self._queue:
            return None
        trial = self._queue.popleft()
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
        """Whether any trial is left to train, as far as the journal knows the winners."""
        phases = preview(self.campaign, lambda phase: past_winner(self.state, phase))
        done = {trial_id for trial_id, result in self.state.results.items() if result["status"] in DONE}
        return any(trial.trial_id not in done for phase in phases for trial in phase.trials)

    def is_over(self) -> bool:
        """Whether every phase has its winner."""
        return len(self.state.phases) == len(self.campaign.phases) and all(
            phase.winner for phase in self.state.phases.values()
        )

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
                    self._close(planned)
                    moved = True

    def _plan(self, name: str) -> None:
        phase = next(phase for phase in self.campaign.phases if phase.name == name)
        planned = plan_phase(self.campaign, phase, self._winners())
        self._phases[name] = planned
        self._append("phase_planned", **planned_event(planned))
        missing = [t for t in planned.trials if t.trial_id not in self.state.results and t.trial_id not in self._trials]
        self._trials |= {trial.trial_id: trial for trial in missing}
        self._queue.extend(missing)
        n = len(list(planned.trials))
        reused = f", {n - len(missing)} of them known already" if len(missing) < n else ""
        base = f" on {settings_text(planned.base)}" if planned.base else ""
        self.message(f"phase {name}: {len(planned.arms)} arms x {len(planned.seeds)} seeds = {n} trials{reused}{base}")

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
            why=summary["why"],
        )
        self.message(f"phase {phase.name}: {summary['why']}")

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
