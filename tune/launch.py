"""Runs a campaign: locks the results, prepares the corpora, starts the executor and the live view, trains."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ngpt.data.text.progress import Log
from ngpt.ensemble.train import ensemble_incompatibility
from ngpt.kernels.compile import check_compiler
from ngpt.system.cache import ADVICE, CODE_FOLDERS, cache_folder, code_folder_problem
from ngpt.system.device import pick_device
from ngpt.training.tracker import resolve_tracker
from ngpt.training.wandb_tracker import print_line
from tune.executors.local import run_inline
from tune.executors.orphans import kill_marked
from tune.executors.ray_folder import check_machine
from tune.executors.ray_supervisor import RaySupervisor
from tune.executors.signals import POLL_SECONDS, StoppedEarly, stop_on_event
from tune.machine import environment
from tune.machine.estimate import check_budget, slow_dtype
from tune.machine.gpu_sharing import choose_gpu_sharing
from tune.machine.placement import NO_GPU, device_notes, place, this_machine
from tune.planning.changes import check_changes, find_changes
from tune.planning.code_changes import decide, find_code_changes
from tune.planning.plan import preview
from tune.report.wording import packing_fact
from tune.results.snapshot import Snapshot
from tune.session.datasets import check_all, describe_data, prepare_all
from tune.session.session import ExecutorInfo, Session
from tune.spec.schema import Campaign
from tune.storage.summaries import CampaignSummary
from tune.terminal.live import open_console


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
    owns_process: bool = False,
) -> tuple[CampaignSummary, int]:
    """Trains the trials missing in `root`; returns the campaign's summary and the signal that ended the run, or 0.

    Works in any thread; in the main thread, it handles the stop signals while trials run (tune/executors/signals.py).

    Args:
        root: the results directory, created if needed.
        command: shell command that resumes the run, for messages and records.
        inline: run in this process instead of on Ray.
        address: a running Ray cluster to join; None starts a private one.
        allow_change: continue even if the campaign changes the meaning of existing results (tune/planning/changes.py).
        retrain: arms whose trials are trained anew if other code trained them; an empty list means all, None none.
        keep: reuse trials of other code, and mark it in the report.
        view: makes the context manager that shows progress; entering it gives a function that prints an event.
        stop: once another thread sets it, running trials save and stop at their next step, as after a first signal.
        owns_process: whether a second signal exits the process; otherwise it raises KeyboardInterrupt or SystemExit.

    Raises:
        ResultsLocked: another process runs on `root`.
        CorruptShardError: a shard has changed since it was first used.
        ConfigError: the budget is too small, a corpus, the tracker or Ray cannot be used as configured, or existing
            results have another meaning, corpus or code, and no argument says what to do with them.
        OSError: the disk is full or the files are not accessible.
        ExecutorLost: Ray died too often, or a cluster that this run did not start is gone.
        StoppedEarly: `stop` was set before a trial could start.
    """
    check_budget(campaign, root)
    session = Session(campaign, root, command=command, environment=environment.describe(campaign.base.device))
    with session, stop_on_event(session, stop), contextlib.ExitStack() as stack:
        check_results(session, allow_change=allow_change, retrain=retrain, keep=keep)
        supervisor = None
        if has_work := session.has_work():
            check_surroundings(session, is_here=address is None, private_ray=not inline and address is None)
        # Tokenizing and starting Ray take seconds each and are independent, so they overlap.
        preparation = in_background(lambda: prepare_all(campaign, print_line))
        if has_work and not inline:
            if preparation.done():
                preparation.result()
            supervisor = RaySupervisor(session, campaign.resources, address=address, owns_process=owns_process)
            wait_for_ray(stack.enter_context(supervisor), is_private=address is None)
        wait_for_preparation(preparation, session)
        if supervisor and address is None:  # the GPUs of a running cluster may be on other machines
            share_gpus(session, supervisor)
        session.begin(describe_data(campaign.base) | {"shards": check_all(campaign)})
        session.message = stack.enter_context(view(session.snapshot))
        supervisor.run() if supervisor else run_inline(session, owns_process=owns_process)
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
    changes = find_changes(session.campaign, session.state)
    check_changes(changes, allowed=allow_change)
    code_changes = find_code_changes(session.campaign, session.state, session.root, session.code)
    decision = decide(code_changes, retrain=retrain, keep=keep)
    session.apply_code(decision)
    for line in (*changes.lines(), *decision.lines):
        print_line(line)


def check_surroundings(session: Session, *, is_here: bool, private_ray: bool) -> None:
    """Prints what will be missing in the results, and settles how trials use the tracking server.

    Raises:
        ConfigError: the trials cannot be trained, or tracked as configured, on this machine (`is_here`), or Ray cannot
            start on it (`private_ray`).
    """
    campaign = session.campaign
    if private_ray:
        here = this_machine(campaign.resources, device=campaign.base.device)
        check_machine(place(campaign.resources, [here], device=campaign.base.device).workers)
    report_environment()
    check_training(campaign, is_here=is_here)
    if is_here:
        report_devices(campaign)
    # Checked once here; otherwise every trial would wait for an unreachable tracking server.
    mode = resolve_tracker(campaign.base.tracker, session.root / "trials" / "*", print_line).wandb
    session.executor = ExecutorInfo(wandb_mode=mode)


def check_training(campaign: Campaign, *, is_here: bool) -> None:
    """Prints why `vectorise` has no effect, if trials cannot be trained as groups.

    Raises:
        ConfigError: a trial needs a compiler that this machine, on which the trials run if `is_here`, does not have.
    """
    if is_here and any(trial.config.compile for phase in preview(campaign) for trial in phase.trials):
        check_compiler(pick_device(campaign.base.device))
    size = campaign.resources.vectorise
    if size > 1 and (reason := ensemble_incompatibility([campaign.base])):
        print_line(f"vectorise: {size} has no effect, trials are trained one at a time: {reason}")


def report_environment() -> None:
    """Prints why the results will not name the commit of the code, and why compiled code is not kept in the cache."""
    if problem := environment.git_problem():
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


def wait_for_ray(supervisor: RaySupervisor, *, is_private: bool) -> None:
    """Waits until Ray has started; prints the dashboard URL and the number of workers."""
    print_line("starting Ray ...")
    ready = supervisor.wait()
    # The dashboard of a private Ray requires this token; another cluster may require a different login.
    token = f"  (token: `{supervisor.token_command}`)" if is_private and ready.dashboard_url else ""
    print_line(f"dashboard {ready.dashboard_url or 'none'}  workers {ready.workers}{token}")


def wait_for_preparation(preparation: Future[Any], session: Session) -> None:
    """Waits until the corpora are prepared; raises the error of their preparation, or StoppedEarly."""
    while not wait_for_futures([preparation], POLL_SECONDS).done:
        if session.stop_requested:
            raise StoppedEarly
    preparation.result()


def share_gpus(session: Session, supervisor: RaySupervisor) -> None:
    """If `gpus_per_trial` is auto, lets the fastest number of trials share each GPU."""
    if sharing := choose_gpu_sharing(session.campaign, session.state, print_line):
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
