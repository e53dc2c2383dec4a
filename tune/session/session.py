"""A session is one run of a campaign in one results directory; it holds the lock, the journal and the state.

An executor asks for trials with `ask`, reports evaluations to `should_stop` and results to `tell`. A run that is killed
loses only the steps since the newest checkpoints: the same command resumes it.
"""

import contextlib
import hashlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ngpt.code.digest import Code, current_code, read_code
from ngpt.code.plugins import loaded_sources
from ngpt.config.base import UserError, flatten
from ngpt.config.secrets import redact
from ngpt.downstream.config import DownstreamTasks, is_score
from ngpt.plugins.records import describe
from ngpt.system import heartbeat
from ngpt.system.atomic_files import move_folder, write_atomic, write_json
from ngpt.system.cli import EXIT_ERROR
from ngpt.trackers.config import TrackerConfig
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.machine.gpu_sharing import GpuSharing
from tune.machine.throughput import measure_tokens_per_second, remember_speeds
from tune.planning.budget import STOPPED_BY_BUDGET, budget_allows
from tune.planning.changes import judging_rules
from tune.planning.code_changes import CodeDecision, named
from tune.planning.plan import PlannedTrial, preview
from tune.remote.parts import FilePart, write_parts
from tune.results.phase_summary import arms_so_far
from tune.results.snapshot import ArmSoFar, Progress, Snapshot
from tune.results.status import count_progress, take_snapshot
from tune.results.summary import write_campaign
from tune.session.datasets import check_unchanged
from tune.session.phase_tracker import PhaseTracker
from tune.session.report_writer import ReportWriter
from tune.session.trial_queue import TrialQueue
from tune.spec.schema import Campaign
from tune.storage.activity import ActivityFile
from tune.storage.divergence import explosion
from tune.storage.journal import JOURNAL, Journal
from tune.storage.links import refuse_links
from tune.storage.lock import ResultsLock
from tune.storage.state import CampaignState, PhaseState, added_trials, replay
from tune.storage.summaries import CampaignSummary
from tune.trials.retries import RETRY_RULES, WorkerDeath, failure_cause, give_up_reason, must_run_alone
from tune.trials.trial import TrialResult, TrialSpec, origin_of, prepare_trial_folder

HEADER_FIELDS = ("seq", "time", "event", "elapsed", "crc")  # of an event, which the journal writes
DISCARDED = "discarded"  # folder of the files of trials that were trained anew


class ExecutorLost(UserError):
    """The executor died and is not restarted. Running the same command again resumes the campaign."""

    exit_code = EXIT_ERROR


