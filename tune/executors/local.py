"""The executor without Ray: runs trials, or groups of trials, one after another in this process."""

import contextlib
import gc
import multiprocessing.resource_tracker
import sys
import time
from collections.abc import Iterator

import torch

from ngpt.system import gpus
from tune.executors.orphans import mark_children
from tune.executors.signals import stop_on_signal
from tune.executors.watchdog import Watchdog
from tune.ranks.pool import RanksDied, run_on_ranks
from tune.ranks.processes import ProcessPool
from tune.session.executor_info import ExecutorLost
from tune.session.session import Session
from tune.trials.retries import oom_kill_count
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import GpuUnusable, Trials, run_trials

GPU_LOST = "after an error on the GPU this process cannot use it any more; run the same command again to resume"


def run_inline(session: Session, *, owns_process: bool = False) -> None:
    """Runs every trial in this process, so that a debugger can follow it; the numbers are the same as on Ray.

    Raises:
        ExecutorLost: a trial has left the GPU unusable, and there is no other process to continue with.
    """
    # A plug-in may print, and stdout is for data.
    with (
        contextlib.redirect_stdout(sys.stderr),
        restore_process(),
        stop_on_signal(session, owns_process=owns_process),
        rank_processes(session) as pool,
    ):
        while specs := session.ask():
            if pool is None:
                _run(session, run_trials(specs))
                if not gpus.is_usable():
                    raise ExecutorLost(GPU_LOST)
            else:
                _run_on_ranks(session, specs[0], pool)


def _run(session: Session, trials: Trials) -> None:
    with contextlib.closing(trials) as run:
        stopped: list[str] | None = None
        while not session.stop_requested:
            try:
                updates = run.send(stopped)
            except StopIteration:
                break
            except GpuUnusable as error:
                raise ExecutorLost(GPU_LOST) from error
            for trial_id, result in updates.ended.items():
                session.tell(trial_id, result)
            stopped = [name for name, result in updates.interim.items() if session.should_stop(name, result)]


def rank_processes(session: Session) -> contextlib.AbstractContextManager[ProcessPool | None]:
    """The processes of the ranks, if trials train on several; they end with the context."""
    n_ranks, device = session.campaign.resources.ranks_per_trial, session.campaign.base.device
    return contextlib.nullcontext() if n_ranks == 1 else ProcessPool(n_ranks, device=device)


def _run_on_ranks(session: Session, spec: TrialSpec, pool: ProcessPool) -> None:
    """Trains a trial; if its ranks die or hang, it continues with new ones."""
    watchdog, oom_kills = Watchdog(session.campaign.resources.stall_timeout), oom_kill_count()

    def check() -> None:
        for seconds in watchdog.find_hung(session.heartbeats(), time.monotonic()).values():
            raise RanksDied(f"no rank has made progress for {seconds:.0f} s", "hung")

    multiprocessing.resource_tracker.ensure_running()  # started before `mark_children`, so that it is not marked
    try:
        with mark_children(session.root):
            _run(session, run_on_ranks(spec, pool, check=check))
    except RanksDied as death:
        session.message(f"{spec.name}: {death}")
        is_victim = death.cause == "killed" and oom_kill_count() > oom_kills
        if not session.stop_requested:
            session.worker_died(spec.trial_id, "host_oom" if is_victim else death.cause)


@contextlib.contextmanager
def restore_process() -> Iterator[None]:
    """Restores what trials change in the process, which may belong to another program: threads and frozen objects."""
    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if not frozen:
            gc.unfreeze()
