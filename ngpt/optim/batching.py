"""Batches matrices of equal shape, since many small GPU operations are dominated by kernel launches."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Group = dict[str, Any]  # an entry of `Optimizer.param_groups`
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Layout:
    """The shape of a whole parameter, and the dimension along which ranks have parts of it; None on one device."""

    shape: tuple[int, ...]
    split: int | None = None

    def attach(self, part: Tensor) -> None:
        """Remembers that `part` is the part that this rank has of a parameter."""
        part.whole_layout = self  # pyright: ignore[reportAttributeAccessIssue]


def layout(parameter: Tensor) -> Layout:
    """Returns the layout that was attached to a parameter, or that of a whole one."""
    return getattr(parameter, "whole_layout", Layout(tuple(parameter.shape)))


def trained(group: Group) -> list[Tensor]:
    """Returns the parameters of an optimizer group that have a gradient."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Groups items by key. Keys are ordered by first appearance, and the items of a key keep their order."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def stack(tensors: Sequence[Tensor | None]) -> Tensor:
    """Stacks matrices of equal shape to (n, rows, columns). A single matrix becomes a view, not a copy."""
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) == len(tensors), "an optimizer only steps parameters that have a gradient"
    return torch.stack(present) if len(present) > 1 else present[0].unsqueeze(0)


def write_back(tensors: Sequence[Tensor], batch: Tensor) -> None:
    """Copies a batch from `stack` back into its tensors. A single tensor is a view of its batch and needs no copy."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), batch.unbind())  # pyright: ignore[reportPrivateImportUsage]
