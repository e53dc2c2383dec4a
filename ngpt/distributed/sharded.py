"""Fully sharded training (FSDP2): every rank has a part of each weight, its gradient and its moments.

A weight is whole on a rank only while a block computes with it. Parts are cut so that each unit vector of a matrix on
the sphere is on one rank, which projects and rotates it alone.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ngpt.config.base import ConfigError
from ngpt.distributed.orthogonalization import SharedOrthogonalization
from ngpt.distributed.ranks import ProcessRanks
from ngpt.distributed.replica import Replica
from ngpt.model.gpt import GPT
from ngpt.optim.batching import Layout
from ngpt.optim.muon import Muon
from ngpt.optim.riemannian import GeodesicMuon

FORWARD_METHODS = ("features", "features_uncompiled", "logits", "loss", "token_losses")


class ShardedReplica(Replica):
    """A rank's parts of the model. Optimizers update the parts as plain tensors.

    Raises ConfigError if a matrix of the blocks cannot be divided among the ranks.
    """

    exchanges_weights = True
    saves_shards = True

    def __init__(self, model: GPT, ranks: ProcessRanks) -> None:
        super().__init__(model, ranks)
        self._orthogonalize = SharedOrthogonalization(ranks)
        dims = {id(weight): dim for weight, dim in model.sphere_weights()}
        self.check_divisible(model, ranks.count)
        mesh = DeviceMesh.from_group(ranks.group, model.wte.weight.device.type)

        def placement(parameter: nn.Parameter) -> Shard:
            return Shard(1 - dims.get(id(parameter), 1))

        for block in model.blocks:
            fully_shard(block, mesh=mesh, shard_placement_fn=placement)
        fully_shard(model, mesh=mesh, shard_placement_fn=placement)
        self._parts = {id(parameter): self._part(parameter) for parameter in model.parameters()}
        self._whole = {id(self._parts[id(each)]): each for each in self.model.parameters() if isinstance(each, DTensor)}

    @staticmethod
    def check_divisible(model: GPT, count: int) -> None:
        """Raises ConfigError if a matrix of the blocks cannot be divided among so many ranks."""
        dims = {id(weight): dim for weight, dim in model.sphere_weights()}
        for name, parameter in model.named_parameters():
            size = parameter.shape[1 - dims.get(id(parameter), 1)]
            if parameter.ndim == 2 and name.startswith("blocks.") and size % count:
                raise ConfigError(f"strategy fsdp: {name} has {size} vectors, which {count} ranks cannot divide")

    @staticmethod
    def _part(parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        part = parameter.to_local().detach()
        (placement,) = parameter.placements
        assert isinstance(placement, Shard)
        Layout(tuple(parameter.shape), placement.dim).attach(part)
        return part

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(idx, targets)

    def adopt(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self._parts[id(parameter)] for parameter in group["params"]]
            if isinstance(optimizer, Muon | GeodesicMuon):
                optimizer.orthogonalize = self._orthogonalize

    def parameters(self) -> list[Tensor]:
        for parameter in self.model.parameters():
            gradient = parameter.grad
            assert gradient is None or isinstance(gradient, DTensor)
            self._parts[id(parameter)].grad = None if gradient is None else gradient.to_local()
        return list(self._parts.values())

    def gradient_norm(self) -> Tensor:
        return self.ranks.total(super().gradient_norm().square()).sqrt()

    @contextlib.contextmanager
    def keep_gradients(self) -> Iterator[None]:
        self._module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._module.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gathers the weights of every block at once, and frees them at the end of the `with` block."""
        modules = [each for each in self.model.modules() if isinstance(each, FSDPModule)]
        # Only here, where they are called by themselves: as parts of a training pass, each would gather the weights
        # outside the blocks anew, forward and backward.
        for name in FORWARD_METHODS:
            register_fsdp_forward_method(self.model, name)
        self._module.set_reshard_after_forward(False)
        for module in modules:
            module.unshard()
        try:
            yield
        finally:
            for name in FORWARD_METHODS:
                delattr(self.model, name)  # leaves the method of the class
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self._module, recurse=False)

    def sphere_weights(self) -> Iterator[tuple[Tensor, int]]:
        return ((self._parts[id(weight)], dim) for weight, dim in self.model.sphere_weights())

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        own = self.model.state_dict()
        assert own.keys() == weights.keys()
        for name, value in own.items():
            value.copy_(self._distribute(weights[name], value) if isinstance(value, DTensor) else weights[name])

    def load_moments(self, optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Any]]) -> None:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(self._own_part(optimizer, state))

    def names(self) -> dict[int, str]:
        return {id(self._parts[id(each)]): name for name, each in self.model.named_parameters()}

    def shared(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        whole = self._whole[id(parameter)]
        layout = {"shape": whole.shape, "stride": whole.stride()}
        return DTensor.from_local(tensor, whole.device_mesh, whole.placements, **layout)

    @property
    def _module(self) -> FSDPModule:
        assert isinstance(self.model, FSDPModule)
        return self.model

    def _own_part(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Cuts the whole moments of a state of an optimizer; counters stay as they are."""
        parameters = [self._whole[id(part)] for group in optimizer.param_groups for part in group["params"]]
        moments = {
            index: {
                name: self._distribute(value, parameters[index]).to_local() if _is_moment(value) else value
                for name, value in values.items()
            }
            for index, values in state["state"].items()
        }
        return state | {"state": moments}

    @staticmethod
    def _distribute(whole: Tensor, like: DTensor) -> DTensor:
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
