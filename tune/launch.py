"""Runs a campaign: locks the results, prepares the corpora, starts the executor and the live view, trains."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.code.version import git_problem
from ngpt.config.base import ConfigError, unknown_message
from ngpt.data.text.progress import Log, TerminalLog
from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.bundle_files import DOWNLOAD
from ngpt.downstream.harness import check_tasks, without_stderr
from ngpt.ensemble.train import ensemble_incompatibility
from ngpt.kernels.compile import check_compiler
from ngpt.system.cache import ADVICE, CODE_FOLDERS, cache_folder, code_folder_problem
from ngpt.system.cli import EXIT_INTERRUPTED, EXIT_UNSUCCESSFUL, erase_status, print_line
from ngpt.system.device import pick_device
from ngpt.trackers.config import fail_lost_runs, resolve_tracker
from tune.cluster.address import check_listening, choose_address, job_folder_note
from tune.cluster.node_data import expected_corpora
from tune.executors.local import run_inline
from tune.executors.orphans import kill_marked
from tune.executors.ray_folder import check_machine
from tune.executors.ray_supervisor import RaySupervisor
from tune.executors.signals import POLL_SECONDS, StoppedEarly, exit_on_signals, stop_on_event
from tune.machine import environment
from tune.machine.estimate import check_budget, slow_dtype
from tune.machine.gpu_sharing import choose_gpu_sharing
from tune.machine.placement import NO_GPU, device_notes, place, this_machine
from tune.planning.advice import advice_on_phases
from tune.planning.changes import check_changes, find_changes
from tune.planning.code_changes import decide, find_code_changes
from tune.planning.plan import preview
from tune.remote.places import open_results
from tune.remote.results import RemoteResults
from tune.report.wording import packing_fact
from tune.results.snapshot import Snapshot
from tune.session.datasets import check_all, check_bytes, data_configs, describe_data, prepare_all
from tune.session.executor_info import ExecutorInfo
from tune.session.session import Session
from tune.spec.schema import Campaign
from tune.storage.summaries import CampaignSummary
from tune.terminal.live import open_console

if TYPE_CHECKING:
    from tune.remote.uri import Uri


def launch_at(
    campaign: Campaign, name: str, out: "Path | Uri", *, stop: threading.Event | None = None, **options: Any
) -> tuple[CampaignSummary, int]:
    """Runs `launch` on the results directory `name` in a folder, or at an address, which is then uploaded.

    `options` are the other arguments of `launch`. Before and after the trials, stop signals raise SystemExit.
    """
    whole = options.get("retrain") is not None  # what is trained anew is set aside whole
    with exit_on_signals(), open_results(out, name, stop=stop, whole=whole) as (root, extra):
        return launch(campaign, root, **options, **extra)


def exit_code(summary: CampaignSummary, signal_number: int) -> int:
    """Returns the exit code of a run that `signal_number` has ended, or 0 if no signal has."""
    if signal_number:
        return 128 + signal_number
    if summary.status == "interrupted":  # by another thread
        return EXIT_INTERRUPTED
    # Trials left out by the budget count too: exit code 0 promises that every trial finished.
    unsuccessful = summary.trials.failed + summary.trials.diverged + len(summary.left_out)
    return EXIT_UNSUCCESSFUL if unsuccessful else 0


def launch(
    campaign: Campaign,
    root: Path,
    *,
    command: str,
    inline: bool = False,
    address: str | None = None,
    allow_change: bool = False,
    retrain: Sequence[str] | None = None,
    keep: bool = False,
    view: Callable[[Callable[[], Snapshot]], contextlib.AbstractContextManager[Log]] = open_console,
    stop: threading.Event | None = None,
    remote: RemoteResults | None = None,
    owns_process: bool = False,
) -> tuple[CampaignSummary, int]:
    """Trains the trials missing in `root`; returns the campaign's summary and the signal that ended the run, or 0.

    Works in any thread; in the main thread, it handles stop signals while trials run (tune/executors/signals.py).

    Args:
        root: the results directory, created if needed.
        command: shell command that resumes the run, for messages and records.
        inline: run in this process instead of on Ray.
        address: as `--address`: None starts a private Ray, but inside a Ray job joins the cluster of the job.
        allow_change: continue even if the campaign changes the meaning of existing results (tune/planning/changes.py).
        retrain: arms whose trials of other code are trained anew; an empty list means all, None none.
        keep: reuse trials of other code, and mark it in the report.
        view: makes the context manager that shows progress; entering it gives a function that prints an event.
        remote: uploads `root`, if the results are at an address.
        stop: once another thread sets it, running trials save and stop at their next step, as after a first signal.
        owns_process: whether a second signal exits the process; otherwise it raises KeyboardInterrupt or SystemExit.

    Raises:
        ResultsLocked: another process runs on `root`.
        CorruptShardError: a shard has changed since it was first used.
        ConfigError: the budget is too small, a corpus, the tracker or Ray cannot be used as configured, or no argument
            says what to do with existing results of another meaning, corpus or code.
        OSError: the disk is full or the files are not accessible.
        ExecutorLost: Ray died too often, or the cluster at `address` is gone.
        StoppedEarly: `stop` was set before a trial could start.
    """
    address = None if inline else choose_address(address, print_line)
    check_budget(campaign, root)
    session = Session(campaign, root, command=command, environment=environment.describe(campaign.base.device))
    with session, stop_on_event(session, stop), contextlib.ExitStack() as stack:
        check_results(session, allow_change=allow_change, retrain=retrain, keep=keep)
        if has_work := session.has_work():
            check_surroundings(session, address, private_ray=not inline and address is None)
        preparation = in_background(lambda: prepare_data(session))  # overlaps with the start of Ray
        supervisor = None
        if has_work and not inline:
            supervisor = supervisor_of(session, address, remote, owns_process=owns_process)
            start_ray(session, supervisor, stack, address, preparation)
        wait_for_preparation(preparation, session)
        if has_work:
            prepare_workers(session, supervisor, address, remote)
        begin(session)
        session.message = stack.enter_context(view(session.snapshot))
        run_trials(session, supervisor, owns_process=owns_process)
        return session.end(), session.stop_signal


def check_results(
    session: Session, *, allow_change: bool = False, retrain: Sequence[str] | None = None, keep: bool = False
) -> None:
    """Kills processes left over from a killed run and prints what has changed since the existing results.

    Raises:
        ConfigError: the campaign changes the meaning of existing results, or other code trained some of them and
            nothing says what to do with them.
    """
    if killed := kill_marked(session.root):
        print_line(f"killed {killed} processes left over from a killed run")
    with session.activity.doing("checking the results"):
        changes = find_changes(session.campaign, session.state)
        check_changes(changes, allowed=allow_change)
        code_changes = find_code_changes(session.campaign, session.state, session.root, session.code)
        decision = decide(code_changes, retrain=retrain, keep=keep)
        session.apply_code(decision)
        # For `status`, before the journal has it: how many trials there will be, as far as they are known.
        phases = preview(session.campaign)
        trials = {trial.trial_id for phase in phases for trial in phase.trials}
        session.activity.change(trials=len(trials), phases=len(phases))
    for line in (*changes.lines(), *decision.lines):
        print_line(line)


def run_trials(session: Session, supervisor: RaySupervisor | None, *, owns_process: bool) -> None:
    """Trains what is missing, on Ray or in this process; then tells the tracking tools which trials have failed."""
    supervisor.run() if supervisor else run_inline(session, owns_process=owns_process)
    tell_trackers(session)


def tell_trackers(session: Session) -> None:
    """Tells the tracking tools which trials have failed, since a worker that died could not."""
    tracker = session.executor.tracker or session.campaign.base.tracker
    failed = [trial_id for trial_id, result in session.state.results.items() if result["status"] == "failed"]
    fail_lost_runs(tracker, [session.root / "trials" / trial_id for trial_id in failed], group=session.campaign.name)


def begin(session: Session) -> None:
    """Rereads the corpora, and journals the start of the run; raises the same errors as `check_all` and `begin`."""
    with session.activity.doing("checking the data"):
        session.begin(describe_data(session.campaign.base) | {"shards": check_all(session.campaign)})


def prepare_data(session: Session) -> None:
    """Prepares the corpora; shows the progress, also to `status`."""
    name = "preparing data"
    with session.activity.doing(name):
        prepare_all(session.campaign, session.activity.log(name, TerminalLog()))
    erase_status()


def check_surroundings(session: Session, address: str | None, *, private_ray: bool) -> None:
    """Prints what will be missing in the results, and settles how trials use the tracking server.

    Raises:
        ConfigError: nothing listens at `address`; or, without one, the trials cannot be trained, or tracked as
            configured, on this machine, or Ray cannot start on it (`private_ray`).
    """
    campaign, is_here, n_ranks = session.campaign, address is None, session.campaign.resources.ranks_per_trial
    if address:
        check_listening(address)
    if note := job_folder_note(session.root):
        print_line(note)
    if private_ray or (is_here and n_ranks > 1):
        here = this_machine(campaign.resources, device=campaign.base.device)
        workers = place(campaign.resources, [here], device=campaign.base.device).workers
        if private_ray:
            check_machine(workers if n_ranks == 1 else workers * (n_ranks + 1))
    report_environment()
    with session.activity.doing("loading the downstream tasks"):
        check_downstream(campaign)
    check_training(campaign, is_here=is_here)
    if is_here:
        report_devices(campaign)
    # Checked once here; otherwise every trial would wait for an unreachable tracking server.
    folders = session.root / "trials" / "*"
    with session.activity.doing("looking for tracking servers"):
        tracker = resolve_tracker(campaign.base.tracker, folders, print_line, group=campaign.name)
    session.executor = ExecutorInfo(tracker=tracker)


def check_downstream(campaign: Campaign) -> None:
    """Loads the tasks of the campaign with their data, so that nothing is found missing after the training.

    Raises:
        ConfigError: a task is unknown or its data cannot be had, or the campaign uses a metric that no task has.
    """
    if campaign.evaluation is None:
        return
    if campaign.evaluation.core == DOWNLOAD:
        read_bundle(DOWNLOAD, limit=campaign.evaluation.limit, log=print_line)
    if not campaign.evaluation.tasks:
        return
    known = check_tasks(campaign.evaluation)
    used = {campaign.metric.name: "metric.name", **{claim.metric: f"claim {claim.id}" for claim in campaign.claims}}
    for name, where in used.items():
        task = name.partition("/")[0]
        if task in campaign.evaluation.tasks and without_stderr(name) not in known:
            raise ConfigError(f"{where}: {unknown_message('metric', name, known)}")


def compiles(campaign: Campaign) -> bool:
    """Whether a trial of the campaign needs torch.compile."""
    return any(trial.config.compile for phase in preview(campaign) for trial in phase.trials)


def check_training(campaign: Campaign, *, is_here: bool) -> None:
    """Prints why `vectorise` has no effect, if trials cannot be trained as groups.

    Raises:
        ConfigError: a trial needs a compiler that this machine, on which the trials run if `is_here`, does not have.
    """
    if is_here and compiles(campaign):
        check_compiler(pick_device(campaign.base.device))
    size = campaign.resources.vectorise
    if size > 1 and (reason := ensemble_incompatibility([campaign.base])):
        print_line(f"vectorise: {size} has no effect, trials are trained one at a time: {reason}")


def report_environment() -> None:
    """Prints why the results will not name the commit of the code, and why compiled code is not kept in the cache."""
    if problem := git_problem():
        print_line(f"the results will not name the commit of this code: {problem}")
    folders = (cache_folder() / name for name in CODE_FOLDERS)
    if problem := next(filter(None, map(code_folder_problem, folders)), None):
        print_line(f"{problem}: compiled code is not kept; {ADVICE}")


def report_devices(campaign: Campaign) -> None:
    """Prints which GPUs of this machine others hold or no trial uses, and which dtype it only emulates."""
    device = campaign.base.device
    busy = [] if device in NO_GPU else environment.busy_gpus()
    emulated = slow_dtype(campaign, (trial.config for phase in preview(campaign) for trial in phase.trials))
    for line in (*device_notes(campaign.resources, device=device), *busy, *filter(None, [emulated])):
        print_line(line)


def report_advice(campaign: Campaign) -> None:
    """Prints which settings are likely to be a mistake, given the prepared corpora; none of a smoke run."""
    for line in [] if campaign.smoke else advice_on_phases(preview(campaign)):
        print_line(f"warning: {line}")


def start_ray(
    session: Session,
    supervisor: RaySupervisor,
    stack: contextlib.ExitStack,
    address: str | None,
    preparation: Future[Any],
) -> None:
    """Starts Ray, or joins the cluster at `address`, until `stack` closes; prints the dashboard and number of workers.

    Raises the error of the corpora's preparation instead, if they have failed by now.
    """
    if preparation.done():
        preparation.result()
    stack.enter_context(supervisor)
    name = f"joining the Ray cluster at {address}" if address else "starting Ray"
    print_line(f"{name} ...")
    with session.activity.doing(name):
        ready = supervisor.wait()
    # The dashboard of a private Ray requires this token; another cluster may require a different login.
    token = f"  (token: `{supervisor.token_command}`)" if ready.dashboard_url and not address else ""
    print_line(f"dashboard {ready.dashboard_url or 'none'}  workers {ready.workers}{token}")


def prepare_nodes(session: Session, supervisor: RaySupervisor) -> None:
    """Prepares the corpora on every node of a cluster; raises the same errors as `RaySupervisor.prepare_nodes`."""
    with session.activity.doing("preparing data on the nodes of the cluster"):
        supervisor.prepare_nodes(expected_corpora(data_configs(session.campaign)))


def wait_for_preparation(preparation: Future[Any], session: Session) -> None:
    """Waits until the corpora are prepared, and prints what is likely to be a mistake with them if trials are missing.

    Raises the error of their preparation or of `check_bytes`, or StoppedEarly.
    """
    while not wait_for_futures([preparation], POLL_SECONDS).done:
        if session.stop_requested:
            raise StoppedEarly
    preparation.result()
    if session.has_work():
        check_bytes(session.campaign)
        report_advice(session.campaign)


def supervisor_of(
    session: Session, address: str | None, remote: RemoteResults | None, *, owns_process: bool
) -> RaySupervisor:
    """Makes what runs the trials of the session on a private Ray, or on the cluster at `address`."""
    where = None if remote is None else (remote.uri, remote.workers)
    joined = {"address": address, "remote": where, "compiles": compiles(session.campaign)}
    return RaySupervisor(session, session.campaign.resources, owns_process=owns_process, **joined)


def prepare_workers(
    session: Session, supervisor: RaySupervisor | None, address: str | None, remote: RemoteResults | None
) -> None:
    """Makes checkpoints and corpora available to the workers, and settles how many trials share a GPU."""
    if remote:
        settle_uploads(remote, supervisor)
    if supervisor and address:
        prepare_nodes(session, supervisor)
    elif supervisor:  # the GPUs of a running cluster may be on other machines
        share_gpus(session, supervisor)


def settle_uploads(remote: RemoteResults, supervisor: RaySupervisor | None) -> None:
    """Makes the newest checkpoints available to the workers that resume trials, and says where workers train."""
    workers_upload = supervisor is not None and supervisor.wait().workers_upload
    remote.settle(workers_upload=workers_upload)
    if workers_upload:
        print_line("the nodes share no folder: workers train in scratch of their own and upload by themselves")


def share_gpus(session: Session, supervisor: RaySupervisor) -> None:
    """If `gpus_per_trial` is auto, lets the fastest number of trials share each GPU."""
    with session.activity.doing("measuring speed"):
        sharing = choose_gpu_sharing(session.campaign, session.state, print_line)
    if sharing:
        ready = supervisor.share(sharing.trials_per_device)
        session.executor = replace(session.executor, gpu_sharing=sharing)
        print_line(f"{packing_fact(asdict(sharing))}; workers {ready.workers}")


def in_background(call: Callable[[], Any]) -> Future[Any]:
    """Runs `call` in a daemon thread, so that an interrupted run does not wait for it."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
