"""Data parallel training: every rank has the whole model, and they average their gradients."""

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ngpt.distributed.compression import COMPRESSIONS
from ngpt.distributed.orthogonalization import SharedOrthogonalization
from ngpt.distributed.ranks import ProcessRanks
from ngpt.distributed.replica import Replica
from ngpt.model.gpt import GPT
from ngpt.optim.muon import Muon
from ngpt.optim.riemannian import GeodesicMuon


class DataParallelReplica(Replica):
    """A copy of the model. Gradients are averaged in buckets during the backward pass, in `gradient_dtype`.

    The weights stay equal on all ranks, because every rank makes the same update. Only what Muon computes for a matrix,
    which is the most expensive part, is computed by one rank and sent to the others.
    """

    def __init__(self, model: GPT, ranks: ProcessRanks, *, gradient_dtype: str) -> None:
        super().__init__(model, ranks)
        self._orthogonalize = SharedOrthogonalization(ranks)
        with warnings.catch_warnings():
            # The new name of `broadcast_buffers` came with torch 2.13, and this project runs with older ones too.
            warnings.simplefilter("ignore", FutureWarning)
            self._module = DistributedDataParallel(
                model, process_group=ranks.group, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if (compress := COMPRESSIONS[gradient_dtype]) is not None:
            self._module.register_comm_hook(None, compress(ranks.group))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self._module(idx, targets)

    def adopt(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, Muon | GeodesicMuon):
                optimizer.orthogonalize = self._orthogonalize

    def keep_gradients(self) -> contextlib.AbstractContextManager[None]:
        return self._module.no_sync()
