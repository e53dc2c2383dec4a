"""Trains a trial on several ranks, from the process that starts them (`resources: {ranks_per_trial: N}`).

This process is no rank itself, so it outlives whatever happens to one. A rank that dies or fails takes the others with
it, and the trial continues from its newest checkpoint with new ones.
"""

import itertools
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ngpt.distributed.network import LOOPBACK, open_store
from ngpt.system.heartbeat import stop_requested
from tune.ranks.rank import Answer, Seat
from tune.trials.trial import TrialResult, TrialSpec
from tune.trials.trial_group import Trials, Updates

GRACE = 10.0  # seconds that the other ranks have to say what they know when one has failed
STOPPED = {"ended", "paused", "left"}  # answers of ranks that are ready for another trial
CAUSES = {"failed", "unfit", "died"}  # answers of a rank that has failed by itself
log = logging.getLogger(__name__)


class RanksDied(RuntimeError):
    """A trial has lost the processes of its ranks. `cause` is a key in `RETRY_RULES`."""

    def __init__(self, message: str, cause: str = "killed") -> None:
        super().__init__(message)
        self.cause = cause


class RankUnfit(RanksDied):
    """A rank cannot train on its host; the message says why."""


class RankPool(ABC):
    """Processes for `count` ranks, which train one trial after another. They meet at a store on `host`."""

    def __init__(self, count: int, *, host: str = LOOPBACK) -> None:
        self.count, self._host = count, host
        self._active = range(count)  # ranks of the current attempt
        self._store: TCPStore | None = None
        self._attempts = itertools.count()

    @abstractmethod
    def start(self, count: int) -> None:
        """Starts those processes of the first `count` ranks that do not exist."""

    @abstractmethod
    def seat(self, **about: Any) -> Seat:
        """Returns the seat of a rank with these fields, and the GPU that it uses."""

    @abstractmethod
    def send(self, index: int, method: str, *arguments: Any) -> None:
        """Calls a method of `RankRun` in the process of a rank, without waiting for it."""

    @abstractmethod
    def receive(self, seconds: float) -> Iterator[tuple[int, Answer]]:
        """Waits for answers, at most so long; yields each with the index of its rank."""

    @abstractmethod
    def kill(self) -> None:
        """Kills all processes and waits until they are gone, as far as that can be known."""

    def begin(self, spec: TrialSpec, halvings: int) -> None:
        """Has all ranks begin an attempt at a trial; of a trained one, the first rank alone runs downstream tasks."""
        if self._store is None:
            self._store = open_store(self._host)
        self._active = range(self.count if spec.evaluation is None else 1)
        self.start(len(self._active))
        where = {"host": self._host, "port": self._store.port, "group": f"{os.getpid()}-{next(self._attempts)}"}
        for index in self._active:
            self.send(index, "begin", spec, self.seat(index=index, count=self.count, halvings=halvings, **where))

    def advance(self, *, leave: bool = False) -> None:
        """Has all ranks train to the next evaluation, or leave the trial."""
        for index in self._active:
            self.send(index, "advance", leave)

    def collect(self, check: Callable[[], object] = lambda: None) -> list[tuple[int, Answer]]:
        """Waits for the answers of all ranks, or for some time after a failure; in the order in which they came."""
        answers: list[tuple[int, Answer]] = []
        deadline = float("inf")
        while len(answers) < len(self._active) and (left := deadline - time.monotonic()) > 0:
            for index, answer in self.receive(min(left, 1.0)):
                answers.append((index, answer))
                if answer.kind not in STOPPED | {"evaluated"}:
                    deadline = min(deadline, time.monotonic() + GRACE)
            check()
        return answers


def run_on_ranks(spec: TrialSpec, pool: RankPool, *, check: Callable[[], object] = lambda: None) -> Trials:
    """Trains a trial on all ranks of `pool`, as `run_trials` does in one process.

    If memory runs out too late for the ranks to agree on smaller micro-batches, they are started again with these.

    Args:
        check: called about once per second while the ranks train; may raise.

    Raises:
        RanksDied: a rank has died, or its connection to the others; all processes have been killed.
    """
    for halvings in itertools.count():
        pool.begin(spec, halvings)
        if (yield from _attempt(spec, pool, check)):
            return
        log.warning("%s: out of memory on a rank; all start again, micro-batch halved %d x", spec.name, halvings + 1)


def _attempt(
    spec: TrialSpec, pool: RankPool, check: Callable[[], object]
) -> Generator[Updates, Collection[str] | None, bool]:
    """Returns whether the trial has ended or stopped; otherwise memory ran out too late for the ranks to agree."""
    try:
        answers = pool.collect(check)
        while (kinds := _kinds(answers)) == {"evaluated"}:
            interim = Updates(interim={spec.trial_id: next(filter(None, (each.result for _, each in answers)))})
            try:
                to_stop = yield interim
            except GeneratorExit:
                _stop(spec, pool)
                raise
            pool.advance(leave=spec.trial_id in (to_stop or ()))
            answers = pool.collect(check)
        if len(kinds) > 1 or not kinds <= STOPPED:
            pool.kill()
        if "late_oom" in kinds:
            return False
        if kinds <= {"paused", "left"}:
            yield Updates()
            return True
        result = _result(spec, answers)
    except GeneratorExit:
        raise
    except BaseException:
        pool.kill()
        raise
    yield Updates(ended={spec.trial_id: result})
    return True


def _kinds(answers: Sequence[tuple[int, Answer]]) -> set[str]:
    return {answer.kind for _, answer in answers}


def _result(spec: TrialSpec, answers: Sequence[tuple[int, Answer]]) -> TrialResult:
    """The result of the trial, or of the rank that failed first; raises RanksDied if the trial is to be retried."""
    if _kinds(answers) == {"ended"}:
        return next(filter(None, (answer.result for _, answer in answers)))
    causes = [(index, answer) for index, answer in answers if answer.kind in CAUSES]
    if not causes:
        reasons = ", ".join(sorted(_kinds(answers)))
        raise RanksDied(f"the ranks of {spec.name} have lost each other ({reasons})")
    index, answer = causes[0]
    if answer.kind == "unfit":
        raise RankUnfit(f"rank {index}: {answer.reason}")
    if answer.result is None:
        raise RanksDied(f"rank {index} of {spec.ranks} has died: {answer.reason}")
    return answer.result


def _stop(spec: TrialSpec, pool: RankPool) -> None:
    """Ends a trial that is closed at an evaluation: if a stop is requested, the ranks save it at their next step."""
    saves, kinds = stop_requested(spec.folder), {"evaluated"}
    while kinds == {"evaluated"}:
        pool.advance(leave=not saves)
        kinds = _kinds(pool.collect())
    if len(kinds) > 1 or not kinds <= STOPPED:
        pool.kill()
