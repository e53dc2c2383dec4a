"""A session is one run of a campaign in one results directory; it holds the lock, the journal and the state.

An executor asks for trials with `ask`, reports evaluations to `should_stop` and results to `tell`. A run that is killed
loses only the steps since the newest checkpoints: the same command resumes it.
"""

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ngpt.code.digest import Code, current_code
from ngpt.code.plugins import loaded_sources
from ngpt.config.base import flatten
from ngpt.config.secrets import redact
from ngpt.downstream.config import DownstreamTasks
from ngpt.system import heartbeat
from ngpt.system.atomic_files import write_atomic, write_json
from tune import format as fmt
from tune.machine.throughput import measure_tokens_per_second, remember_speeds
from tune.planning.budget import STOPPED_BY_BUDGET, budget_allows
from tune.planning.code_changes import CodeDecision
from tune.planning.plan import PlannedTrial
from tune.remote.parts import FilePart, write_parts
from tune.results.snapshot import Snapshot
from tune.results.status import ArmsSoFar, count_progress, take_snapshot
from tune.results.summary import write_campaign
from tune.session.code_versions import CodeVersions
from tune.session.datasets import check_unchanged
from tune.session.discarded import set_aside_dropped_phases, set_aside_trial
from tune.session.executor_info import ExecutorInfo, ExecutorLost
from tune.session.outcomes import add_scores, scores_line, trial_line
from tune.session.phase_tracker import PhaseTracker
from tune.session.report_writer import ReportWriter
from tune.session.start_record import manifest, started_fields
from tune.session.trial_config import as_trained
from tune.session.trial_queue import TrialQueue
from tune.spec.schema import Campaign
from tune.storage.activity import ActivityFile
from tune.storage.divergence import explosion
from tune.storage.journal import JOURNAL, Journal
from tune.storage.links import refuse_links
from tune.storage.lock import ResultsLock
from tune.storage.state import replay
from tune.storage.summaries import CampaignSummary
from tune.trials.retries import RETRY_RULES, WorkerDeath, failure_cause, give_up_reason, must_run_alone
from tune.trials.trial import TrialResult, TrialSpec, origin_of, prepare_trial_folder


