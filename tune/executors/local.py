"""The executor without Ray: runs trials, or groups of trials, one after another in this process."""

import contextlib
import gc
from collections.abc import Iterator

import torch

from ngpt.system import gpus
from tune.executors.signals import stop_on_signal
from tune.session.session import ExecutorLost, Session
from tune.trials.trial_group import GpuUnusable, run_trials

GPU_LOST = "after an error on the GPU this process cannot use it any more; run the same command again to resume"


def run_inline(session: Session, *, owns_process: bool = False) -> None:
    """Runs every trial in this process, so that a debugger can follow it; the numbers are the same as on Ray.

    Raises:
        ExecutorLost: a trial has left the GPU unusable, and there is no other process to continue with.
    """
    with restore_process(), stop_on_signal(session, owns_process=owns_process):
        while specs := session.ask():
            with contextlib.closing(run_trials(specs)) as run:
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
            if not gpus.is_usable():
                raise ExecutorLost(GPU_LOST)


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
