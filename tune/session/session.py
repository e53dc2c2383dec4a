"""One run of a campaign on one results directory: what to train next, and what a result means.

It knows the phases (tune/session/phase_tracker.py), the journal and the budget, and no executor: Ray and the inline loop both ask
`ask` and report to `tell`. Stopping it at any moment loses nothing but the trials in flight, and those
continue from their checkpoints when the same command is given again.
"""

import contextlib
import hashlib
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, flatten
from ngpt.config.secrets import redacted
from ngpt.system import heartbeat
from ngpt.system.atomic_files import write_atomic, write_json
from tune.machine.gpu_sharing import GpuSharing
from tune.machine.throughput import remember_speeds
from tune.planning.budget import STOPPED_BY_BUDGET, budget_allows
from tune.planning.changes import judging_rules
from tune.planning.equal_time import timer
from tune.planning.forecast import expected_phases, has_result
from tune.planning.plan import PlannedTrial, preview
from tune.results.snapshot import Snapshot
from tune.results.status import take_snapshot
from tune.results.summary import Summary, write_campaign
from tune.session.datasets import changed_shards
from tune.session.phase_tracker import PhaseTracker
from tune.spec.schema import Campaign
from tune.storage.journal import Journal
from tune.storage.lock import ResultsLock
from tune.storage.state import replay
from tune.terminal.live import trial_line
from tune.trials.retries import RETRY_RULES, WorkerDeath, failure_cause, give_up_reason, must_run_alone
from tune.trials.trial import TrialResult, TrialSpec, prepare_trial_folder
from tune.trials.trial_group import batchable, group_size

Message = Callable[[str], None]


class ExecutorLost(Exception):
    """What runs the trials is gone and is not replaced any more; the same command goes on with the campaign."""