class Session:
    """Context manager that locks the results directory `root` and runs a campaign there.

    Nothing on disk changes before `__enter__`.

    Args:
        command: shell command that resumes this run, for messages and records.
        environment: software versions and device, recorded in the journal.
        timer: measures training speed for `hold: seconds`; None runs real training steps.
        code: the code that trains; None for that of this process.
    """

    def __init__(
        self,
        campaign: Campaign,
        root: Path,
        *,
        command: str,
        environment: Mapping[str, Any],
        timer: Callable[..., Any] | None = None,
        code: Code | None = None,
    ) -> None:
        self.root = root
        self.code = code or current_code()
        self.message: Callable[[str], None] = lambda text: None  # prints a line; the live view replaces it
        self.stop_requested = False  # if true, no more trials start
        self.stop_signal = 0  # the signal that requested the stop, or 0
        self.executor = ExecutorInfo()  # set before `begin`, and again whenever Ray is restarted
        self.environment = dict(environment)
        self._initial_campaign, self._command = campaign, command
        self._timer = timer or self._measure_speed
        self._started: float | None = None  # monotonic time of `begin`
        self._lock = ResultsLock(root)
        self._reports = ReportWriter(root, lambda text: self.message(text))
        self._arms = ArmsSoFar()  # for the live view

    @property
    def campaign(self) -> Campaign:
        """The campaign, including all speeds measured so far."""
        return self._phases.campaign

    def __enter__(self) -> "Session":
        """Takes the lock and reads the journal.

        Raises:
            ResultsLocked: another process holds the lock.
            OSError: the directory cannot be written, has a link in the place of a trial, or its journal is damaged.
        """
        refuse_links(self.root)
        self._lock.acquire()
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            campaign = self._initial_campaign
            self.activity = ActivityFile(self.root, campaign=campaign.name, smoke=campaign.smoke)
            undo.enter_context(self.activity)
            self.journal = Journal(self.root / JOURNAL)
            undo.callback(self.journal.close)
            self.state = replay(self.journal.events, self.root / JOURNAL)
            self.state.unscored.clear()  # this session tries again
            state = self.state
            self._queue = TrialQueue(
                campaign, state, seconds_used=lambda: state.seconds + self._seconds(), heartbeats=self.heartbeats
            )
            callbacks = {"append": self._append, "message": lambda text: self.message(text), "timer": self._timer}
            self._phases = PhaseTracker(campaign, self.root, state, self._queue, **callbacks)
            self._code = CodeVersions(self.code, state, self._append)
            for event in self.journal.events:
                self._phases.apply(event)
            undo.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            is_crash = isinstance(error, Exception) and not isinstance(error, ExecutorLost)
            if is_crash and self._started is not None:
                text = redact("".join(traceback.format_exception(error)))
                with contextlib.suppress(OSError):  # a full disk may be the crash itself, which propagates anyway
                    self._append("crash", error=text[-4000:])
            self.journal.close()
        finally:
            self.activity.__exit__()
            self._lock.release()

    def apply_code(self, decision: CodeDecision) -> None:
        """Applies what was decided about trials of other code; `begin` journals it."""
        self._code.apply(decision)
        self._phases.unusable |= decision.unneeded

    def begin(self, data: Mapping[str, Any]) -> None:
        """Journals the start of this run, after checking that the corpora described by `data` are unchanged.

        Raises:
            ConfigError: a corpus has changed since the first run in this directory.
        """
        check_unchanged(self.state.campaign.get("data") or {}, data)
        write_atomic(self.root / "campaign.yaml", self.campaign.text)
        self._started = time.monotonic()
        self._append(
            "campaign_started",
            **started_fields(
                self.campaign,
                self.executor,
                command=self._command,
                environment=self.environment,
                data=data,
                code_sha256=self.code.digest,
            ),
        )
        self._code.journal()
        if self.executor.gpu_sharing is not None:
            self._append("packing_chosen", **asdict(self.executor.gpu_sharing))
        write_json(self.root / "manifest.json", manifest(self.campaign, self.executor, self.state))
        self.activity.change(begun=True)

    def end(self) -> CampaignSummary:
        """Journals the end of this run, writes all derived files and returns the campaign's summary."""
        if self._phases.has_all_winners():
            status = "finished"
        elif self.stop_requested:
            status = "interrupted"
        else:
            status = STOPPED_BY_BUDGET if self._queue.is_blocked() else "incomplete"
        missing = self._phases.missing_trials() if status == STOPPED_BY_BUDGET else {}
        left_out = Counter(phase for trial_id, phase in missing.items() if trial_id not in self.state.results)
        for trial_id in self.state.running:
            heartbeat.clear_heartbeat(self._trial_folder(trial_id))
        self._append("campaign_ended", status=status, seconds=self._seconds(), left_out=dict(left_out))
        trials = {trial.trial_id: trial.config for phase in self._phases.planned.values() for trial in phase.trials}
        remember_speeds(self.campaign, self.state, trials)
        set_aside_dropped_phases(self.root, self.state, self.message)
        with self.activity.doing("writing the report"):
            self._reports.close()
            return write_campaign(self.root, self.state)

    def ask(self) -> list[TrialSpec]:
        """Starts the next trial or group and returns its specs; returns an empty list if none may start now."""
        if self.stop_requested:
            return []
        if not self._queue.waiting:
            self._advance()
        self._drop_waiting()
        return self._queue.start_next(self._start, workers=self.executor.workers)

    def _advance(self) -> None:
        """Closes and plans phases; a phase that ends before the last one has the report rewritten."""
        closed = len(self._phases.summaries)
        self._phases.advance()
        if len(self._phases.summaries) > closed and not self._phases.has_all_winners():
            self._reports.request()

    def tell(self, trial_id: str, result: TrialResult, *, cause: str | None = None) -> None:
        """Records the result of a trial; `cause` is the cause of death if its worker died."""
        trial = self._queue.unfinished.pop(trial_id)
        if (before := self._trained(trial_id)) is not None:
            self._tell_scores(trial, before, result)
            return
        if result.status == "finished" and (reason := explosion(flatten(trial.config), result.metrics)):
            result = replace(result, status="diverged", error=reason)
        if origin := self.state.copied.get(trial_id):
            result = replace(result, provenance=result.provenance | {"copied_from": origin})
        self._code.note_edited(trial, result)
        self._append(
            "trial_finished",
            **trial.identity,
            attempt=self.state.attempts.get(trial_id, 0),
            config=flatten(as_trained(trial, self._phases.planned[trial.phase], self.campaign, self.executor)),
            cause=failure_cause(result) if cause is None else cause,
            **asdict(result),
        )
        heartbeat.clear_heartbeat(self._trial_folder(trial_id))
        self.message(trial_line(count_progress(self.state), trial, result, self.campaign.metric.name))
        if self._phases.awaits_evaluation(trial_id):
            self._queue.add([trial])
        self._advance()

    def _trained(self, trial_id: str) -> Mapping[str, Any] | None:
        """Returns the result of a trial that is trained, so that only its downstream tasks are left to run."""
        result = self.state.results.get(trial_id)
        return result if result is not None and result["status"] == "finished" else None

    def _tell_scores(self, trial: PlannedTrial, before: Mapping[str, Any], result: TrialResult) -> None:
        """Records the scores of a trained trial, or why it has none, in a result that is otherwise the one before."""
        assert self.campaign.evaluation is not None
        event = add_scores(before, result, asked=self.campaign.evaluation.asked())
        self._append("trial_finished", **event)
        heartbeat.clear_heartbeat(self._trial_folder(trial.trial_id))
        error = event["provenance"]["evaluation"].get("error")
        self.message(scores_line(trial, result, error, self.campaign.metric.name))
        self._advance()

    def should_stop(self, trial_id: str, interim: TrialResult) -> bool:
        """Returns whether early stopping ends a trial at this evaluation; if so, records `interim` as its result."""
        trial = self._queue.unfinished[trial_id]
        self._phases.report_rung(trial, interim.metrics)
        if (reason := self._phases.stop_reason(trial)) is None:
            return False
        self.tell(trial_id, replace(interim, status="stopped", error=reason))
        return True

    def worker_died(
        self, trial_id: str, cause: str, reason: str | None = None, *, beat: heartbeat.Heartbeat | None = None
    ) -> None:
        """Requeues a trial whose worker died, or records it as failed if it has used up its retries.

        `cause` is a key of `RETRY_RULES` in tune/trials/retries.py; `reason` replaces the description of that rule.
        `beat` is the trial's last heartbeat, if its file may not be seen here.
        """
        trial = self._queue.unfinished[trial_id]
        beat = beat or heartbeat.read_heartbeat(self._trial_folder(trial_id))
        death = WorkerDeath(cause, beat and beat.step, beat and beat.began, reason)
        deaths = self._queue.deaths[trial_id]
        deaths.append(death)
        reason = reason or RETRY_RULES[cause].description
        attempt = self.state.attempts[trial_id]
        self._append("worker_died", trial_id=trial_id, attempt=attempt, cause=cause, step=death.step, reason=reason)
        if error := give_up_reason(deaths):
            self.tell(trial_id, TrialResult("failed", error=error), cause=cause)
            return
        alone = ", with no other trial running" if must_run_alone(deaths) else ""
        text = f"worker died ({reason}); retrying from the newest checkpoint{alone}"
        self.message(f"{trial.phase}  {trial.arm} seed {trial.seed}  {text}")
        self._queue.waiting.appendleft(trial)

    def executor_lost(self, reason: str) -> None:
        """Journals that the executor died with all its workers, and requeues all running trials."""
        self._append("executor_lost", reason=reason)
        for trial_id in reversed(list(self.state.running)):
            self.worker_died(trial_id, "ray_lost")

    def deliver(self, trial_id: str, parts: Sequence[FilePart]) -> None:
        """Writes what a worker on another host has sent of the files of its trial."""
        write_parts(self._trial_folder(trial_id), parts)

    def set_waiting(self, trial_ids: Sequence[str]) -> None:
        """Notes which running trials have no worker yet, since the executor finds no place for them."""
        now = {trial_id for trial_id in trial_ids if trial_id in self.state.running}
        before = set(self.state.waiting)
        if now and not before:
            self.message(f"{fmt.counted(len(now), 'trial')} waiting for room in the cluster")
        for trial_id in sorted(now - before):
            self._append("trial_waiting", trial_id=trial_id)
        for trial_id in sorted(before - now):
            self._append("trial_placed", trial_id=trial_id)

    def resize(self, workers: int, trials_per_device: int, n_gpus: int, reason: str) -> None:
        """Notes that the executor has room for another number of trials."""
        self.executor = replace(self.executor, workers=workers, trials_per_device=trials_per_device, n_gpus=n_gpus)
        self._append("workers_changed", workers=workers, reason=reason)
        self.message(reason)

    def is_over(self) -> bool:
        """Returns whether every phase has its winner, or the budget is used up and no trial is running."""
        return self._phases.has_all_winners() or self._queue.is_blocked()

    def has_work(self) -> bool:
        """Returns whether any trial is left to train within the budget, given the winners known so far."""
        seconds = self.state.seconds + self.state.session_seconds()
        missing = self._phases.missing_trials()
        return any(budget_allows(self.campaign.budget, self.state, trial_id, seconds) for trial_id in missing)

    def request_stop(self, signal_number: int = 0) -> None:
        """Stops starting trials and asks every running trial to save and stop at its next step."""
        self.stop_requested, self.stop_signal = True, signal_number or self.stop_signal
        for trial_id in list(self.state.running):
            with contextlib.suppress(OSError):  # no folder yet, or a full disk: this trial stops without saving
                heartbeat.request_stop(self._trial_folder(trial_id))

    def heartbeats(self) -> dict[str, tuple[int, heartbeat.Heartbeat | None]]:
        """Returns the attempt number and newest heartbeat of every running trial that has a worker, by trial id."""
        return {
            trial_id: (event["attempt"], heartbeat.read_heartbeat(self._trial_folder(trial_id)))
            for trial_id, event in self.state.running.items()
            if trial_id not in self.state.waiting
        }

    def copy_heartbeat(self, trial_id: str, beat: heartbeat.Heartbeat) -> None:
        """Keeps the heartbeat of a running trial whose own file is not seen here, for whoever reads the results."""
        heartbeat.copy_heartbeat(self._trial_folder(trial_id), beat)

    def snapshot(self) -> Snapshot:
        """Returns the data that the live view shows."""
        state = self.state.copy()  # another thread draws the view
        summaries = list(self._phases.summaries.values())
        about = {"dashboard_url": self.executor.dashboard_url, "arms": self._arms, "run": self.activity.run}
        return take_snapshot(self.root, state, running=not state.ended, finished_phases=summaries, **about)

    def _measure_speed(self, *arguments: Any, **options: Any) -> Any:
        with self.activity.doing("measuring speed"):
            threads = self._initial_campaign.resources.cpus_per_rank
            return measure_tokens_per_second(*arguments, threads=threads, **options)

    def _start(self, trial: PlannedTrial) -> TrialSpec:
        """Journals the next attempt at a trial and returns the spec for its worker."""
        folder = self._trial_folder(trial.trial_id)
        attempt = self.state.attempts.get(trial.trial_id, 0) + 1
        set_aside_trial(self.root, self.state, trial.trial_id)
        heartbeat.clear_heartbeat(folder)  # left over from a killed attempt
        trained, evaluation = self._trained(trial.trial_id), None
        if trained is not None and self.campaign.evaluation is not None:
            evaluation = DownstreamTasks(**self.campaign.evaluation.model_dump(exclude={"phases"}))
        code = self.code.digest if trained is None else self.state.code_of_start.get(trial.trial_id)
        started = {"steps": trial.config.steps, "attempt": attempt, "code_sha256": code}
        if attempt == 1 and (origin := origin_of(folder)):
            started["copied_from"] = origin
            self.message(f"{trial.phase}  {trial.arm} seed {trial.seed}  continues files of the campaign {origin}")
        self._append("trial_started", **trial.identity, **started)
        ranks = self.campaign.resources.ranks_per_trial
        return TrialSpec(
            **trial.identity,
            config=as_trained(trial, self._phases.planned[trial.phase], self.campaign, self.executor),
            folder=folder,
            threads=self.campaign.resources.cpus_per_rank,
            attempt=attempt,
            packed=self.executor.packed(len(self._queue.unfinished), ranks=ranks),
            ranks=ranks,
            plugins=loaded_sources(),
            evaluation=evaluation,
            corpus=self.state.campaign["data"]["fingerprint"] if trial.config.data == self.campaign.base.data else None,
        )

    def _drop_waiting(self) -> None:
        """Records waiting trials as stopped at step 0 if early stopping has dropped their arms."""
        if not self._phases.stops_trials:
            return
        while trial := next((trial for trial in self._queue.waiting if self._phases.stop_reason(trial)), None):
            self._queue.waiting.remove(trial)
            set_aside_trial(self.root, self.state, trial.trial_id)
            config = as_trained(trial, self._phases.planned[trial.phase], self.campaign, self.executor)
            prepare_trial_folder(self._trial_folder(trial.trial_id), config)
            reason = self._phases.stop_reason(trial)
            self.tell(trial.trial_id, TrialResult("stopped", {"steps": 0, "tokens": 0}, error=reason))

    def _trial_folder(self, trial_id: str) -> Path:
        return (self.root / "trials" / trial_id).absolute()

    def _seconds(self) -> float:
        """Returns the seconds since `begin` on the monotonic clock."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    def _append(self, event: str, **fields: Any) -> None:
        # Wall clocks can jump, so the order of lines orders the events, and durations come from `elapsed`.
        written = self.journal.append(event, elapsed=round(self._seconds(), 3), **fields)
        self.state.apply(written)
        self._phases.apply(written)
