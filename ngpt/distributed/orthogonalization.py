"""Muon's orthogonalization, shared by the ranks: each matrix has an owner, the one rank that computes it."""

import torch
import torch.distributed as dist
from torch import Tensor

from ngpt.distributed.ranks import ProcessRanks
from ngpt.optim.muon import orthogonalize


class SharedOrthogonalization:
    """Orthogonalizes a batch of matrices that all ranks have, or of which each has its part; see `orthogonalize`."""

    def __init__(self, ranks: ProcessRanks) -> None:
        self._ranks = ranks

    def __call__(self, matrices: Tensor, *, steps: int, split: int | None = None) -> Tensor:
        """Returns the same part of the result (n, M, N).

        Args:
            split: the dimension, 0 or 1, along which the ranks have equal parts of each matrix; None if they have all.
        """
        if split is None:
            return self._of_whole(matrices, steps)
        return self._of_parts(matrices, steps, axis=split + 1)  # after the batch dimension

    def _of_whole(self, matrices: Tensor, steps: int) -> Tensor:
        own, count = self._owned(len(matrices))
        result = matrices.new_zeros(count, *matrices.shape[1:])
        if own.stop > own.start:
            result[: own.stop - own.start] = orthogonalize(matrices[own], steps=steps)
        parts = [torch.empty_like(result) for _ in range(self._ranks.count)]
        dist.all_gather(parts, result, group=self._ranks.group)
        return torch.cat(parts)[: len(matrices)]

    def _of_parts(self, parts: Tensor, steps: int, *, axis: int) -> Tensor:
        """Sends the parts of each matrix to its owner, who alone has it whole, and the parts of the result back."""
        own, count = self._owned(len(parts))
        sent = parts.new_zeros(self._ranks.count, count, *parts.shape[1:])  # by owner
        sent.flatten(0, 1)[: len(parts)] = parts
        result = self._exchanged(sent)  # the parts of this rank's matrices, by the rank that has them
        if (number := own.stop - own.start) > 0:
            whole = orthogonalize(torch.cat([*result[:, :number]], dim=axis), steps=steps)
            result[:, :number] = torch.stack(whole.chunk(self._ranks.count, dim=axis))
        return self._exchanged(result).flatten(0, 1)[: len(parts)]

    def _owned(self, number: int) -> tuple[slice, int]:
        """The matrices of a batch that this rank owns, and how many a rank owns; the last ones may own fewer."""
        count = -(-number // self._ranks.count)
        start = min(number, self._ranks.index * count)
        return slice(start, min(number, start + count)), count

    def _exchanged(self, sent: Tensor) -> Tensor:
        """Sends entry i of the first dimension to rank i; returns what each rank has sent here."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._ranks.group)
        return received