@dataclass(frozen=True)
class ExecutorInfo:
    """Properties of the executor that runs the trials of a session."""

    workers: int = 1  # trials or groups that run concurrently; 0 while a cluster has no node with room for one
    trials_per_device: int = 1  # at most
    n_gpus: int = 0  # over which trials are spread; 0 on a CPU, and where Ray chooses the GPU
    dashboard_url: str | None = None
    gpu_sharing: GpuSharing | None = None  # the measurement that chose `trials_per_device`, if there was one
    notes: tuple[str, ...] = ()  # on where trials train, for the warnings of the report
    tracker: TrackerConfig | None = None  # how every trial uses the tracking tools; None: as in the campaign file


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
        self._code_decision = CodeDecision()
        self._timer = timer or self._measure_speed
        self._started: float | None = None  # monotonic time of `begin`
        self._lock = ResultsLock(root)
        self._reports = ReportWriter(root, lambda text: self.message(text))
        self._judged: tuple[Any, tuple[ArmSoFar, ...]] = None, ()  # for the live view

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
        self._code_decision = decision
        for trial_id in decision.discarded:
            self.state.results.pop(trial_id, None)
        self._phases.unusable |= decision.unneeded

    def begin(self, data: Mapping[str, Any]) -> None:
        """Journals the start of this run, after checking that the corpora described by `data` are unchanged.

        Raises:
            ConfigError: a corpus has changed since the first run in this directory.
        """
        check_unchanged(self.state.campaign.get("data") or {}, data)
        write_atomic(self.root / "campaign.yaml", self.campaign.text)
        self._started = time.monotonic()
        base, expected = flatten(self.campaign.base), preview(self.campaign)
        added = added_trials({phase.name: [trial.trial_id for trial in phase.trials] for phase in expected})
        self._append(
            "campaign_started",
            campaign=self.campaign.name,
            description=self.campaign.description,
            file_sha256=hashlib.sha256(self.campaign.text.encode()).hexdigest(),
            **judging_rules(self.campaign),
            command=self._command,
            workers=self.executor.workers,
            dashboard_url=self.executor.dashboard_url,
            environment=self.environment,
            data=dict(data),
            base=base,
            code_sha256=self.code.digest,
            **({"plugins": plugins} if (plugins := describe()) else {}),
            stops_early=self.campaign.early_stop is not None,
            smoke=self.campaign.smoke,
            notes=list(self.executor.notes),
            claims=[asdict(claim) for claim in self.campaign.claims],
            expected_trials={name: len(ids) for name, ids in added.items()},
            most_trials={one.name: len(added[one.name]) + one.later_trials for one in expected if one.most_seeds},
        )
        self._journal_code()
        if self.executor.gpu_sharing is not None:
            self._append("packing_chosen", **asdict(self.executor.gpu_sharing))
        manifest = {name: self.state.campaign[name] for name in ("campaign", "command", "environment", "data")}
        manifest["notes"] = list(self.executor.notes)
        manifest["packing"] = self.state.gpu_sharing or None
        manifest["inherited"] = {path: asdict(winner) for path, winner in self.campaign.inherited.items()}
        manifest |= {"base": base, "settings": list(self.campaign.assignments)}
        if (resources := self.campaign.resources).ranks_per_trial > 1:
            manifest |= {"ranks_per_trial": resources.ranks_per_trial, "strategy": resources.strategy}
        manifest |= {"plugins": plugins} if plugins else {}
        write_json(self.root / "manifest.json", manifest)
        self.activity.change(begun=True)

    def end(self) -> CampaignSummary:
        """Journals the end of this run, writes all derived files and returns the campaign's summary."""
        if self._phases.has_all_winners():
            status = "finished"
        elif self.stop_requested:
            status = "interrupted"
        else:
            status = STOPPED_BY_BUDGET if self._queue.is_blocked() else "incomplete"
        left_out = Counter[str]()
        if status == STOPPED_BY_BUDGET:
            missing = self._phases.missing_trials().items()
            left_out = Counter(phase for trial_id, phase in missing if trial_id not in self.state.results)
        for trial_id in self.state.running:
            heartbeat.clear_heartbeat(self._trial_folder(trial_id))
        self._append("campaign_ended", status=status, seconds=self._seconds(), left_out=dict(left_out))
        trials = {trial.trial_id: trial.config for phase in self._phases.planned.values() for trial in phase.trials}
        remember_speeds(self.campaign, self.state, trials)
        self._set_aside_dropped_phases()
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
        self._note_edited_code(trial, result)
        self._append(
            "trial_finished",
            **trial.identity,
            attempt=self.state.attempts.get(trial_id, 0),
            config=flatten(self._as_trained(trial)),
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
        about: dict[str, Any] | None = result.provenance.get("evaluation")
        if about is None:
            about = {"asked": self.campaign.evaluation.asked(), "error": result.error or "it did not end"}
        about = {**about, "seconds": round(result.seconds, 3)}
        # An earlier evaluation has asked for something else: its scores must not stand beside those of other trials.
        is_first = "evaluation" not in before["provenance"]
        trained = {name: value for name, value in before["metrics"].items() if is_first or not is_score(name)}
        self._append(
            "trial_finished",
            **{name: value for name, value in before.items() if name not in HEADER_FIELDS}
            | {"metrics": trained | (result.metrics if result.status == "finished" else {})}
            | {"provenance": before["provenance"] | {"evaluation": about}},
        )
        heartbeat.clear_heartbeat(self._trial_folder(trial.trial_id))
        shown = f"evaluated in {fmt.duration(result.seconds)}"
        if "error" in about:
            shown = f"not evaluated: {fmt.reason(about['error'])}"
        elif (value := result.metrics.get(self.campaign.metric.name)) is not None:
            shown = f"{shown}  {self.campaign.metric.name} {fmt.number(value)}"
        self.message(fmt.plain(f"{trial.phase}  {trial.arm} seed {trial.seed}  {shown}"))
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
        summaries, url = list(self._phases.summaries.values()), self.executor.dashboard_url
        return take_snapshot(
            self.root,
            state,
            running=not state.ended,
            finished_phases=summaries,
            dashboard_url=url,
            arms=self._arms_so_far,
            run=self.activity.run,
        )

    def _arms_so_far(self, state: CampaignState, phase: PhaseState) -> tuple[ArmSoFar, ...]:
        """Compares the arms of the current phase again only once another trial has ended."""
        key = phase.name, len(phase.trial_ids), len(phase.looks), len(state.results)
        if self._judged[0] != key:
            self._judged = key, arms_so_far(state, phase)
        return self._judged[1]

    def _measure_speed(self, *arguments: Any, **options: Any) -> Any:
        with self.activity.doing("measuring speed"):
            threads = self._initial_campaign.resources.cpus_per_rank
            return measure_tokens_per_second(*arguments, threads=threads, **options)

    def _start(self, trial: PlannedTrial) -> TrialSpec:
        """Journals the next attempt at a trial and returns the spec for its worker."""
        folder = self._trial_folder(trial.trial_id)
        attempt = self.state.attempts.get(trial.trial_id, 0) + 1
        self._set_aside(trial.trial_id)
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
        return TrialSpec(
            **trial.identity,
            config=self._as_trained(trial),
            folder=folder,
            threads=self.campaign.resources.cpus_per_rank,
            attempt=attempt,
            packed=self._packed(),
            ranks=self.campaign.resources.ranks_per_trial,
            plugins=loaded_sources(),
            evaluation=evaluation,
            corpus=self.state.campaign["data"]["fingerprint"] if trial.config.data == self.campaign.base.data else None,
        )

    def _packed(self) -> int:
        """Returns how many trials may share a device with the one that starts now, including itself."""
        if self.campaign.resources.ranks_per_trial > 1 and self.executor.n_gpus:
            return 1  # each rank has a GPU of its own
        most, n_gpus = self.executor.trials_per_device, self.executor.n_gpus
        return min(most, max(1, -(-len(self._queue.unfinished) // n_gpus))) if n_gpus else most

    def _drop_waiting(self) -> None:
        """Records waiting trials as stopped at step 0 if early stopping has dropped their arms."""
        if not self._phases.stops_trials:
            return
        while trial := next((trial for trial in self._queue.waiting if self._phases.stop_reason(trial)), None):
            self._queue.waiting.remove(trial)
            self._set_aside(trial.trial_id)
            prepare_trial_folder(self._trial_folder(trial.trial_id), self._as_trained(trial))
            reason = self._phases.stop_reason(trial)
            self.tell(trial.trial_id, TrialResult("stopped", {"steps": 0, "tokens": 0}, error=reason))

    def _journal_code(self) -> None:
        """Journals the version of the code, and what happens to trials of other versions."""
        if self.code.digest not in self.state.code_versions:
            self._append("code_version", code_sha256=self.code.digest, files=self.code.meanings)
        decision = self._code_decision
        if decision.discarded:
            self._append("trials_discarded", trial_ids=list(decision.discarded), reason="--retrain")
        is_new = decision.versions or decision.continued.keys() - self.state.mixed_code.keys()
        if is_new or decision.kept != self.state.kept_code:
            self._append_kept(decision.kept, continued=decision.continued, versions=decision.versions)

    def _note_edited_code(self, trial: PlannedTrial, result: TrialResult) -> None:
        """Marks a trial whose code differs, because a file was edited and its worker replaced while the session ran."""
        version = result.provenance.get("code_sha256")
        if version is None or version == self.code.digest:
            return
        if version not in self.state.code_versions:
            edited = read_code(self.code.folder, self.code.plugins)
            if edited is not None and edited.digest == version:
                self._append("code_version", code_sha256=version, files=edited.meanings)
        before, together = self.state.code_versions.get(version), "vectorised" in result.provenance
        changed = named(self.code.changed(before, flatten(trial.config), together=together)) if before else []
        if changed:
            self._append_kept({**self.state.kept_code, trial.trial_id: changed})

    def _append_kept(
        self,
        trials: Mapping[str, list[str]],
        *,
        continued: Mapping[str, list[str]] | None = None,
        versions: Sequence[str] = (),
    ) -> None:
        fields = {"code_sha256": self.code.digest, "versions": list(versions)}
        self._append("code_kept", **fields, trials=dict(trials), continued=dict(continued or {}))

    def _set_aside(self, trial_id: str) -> None:
        """Moves the files of a discarded trial away, before the event that it starts anew."""
        number, folder = self.state.discarded.get(trial_id), self._trial_folder(trial_id)
        if number is not None and folder.is_dir():
            move_folder(folder, self.root.absolute() / DISCARDED / f"{trial_id}-{number}")

    def _set_aside_dropped_phases(self) -> None:
        """Moves the folders of phases that the campaign has no more to `discarded/`.

        Otherwise whoever reads the tables of all phases would count their arms twice.
        """
        for name in self.state.dropped_phases():
            folder, aside = self.root / name, f"{DISCARDED}/{name}-{self.state.campaign['seq']}"
            if folder.is_dir() and not folder.is_symlink():
                move_folder(folder, self.root / aside)
                self.message(f"the campaign has no phase {name} any more; its files are in {aside}")

    def _as_trained(self, trial: PlannedTrial) -> TrainConfig:
        """Returns the trial's config with its names in tracking tools and their modes, and how its ranks share a model.

        The results do not depend on these.
        """
        labels = {"group": self.campaign.name, "job_type": trial.phase, "run_name": f"{trial.arm} seed {trial.seed}"}
        resolved = self.executor.tracker or self.campaign.base.tracker
        modes = {name: getattr(resolved, name) for name in ("wandb", "mlflow", "trackio")}
        if self.campaign.base.tracker.shows_parameters:
            labels["varied"] = " ".join(self._phases.planned[trial.phase].varied)
        tracker, distributed = trial.config.tracker.model_copy(update=labels | modes), trial.config.distributed
        if (resources := self.campaign.resources).ranks_per_trial > 1:
            distributed = distributed.model_copy(update={"strategy": resources.strategy})
        return trial.config.model_copy(update={"tracker": tracker, "distributed": distributed})

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


def trial_line(progress: Progress, trial: PlannedTrial, result: TrialResult, metric: str) -> str:
    """Formats the line for an ended trial: `[12/29] alpha  alpha=0.15 seed 2  val_loss 4.3211  12.3k tok/s  4.1 s`."""
    total, plus = str(progress.total), "" if progress.total_is_final else "+"
    parts = [f"[{progress.done:>{len(total)}}/{total}{plus}] {trial.phase}", f"{trial.arm} seed {trial.seed}"]
    if result.status != "finished":
        parts.append(result.status + (f": {fmt.reason(result.error)}" if result.error else ""))
    loss, speed = result.metrics.get(metric), result.metrics.get("tokens_per_second")
    parts += [f"{metric} {fmt.number(loss)}"] if loss is not None else []
    parts += [f"{fmt.count(speed)} tok/s"] if speed is not None else []
    return "  ".join(map(fmt.plain, [*parts, fmt.duration(result.seconds)]))
