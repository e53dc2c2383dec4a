"""The ranks of a run: one process for each device, which trains on its share of every batch.

All ranks take the same decisions from the same numbers, so that they never wait for different things. What only one
rank can know, such as a stop request or that its memory has run out, is agreed on here.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.config.base import UserError
from ngpt.system.memory import is_out_of_memory

EXIT_RANK_LOST = 75  # EX_TEMPFAIL of sysexits.h
EXIT_LATE_OOM = 76
HALVINGS_VARIABLE = "NGPT_MICROBATCH_HALVINGS"  # with which the ranks of `--ranks` start again
Value = TypeVar("Value")


class OtherRankOutOfMemory(MemoryError):
    """Memory has run out on another rank, so this one repeats the step too."""


class LateOutOfMemory(UserError):
    """Memory has run out on this rank while the others were waiting for its gradients, so none can repeat the step."""

    exit_code = EXIT_LATE_OOM


class RankLost(UserError):
    """Another rank has ended, so this one cannot go on."""

    exit_code = EXIT_RANK_LOST


class Ranks:
    """The only rank of a run on one device; `ProcessRanks` is one of several."""

    index, count = 0, 1
    halvings = 0  # of the micro-batch, that the run starts with

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files of the run."""
        return self.index == 0

    def share(self, batch_size: int) -> slice:
        """The rows of a batch that this rank trains on."""
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)

    def folder(self, run_folder: Path) -> Path:
        """The folder for metrics and heartbeat of this rank; the run's own folder for the first rank."""
        return run_folder if self.is_first else run_folder / f"rank_{self.index}"

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks of each value."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of each value."""
        return values

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order; any that can be pickled."""
        return [value]

    def from_first(self, value: Callable[[], Value]) -> Value:
        """Calls a function on the first rank only, and returns its result on all ranks."""
        return value()

    def together(self, action: Callable[[], Value]) -> list[Value]:
        """Calls a function on every rank and returns the results of all.

        If it raises OSError on a rank, or memory runs out there, all ranks raise that.
        """
        return [action()]

    def agree_to_stop(self, wish: bool) -> bool:
        """Whether to stop before this step. Several ranks agree on the wishes of the step before."""
        return wish

    def stops(self, wish: bool) -> bool:
        """Whether the caller may close the run at this yield: if it wishes to, and all ranks close it here."""
        return wish

    @contextlib.contextmanager
    def agreement_on_memory(self, *, can_shrink: bool = True) -> Iterator[Callable[[], None]]:
        """Raises MemoryError on all ranks if memory runs out on any, until the yielded function has been called.

        Call it before the ranks begin to exchange gradients. After that, `LateOutOfMemory` asks for a new start with
        smaller micro-batches, if they `can_shrink`.
        """
        yield lambda: None


ALONE = Ranks()


class ProcessRanks(Ranks):
    """One of several ranks, in the process groups `group` (of the devices) and `control` (of the CPUs)."""

    def __init__(self, group: dist.ProcessGroup, control: dist.ProcessGroup, *, halvings: int | None = None) -> None:
        self.index, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.group, self.control = group, control
        self.halvings = int(os.environ.get(HALVINGS_VARIABLE) or 0) if halvings is None else halvings
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._agreed = False

    def mean(self, values: Tensor) -> Tensor:
        return self.total(values) / self.count

    def total(self, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed, group=self.group)
        return summed

    def gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Callable[[], Value]) -> Value:
        values = [value() if self.is_first else None]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]  # pyright: ignore[reportReturnType]

    def together(self, action: Callable[[], Value]) -> list[Value]:
        """If it raised on several ranks, all raise the error of the first of these."""
        result: Value | None = None
        failure: OSError | MemoryError | None = None
        try:
            result = action()
        except OSError as error:
            failure = error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = MemoryError(f"rank {self.index}: {error}")
        outcomes = self.gather((result, failure))
        for _, failed in outcomes:
            if failed is not None:
                raise failed
        return [result for result, _ in outcomes]  # pyright: ignore[reportReturnType]

    def agree_to_stop(self, wish: bool) -> bool:
        """Whether any rank has wished to stop; the wishes travel while the ranks train, so none waits."""
        pending, wishes = self._pending, torch.tensor([int(wish)])
        if pending is not None:
            work, before = pending
            work.wait()  # it has had a step's time
            self._agreed = self._agreed or bool(before)
        work = dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self.control, async_op=True)
        assert work is not None
        self._pending = work, wishes
        return self._agreed

    def stops(self, wish: bool) -> bool:
        return self._agreed

    @contextlib.contextmanager
    def agreement_on_memory(self, *, can_shrink: bool = True) -> Iterator[Callable[[], None]]:
        """The ranks meet where the yielded function is called; one that runs out of memory before meets them there."""
        has_agreed = False

        def agree() -> None:
            nonlocal has_agreed
            has_agreed = True
            if self._any(False):
                raise OtherRankOutOfMemory("memory has run out on another rank")

        try:
            yield agree
        except OtherRankOutOfMemory:
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if has_agreed and not can_shrink:
                raise
            if has_agreed:
                raise LateOutOfMemory(f"rank {self.index} ran out of memory while gradients were exchanged") from None
            self._any(True)  # the others wait for this
            raise

    def _any(self, flag: bool) -> bool:
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flags)
