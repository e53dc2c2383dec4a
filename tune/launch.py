"""One run of a campaign from start to end: lock, corpora, workers, view, trials, files."""

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Generic, TypeVar

from ngpt.ensemble.train import ensemble_incompatibility
from ngpt.training.tracker import settled
from tune.executors.local import run_inline
from tune.executors.orphans import end_marked
from tune.executors.ray_process import RayReady
from tune.executors.ray_supervisor import RaySupervisor
from tune.machine import environment
from tune.machine.estimate import check_budget
from tune.machine.gpu_sharing import Packing, pack
from tune.planning.changes import check_changes, find_changes
from tune.report.wording import packing_fact
from tune.results.snapshot import Snapshot
from tune.results.summary import Summary
from tune.session.datasets import check_all, describe_data, prepare_all
from tune.session.session import ExecutorInfo, Session
from tune.spec.schema import Campaign
from tune.terminal.live import open_console

Value = TypeVar("Value")


def launch(
    campaign: Campaign,
    root: Path,
    *,
    command: str,
    inline: bool = False,
    address: str | None = None,
    allow_change: bool = False,
    view: Callable[[Callable[[], Snapshot]], contextlib.AbstractContextManager] = open_console,
) -> tuple[Summary, int]:
    """Trains what is missing in `root`; returns the campaign's summary and the signal that ended the run, or 0.

    Args:
        campaign: what to run.
        root: its results directory; made if need be.
        command: how to start it again, for people.
        inline: run in this process instead of on Ray.
        address: of a running Ray cluster; None starts a private one.
        allow_change: go on also where the campaign changes what the results in `root` mean (tune/planning/changes.py).
        view: makes the context manager that shows progress and has a `message` method.

    Raises:
        ResultsLocked: another process runs on `root`.
        CorruptShardError: a shard is not as it was when it was first used.
        ConfigError: the budget is too small, the corpora cannot be prepared or have changed, what the results mean has
            changed, or the tracker cannot do what is asked of it.
        OSError: the disk.
        ExecutorLost: Ray stopped too often before the campaign was over, or it was not ours.
    """
    check_budget(campaign, root)
    session = Session(campaign, root, command=command, environment=environment.describe(campaign.base.device))
    with session, contextlib.ExitStack() as stack:
        if ended := end_marked(root):
            tell(f"ended {ended} processes that a killed run had left")
        changes = find_changes(session.campaign, session.state)
        check_changes(changes, allowed=allow_change)
        for line in changes.lines():
            tell(line)
        work = session.has_work()
        if work and campaign.resources.vectorise > 1 and (reason := ensemble_incompatibility([campaign.base])):
            tell(f"trials are trained one by one, vectorise {campaign.resources.vectorise} has no effect: {reason}")
        executor = ExecutorInfo()
        if work:  # asked once for all trials: each would wait for a server that is not there
            mode = settled(campaign.base.tracker, root / "trials" / "*", tell).wandb
            executor = replace(executor, wandb_mode=mode)
        # Tokenizing and Ray's start both take seconds, and neither needs the other.
        prepared = Background(lambda: prepare_all(campaign, tell))
        keeper = None
        if not inline and work:
            prepared.check()
            keeper = stack.enter_context(RaySupervisor(session, campaign.resources, address=address))
            executor = started(executor, wait_for_ray(keeper, is_ours=address is None))
        prepared.result()
        # The GPUs of a running cluster may be others than ours: they are not for us to measure.
        if keeper and address is None and (packing := pack(session.campaign, session.state, tell)):
            executor = started(executor, keeper.share(packing.trials_per_device), packing)
            tell(f"{packing_fact(asdict(packing))}; workers {executor.workers}")
        session.begin(describe_data(campaign.base) | {"shards": check_all(campaign)}, executor)
        session.message = stack.enter_context(view(session.snapshot)).message
        keeper.run() if keeper else run_inline(session)
        return session.end(), session.stop_signal


def wait_for_ray(keeper: RaySupervisor, *, is_ours: bool) -> RayReady:
    """Waits until Ray has started, and says what there is to know of it and of the GPUs.

    Ours asks whoever opens its dashboard for its token; what another one asks for is its owner's business.
    """
    tell("starting Ray ...")
    for line in environment.busy_gpus():
        tell(line)
    ready = keeper.wait()
    token = "  (it asks for what `ray get-auth-token` prints)" if is_ours and ready.dashboard_url else ""
    tell(f"dashboard {ready.dashboard_url or 'none'}  workers {ready.workers}{token}")
    return ready


def started(executor: ExecutorInfo, ray: RayReady, packing: Packing | None = None) -> ExecutorInfo:
    """The executor, now that Ray has started."""
    return replace(
        executor,
        workers=ray.workers,
        trials_per_device=ray.trials_per_device,
        dashboard_url=ray.dashboard_url,
        packing=packing,
    )


def tell(text: str) -> None:
    """A line on stderr, before the view is open."""
    print(text, file=sys.stderr, flush=True)


class Background(Generic[Value]):
    """A call in another thread; `result` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], Value]) -> None:
        self._outcome: list[Value] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(call,), daemon=True)
        self._thread.start()

    def result(self) -> Value:
        self._thread.join()
        self.check()
        return self._outcome[0]

    def check(self) -> None:
        """Raises what the call raised, if it has by now."""
        if self._error is not None:
            raise self._error

    def _work(self, call: Callable[[], Value]) -> None:
        try:
            self._outcome.append(call())
        except BaseException as error:  # handed to the caller of `result`
            self._error = error
