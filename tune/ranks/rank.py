"""One rank of a trial that several processes train together (`resources: {ranks_per_trial: N}`), in its own process.

`RankRun` trains to the next evaluation at each call, as tune/ranks/pool.py asks it to. The ranks take the same
decisions, so they stop at the same points.
"""

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ngpt.distributed.join import TIMEOUT, process_group
from ngpt.distributed.network import INTERFACE_VARIABLE, interface_to
from ngpt.distributed.ranks import LateOutOfMemory, OtherRankOutOfMemory, RankLost
from ngpt.downstream.config import DownstreamTasks
from ngpt.system import gpus
from tune.trials.folder_lock import hold_folders
from tune.trials.trial import (
    Attempt,
    TrialResult,
    TrialSpec,
    evaluate_trained,
    freeze_loaded_objects,
    plugin_problem,
    train_trial,
)

# What a rank says of itself: it was evaluated, has ended the trial, has saved and stopped on request, was told to
# leave; it has failed, only because another has ("lost", "short"), or because memory ran out too late to agree on it;
# it cannot train on this host ("unfit"); its process has died.
Kind = Literal["evaluated", "ended", "paused", "left", "failed", "lost", "short", "late_oom", "unfit", "died"]


@dataclass(frozen=True)
class Seat:
    """The place of a rank among those of its trial, and where they meet."""

    index: int
    count: int
    host: str  # of the store at which they meet
    port: int
    group: str  # their name there, for each attempt another one
    halvings: int  # of the micro-batch, that the attempt starts with
    gpu: int | None = None  # the one to use, of those that the process sees; None: the only one, or a CPU
    needs_gpu: bool = False  # whether it must not train on a CPU instead


@dataclass(frozen=True)
class Answer:
    """What a rank answers; the first one has the result of an evaluation, or of the trial."""

    kind: Kind
    result: TrialResult | None = None
    reason: str | None = None


class RankRun:
    """The trials that one process trains as a rank, one after another."""

    def __init__(self) -> None:
        self._run: Generator[Answer, bool, None] | None = None

    def begin(self, spec: TrialSpec, seat: Seat) -> Answer:
        """Begins a trial, and trains to its first evaluation or end."""
        self._run = _train(spec, seat)
        return next(self._run)

    def advance(self, leave: bool) -> Answer:
        """Trains to the next evaluation or end; or leaves the trial as it is, without saving it."""
        assert self._run is not None
        return self._run.send(leave)


def _train(spec: TrialSpec, seat: Seat) -> Generator[Answer, bool, None]:
    problem = plugin_problem(spec.plugins)  # before the attempt notes which code it runs
    attempt = Attempt(spec, ranks=seat.count)
    try:
        if problem is not None:
            raise problem
        if (reason := _use_device(seat)) is not None:
            answer = Answer("unfit", reason=reason)
        elif spec.evaluation is not None:
            answer = _evaluate_alone(spec, spec.evaluation, attempt)
        else:
            answer = yield from _train_together(spec, seat, attempt)
    except RankLost as error:
        answer = Answer("lost", reason=str(error))
    except LateOutOfMemory as error:
        answer = Answer("late_oom", reason=str(error))
    except OtherRankOutOfMemory as error:
        answer = Answer("short", attempt.failure(error))
    except Exception as error:  # becomes the result of the trial, as in `run_trial`
        answer = Answer("failed", attempt.failure(error))
    freeze_loaded_objects()
    yield answer


def _use_device(seat: Seat) -> str | None:
    """Takes the GPU of this rank, if it has one; returns why it cannot train here, or None."""
    if seat.gpu is not None:
        gpus.use(seat.gpu)
    elif seat.needs_gpu and not gpus.is_available():  # with `device: auto` it would use the CPU
        return f"Ray offers a GPU, but {gpus.why_unavailable()}"
    return None


def _evaluate_alone(spec: TrialSpec, tasks: DownstreamTasks, attempt: Attempt) -> Answer:
    """Runs the downstream tasks of a trained trial on the first rank, as on one device; the others have no part."""
    with hold_folders([spec]), contextlib.closing(evaluate_trained(spec, tasks, attempt)) as run:
        try:
            next(run)
        except StopIteration as end:
            return Answer("ended", end.value)
    return Answer("paused")  # it yields after a stop request only


def _train_together(spec: TrialSpec, seat: Seat, attempt: Attempt) -> Generator[Answer, bool, Answer]:
    """Yields each evaluation; returns how the trial has ended."""
    if interface := interface_to(seat.host):
        os.environ.setdefault(INTERFACE_VARIABLE, interface)
    with contextlib.ExitStack() as stack:
        if seat.index == 0:
            spec.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_folders([spec]))
        store = PrefixStore(seat.group, TCPStore(seat.host, seat.port, timeout=TIMEOUT))
        place = {"rank": seat.index, "world_size": seat.count}
        ranks = stack.enter_context(process_group(halvings=seat.halvings, store=store, **place))
        with contextlib.closing(train_trial(spec, attempt, ranks)) as run:
            while True:
                try:
                    interim = next(run)
                except StopIteration as end:
                    return Answer("ended", end.value if ranks.is_first else None)
                if ranks.stops(False):  # a stop request, on which all ranks have agreed
                    run.close()  # saves
                    return Answer("paused")
                if (yield Answer("evaluated", interim if ranks.is_first else None)):
                    run.close()
                    return Answer("left")