class Session:
    """Holds the lock of a results directory from `__enter__` to `__exit__`; all it learns goes to the journal."""

    def __init__(self, campaign: Campaign, root: Path, *, command: str, environment: Mapping[str, Any]) -> None:
        self.root = root
        self.command, self.environment = command, dict(environment)
        self.wandb_mode = campaign.base.tracker.wandb  # of every trial; `auto` leaves it to each of them
        self.workers = 1  # trials at once, set by the executor
        self.packed = 1  # of these on one device, set by the executor
        self.packing: GpuSharing | None = None  # how that was chosen, if it was
        self.message: Message = lambda text: None
        self.dashboard_url: str | None = None
        self.timer = timer(campaign.resources.cpus_per_trial)  # of training steps, for `hold: seconds`
        self.stop_requested = False
        self.stop_signal = 0  # that asked for it
        self._started: float | None = None  # of `begin`, by a clock that does not jump
        self._deaths: defaultdict[str, list[WorkerDeath]] = defaultdict(
            list
        )  # of workers, by the trial they died under
        self._leaders: dict[str, str] = {}  # the first trial of its group, by trial, where trials are trained together
        self._lock = ResultsLock(root)
        self._phases = PhaseTracker(
            campaign,
            root,
            append=self._append,
            message=lambda text: self.message(text),
            timer=lambda *arguments: self.timer(*arguments),
        )

    @property
    def campaign(self) -> Campaign:
        """The campaign, with all speeds that were measured so far."""
        return self._phases.campaign

    # ---- begin and end ---------------------------------------------------------------------------------------------

    def __enter__(self) -> "Session":
        """Takes the lock and reads the journal.

        Raises:
            ResultsLocked: somebody else has the lock.
            OSError: the directory cannot be written, or its journal is damaged.
        """
        self._lock.acquire()
        try:
            self.journal = Journal(self.root / "journal.jsonl")
            self.state = replay(self.journal.events)
            self._phases.resume(self.state, self.journal.events)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            is_crash = isinstance(error, Exception) and not isinstance(error, ExecutorLost)
            if is_crash and self._started is not None:
                text = redacted("".join(traceback.format_exception(error)))
                with contextlib.suppress(OSError):  # which may be the very error; it goes on its way
                    self._append("crash", error=text[-4000:])
            self.journal.close()
        finally:
            self._lock.release()

    def begin(self, data: Mapping[str, Any]) -> None:
        """Journals the start. `data` describes the corpus; it must be the one the directory's results are from.

        Raises:
            ConfigError: the corpus has changed since the first trial here.
        """
        before = self.state.campaign.get("data")
        if before and before["fingerprint"] == data["fingerprint"] and before["sha256"] != data["sha256"]:
            text = f"the corpus {data['corpus']} has changed since this campaign began ({before['sha256'][:12]} then, "
            raise ConfigError(f"{text}{data['sha256'][:12]} now); put it back, or choose another --out")
        if changed := changed_shards((before or {}).get("shards", {}), data.get("shards", {})):
            text = "shards have changed since this campaign began; put them back, or choose another --out:\n"
            raise ConfigError(text + "\n".join(changed))
        write_atomic(self.root / "campaign.yaml", self.campaign.text)
        self._started = time.monotonic()
        self._append(
            "campaign_started",
            campaign=self.campaign.name,
            description=self.campaign.description,
            file_sha256=hashlib.sha256(self.campaign.text.encode()).hexdigest(),
            **judging_rules(self.campaign),
            command=self.command,
            workers=self.workers,
            dashboard_url=self.dashboard_url,
            environment=self.environment,
            data=dict(data),
            base=flatten(self.campaign.base),
            stops_early=self.campaign.early_stop is not None,
            claims=[asdict(claim) for claim in self.campaign.claims],
            expected_trials={phase.name: len(list(phase.trials)) for phase in preview(self.campaign)},
        )
        if self.packing is not None:
            self._append("packing_chosen", **asdict(self.packing))
        manifest = {name: self.state.campaign[name] for name in ("campaign", "command", "environment", "data")}
        manifest["packing"] = self.state.packing or None
        manifest["inherited"] = {path: asdict(winner) for path, winner in self.campaign.inherited.items()}
        config = flatten(self.campaign.base)
        write_json(
            self.root / "manifest.json", manifest | {"base": config, "settings": list(self.campaign.assignments)}
        )

    def end(self) -> Summary:
        """Journals the end, writes all derived files and returns the campaign's summary."""
        status = "interrupted" if self.stop_requested else STOPPED_BY_BUDGET if self._out_of_budget() else "incomplete"
        status = "finished" if self._phases.has_all_winners() else status
        left_out = Counter(phase for phase, trial_id in self._missing() if trial_id not in self.state.results)
        left_out = dict(left_out) if status == STOPPED_BY_BUDGET else {}
        for trial_id in self.state.running:
            heartbeat.clear(self._trial_folder(trial_id))
        self._append("campaign_ended", status=status, seconds=self._seconds(), left_out=left_out)
        trials = {trial.trial_id: trial.config for phase in self._phases.planned.values() for trial in phase.trials}
        remember_speeds(self.campaign, self.state, trials)
        return write_campaign(self.root, self.state)

    # ---- what to do next -------------------------------------------------------------------------------------------

    def ask(self) -> list[TrialSpec]:
        """The next trial with those that wait and can be trained together with it; empty where there is none now.

        It takes no more of them than leaves as many for each other worker that is free, or soon will be. One that its
        process has died under is trained by itself: what it died of is then not another one's doing.
        """
        first, most = self.next_trial(), self.campaign.resources.vectorise
        together = [first] if first else []
        if first is None or most == 1:
            return together
        waiting = [trial for trial in self._phases.queue if trial.trial_id not in self._deaths]
        size = group_size(len(waiting) + 1, self._free_workers(first), most=most)
        for trial in waiting if first.trial_id not in self._deaths else ():
            if len(together) == size:
                break
            if self._may_start(trial) and len(batchable(first, [self._spec(trial)], most=2)) == 2:
                together.append(self._begin(trial))
        self._leaders |= dict.fromkeys((spec.trial_id for spec in together), first.trial_id)
        return together

    def _free_workers(self, first: TrialSpec) -> int:
        """How many workers there are for `first` and what waits: all that have at least half of theirs behind them."""
        steps = {trial_id: event["steps"] for trial_id, event in self.state.running.items()}
        beats = {trial_id: beat for trial_id, (_, beat) in self.heartbeats().items() if trial_id != first.trial_id}
        early = [trial_id for trial_id, beat in beats.items() if beat is None or 2 * beat.step < steps[trial_id]]
        return max(1, self.workers - len({self._leaders.get(trial_id, trial_id) for trial_id in early}))

    def next_trial(self) -> TrialSpec | None:
        """The next trial to start, or None when there is none now; then ask `is_over` whether to wait for one."""
        if self.stop_requested:
            return None
        if not self._phases.queue:
            self._phases.advance()
        self._drop_waiting()
        trial = next(filter(self._may_start, self._phases.queue), None)
        return self._begin(trial) if trial else None

    def _begin(self, trial: PlannedTrial) -> TrialSpec:
        """Takes a trial out of the queue and journals that it has started."""
        self._phases.queue.remove(trial)
        spec = self._spec(trial)
        heartbeat.clear(spec.folder)  # of an attempt that was killed
        self._append(
            "trial_started",
            trial_id=trial.trial_id,
            phase=trial.phase,
            arm=trial.arm,
            seed=trial.seed,
            steps=trial.config.steps,
            attempt=spec.attempt,
        )
        return spec

    def _spec(self, trial: PlannedTrial) -> TrialSpec:
        """What a worker needs for the next attempt at a trial."""
        return TrialSpec(
            trial_id=trial.trial_id,
            phase=trial.phase,
            arm=trial.arm,
            seed=trial.seed,
            config=self._with_tracking(trial),
            folder=self._trial_folder(trial.trial_id),
            threads=self.campaign.resources.cpus_per_trial,
            attempt=self.state.attempts.get(trial.trial_id, 0) + 1,
            packed=self.packed,
        )

    def _trial_folder(self, trial_id: str) -> Path:
        return (self.root / "trials" / trial_id).absolute()

    def has_work(self) -> bool:
        """Whether any trial is left to train, within the budget and as far as the journal knows the winners."""
        seconds = self.state.seconds + self.state.session_seconds()
        return any(
            budget_allows(self.campaign.budget, self.state, trial_id, seconds) for _, trial_id in self._missing()
        )

    def is_over(self) -> bool:
        """Whether every phase has its winner, or the budget is used up and no trial is running."""
        return self._phases.has_all_winners() or self._out_of_budget()

    def _out_of_budget(self) -> bool:
        """Whether trials are waiting and none of them may start. One whose worker dies under it may start again."""
        return bool(self._phases.queue) and not self.state.running and not any(map(self._may_start, self._phases.queue))

    def _may_start(self, trial: PlannedTrial) -> bool:
        if not self._has_room(trial):
            return False
        again = trial.trial_id in self._deaths  # it was under way when the budget was reached, and is to be finished
        seconds = self.state.seconds + self._seconds()
        return again or budget_allows(self.campaign.budget, self.state, trial.trial_id, seconds)

    def _has_room(self, trial: PlannedTrial) -> bool:
        """Whether a trial may run beside those that do: one that the machine had no memory for runs with none."""
        waiting = (other.trial_id for other in self._phases.queue)
        if any(map(self._is_alone, self.state.running)):
            return False
        if self._is_alone(trial.trial_id):
            return not self.state.running
        return not any(map(self._is_alone, waiting))

    def _is_alone(self, trial_id: str) -> bool:
        return trial_id in self._deaths and must_run_alone(self._deaths[trial_id])

    def _seconds(self) -> float:
        """Since `begin`, by a clock that does not jump."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def _missing(self) -> Iterator[tuple[str, str]]:
        """Trials to be trained, after the first phase that needs each, as far as the journal knows the winners."""
        found = set[str]()
        for phase in expected_phases(self.campaign, self.state):
            for trial_id in (trial.trial_id for trial in phase.trials):
                if trial_id not in found and not has_result(self.campaign, self.state, phase.name, trial_id):
                    found.add(trial_id)
                    yield phase.name, trial_id

    def _with_tracking(self, trial: PlannedTrial) -> Any:
        """The trial's config with its place in the campaign, as W&B shows it; nothing here changes what is computed."""
        place = {"group": self.campaign.name, "job_type": trial.phase, "run_name": f"{trial.arm} seed {trial.seed}"}
        tracker = trial.config.tracker.model_copy(update=place | {"wandb": self.wandb_mode})
        return trial.config.model_copy(update={"tracker": tracker})

    # ---- what came of it -------------------------------------------------------------------------------------------

    def tell(self, trial_id: str, result: TrialResult, *, cause: str | None = None) -> None:
        """Records what came of a trial that `ask` gave out; `cause` says why its process died, if it did."""
        trial = self._phases.trials.pop(trial_id)
        self._append(
            "trial_finished",
            trial_id=trial_id,
            phase=trial.phase,
            arm=trial.arm,
            seed=trial.seed,
            attempt=self.state.attempts.get(trial_id, 0),
            config=flatten(self._with_tracking(trial)),
            cause=failure_cause(result) if cause is None else cause,
            **asdict(result),
        )
        heartbeat.clear(self._trial_folder(trial_id))
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
        self._phases.advance()

    def should_stop(self, trial_id: str, interim: TrialResult) -> bool:
        """Whether early stopping ends a trial at this evaluation; then it is recorded as it is `interim`."""
        trial = self._phases.trials[trial_id]
        self._phases.report_rung(trial, interim.metrics)
        if (why := self._phases.stop_reason(trial)) is None:
            return False
        self.tell(trial_id, replace(interim, status="stopped", error=why))
        return True

    def _drop_waiting(self) -> None:
        """Ends what waits of arms that early stopping has dropped: nothing that it finds could be judged."""
        while trial := next((trial for trial in self._phases.queue if self._phases.stop_reason(trial)), None):
            self._phases.queue.remove(trial)
            prepare_trial_folder(self._trial_folder(trial.trial_id), self._with_tracking(trial))
            never = TrialResult("stopped", {"steps": 0, "tokens": 0}, error=self._phases.stop_reason(trial))
            self.tell(trial.trial_id, never)

    def worker_died(self, trial_id: str, cause: str, reason: str | None = None) -> None:
        """The process of a trial is gone without a result: tried again from its checkpoint, as tune/trials/retries.py says.

        `cause` is an entry of its table, `reason` what is known besides.
        """
        trial, beat = self._phases.trials[trial_id], heartbeat.read_heartbeat(self._trial_folder(trial_id))
        deaths = self._deaths[trial_id]
        deaths.append(WorkerDeath(cause, beat and beat.step, beat and beat.began))
        says = reason or RETRY_RULES[cause].says
        attempt, step = self.state.attempts[trial_id], deaths[-1].step
        self._append("worker_died", trial_id=trial_id, attempt=attempt, cause=cause, step=step, reason=says)
        if error := give_up_reason(deaths):
            self.tell(trial_id, TrialResult("failed", error=error), cause=cause)
            return
        alone = ", with nothing beside it" if must_run_alone(deaths) else ""
        text = f"worker died ({says}), trying again from its newest checkpoint{alone}"
        self.message(f"{trial.phase}  {trial.arm} seed {trial.seed}  {text}")
        self._phases.queue.appendleft(trial)

    def executor_lost(self, reason: str) -> None:
        """All workers are gone at once: the trials that were running are next again."""
        self._append("executor_lost", reason=reason)
        for trial_id in reversed(list(self.state.running)):
            self.worker_died(trial_id, "ray_lost")

    def request_stop(self) -> None:
        """Lets every running trial save and stop at its next step."""
        for trial_id in list(self.state.running):
            with contextlib.suppress(OSError):  # it has not begun, or there is no room for a wish: it is not saved
                heartbeat.request_stop(self._trial_folder(trial_id))

    def heartbeats(self) -> dict[str, tuple[int, heartbeat.Beat | None]]:
        """The attempt and the newest heartbeat of every running trial."""
        running = self.state.running.values()
        return {
            event["trial_id"]: (event["attempt"], heartbeat.read_heartbeat(self._trial_folder(event["trial_id"])))
            for event in running
        }

    def snapshot(self) -> Snapshot:
        """The live view's data."""
        state = self.state.copy()  # the view is drawn by another thread
        return take_snapshot(
            self.root,
            state,
            running=not state.ended,
            finished_phases=list(self._phases.summaries.values()),
            dashboard_url=self.dashboard_url,
        )

    def _append(self, event: str, **fields: Any) -> None:
        # Clocks jump: order is that of the lines, and durations are of this clock.
        written = self.journal.append(event, elapsed=round(self._seconds(), 3), **fields)
        self.state.apply(written)
        self._phases.apply(written)


def _last_line(error: str | None) -> str | None:
    return error.strip().splitlines()[-1] if error else None
