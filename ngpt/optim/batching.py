"""Matrices of equal shape as one batch: on a GPU, many small operations cost launches rather than arithmetic."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Group = dict[str, Any]  # an entry of `Optimizer.param_groups`
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def trained(group: Group) -> list[Tensor]:
    """The parameters of an optimizer's group that have a gradient."""
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def group_by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items under their keys, both in the order of first appearance."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def stack(tensors: Sequence[Tensor | None]) -> Tensor:
    """Matrices of one shape as a batch (n, rows, columns). A single one is not copied."""
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) == len(tensors), "an optimizer only steps parameters that have a gradient"
    return torch.stack(present) if len(present) > 1 else present[0].unsqueeze(0)


def write_back(tensors: Sequence[Tensor], batch: Tensor) -> None:
    """Copies a `stack` that was changed in place back into its tensors. A single one was not copied."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), batch.unbind())  # pyright: ignore[reportPrivateImportUsage]
