"""The model as one rank trains it; the only rank of a run has all of it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ngpt.distributed.ranks import Ranks
from ngpt.distributed.shards import read_shards
from ngpt.model.gpt import GPT


class Replica:
    """A model, and what several ranks would have to do together with it."""

    exchanges_weights = False  # whether the ranks wait for each other in a forward pass already
    saves_shards = False  # whether each rank saves its own parts of weights and moments

    def __init__(self, model: GPT, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy of a micro-batch (B, T) of this rank in nats."""
        return self.model(idx, targets)

    def adopt(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Prepares optimizers that have just been built for the parameters of the model."""

    def parameters(self) -> list[Tensor]:
        """What the optimizers of this rank update, with the gradients of the last backward pass."""
        return list(self.model.parameters())

    def gradient_norm(self) -> Tensor:
        """The norm of the gradient of all parameters, on the device."""
        return nn.utils.get_total_norm([each.grad for each in self.parameters() if each.grad is not None])

    def keep_gradients(self) -> contextlib.AbstractContextManager[None]:
        """In the `with` block, gradients are added up on this rank and not exchanged."""
        return contextlib.nullcontext()

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """In the `with` block, the model has all of its weights on this rank, without gradients."""
        return contextlib.nullcontext()

    def sphere_weights(self) -> Iterator[tuple[Tensor, int]]:
        """Yields what this rank has of each matrix on the sphere, with the dimension of its unit vectors."""
        return self.model.sphere_weights()

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the state dict of a whole model."""
        self.model.load_state_dict(weights)

    def moments(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
        """Returns the states of the optimizers as one device would have them."""
        return [optimizer.state_dict() for optimizer in optimizers]

    def load_moments(self, optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Any]]) -> None:
        """Loads states that `moments` has returned, on any number of ranks."""
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def names(self) -> dict[int, str]:
        """The names of the tensors that the optimizers of this rank update, by `id`."""
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def shared(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Returns a tensor of the shape of `parameter`, which optimizers update, as shards hold it."""
        return tensor

    def split_moments(self, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
        """Returns this rank's moments by name, and the states of the optimizers with these names in their place."""
        moments: dict[str, Tensor] = {}
        states: list[dict[str, Any]] = []
        for number, optimizer in enumerate(optimizers):
            parameters, state = self._numbered(optimizer), optimizer.state_dict()
            entries = {index: dict(values) for index, values in state["state"].items()}
            for index, values in entries.items():
                name, parameter = parameters[index]
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.ndim:
                        values[key] = f"{number}.{name}.{key}"
                        moments[values[key]] = self.shared(value, parameter)
            states.append(state | {"state": entries})
        return moments, states

    def load_split_moments(
        self, optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Any]], folder: Path
    ) -> None:
        """Loads states that `split_moments` has returned, and reads the moments from shards."""
        own: dict[str, Tensor] = {}
        parts: dict[str, Tensor] = {}
        for optimizer, state in zip(optimizers, states, strict=True):
            parameters = self._numbered(optimizer)
            for index, values in state["state"].items():
                for key, name in values.items():
                    if isinstance(name, str):
                        parameter = parameters[index][1]
                        values[key] = own[name] = torch.empty_like(parameter)
                        parts[name] = self.shared(own[name], parameter)
        if parts:
            read_shards(folder, parts)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def load_shards(self, folder: Path) -> None:
        """Reads the weights that this rank has, from shards of any number of ranks."""
        with torch.no_grad():
            read_shards(folder, self.model.state_dict())

    def _numbered(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        """The parameters of an optimizer with their names, as its state dict numbers them."""
        names = self.names()
        return [(names[id(each)], each) for group in optimizer.param_groups for each in group["params"]]

    @torch.no_grad()
    def collect_counts(self) -> None:
        """Moves the counts of divisors that were not finite to the first rank, which saves them."""
        if self.model.normalizer is not None and self.ranks.count > 1:
            counts = self.model.normalizer.replaced
            total = self.ranks.total(counts)
            counts.copy_(total if self.ranks.is_first else torch.zeros_like(total))
