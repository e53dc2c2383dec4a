"""Muon: momentum whose update is replaced by the nearest semi-orthogonal matrix.

Source: Keller Jordan, kellerjordan.github.io/posts/muon. Equivalent to torch.optim.Muon with `adjust_lr_fn="original"`.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngpt.optim.batching import Group, group_by, layout, stack, trained


def orthogonalize(matrices: Tensor, *, steps: int = 5, split: None = None) -> Tensor:
    """Returns approximately U V^T for each matrix with singular value decomposition U S V^T, (..., M, N).

    Uses a Newton-Schulz iteration with a quintic polynomial of maximal slope at zero, after which singular values lie
    between about 0.7 and 1.2. Runs in bfloat16, as in the original, on a GPU and under autocast, else in float32.
    `split` is for ranks that have parts of each matrix (ngpt/distributed/orthogonalization.py).
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # source: KellerJordan/Muon, zeropower_via_newtonschulz5
    device = matrices.device.type
    dtype = torch.bfloat16 if device == "cuda" or torch.is_autocast_enabled(device) else torch.float32
    x = matrices.float().flatten(0, -3) if matrices.ndim > 2 else matrices.float().unsqueeze(0)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        # a x + (b gram + c gram^2) x, with each addition fused into a matrix product
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


class Muon(torch.optim.Optimizer):
    """Muon, for 2-D parameters only.

    Args:
        lr: learning rate; an update has spectral norm about lr * sqrt(max(1, rows / columns)).
        momentum: decay rate of the exponential moving average of gradients.
        nesterov: use Nesterov momentum.
        ns_steps: number of Newton-Schulz iterations.
        weight_decay: decoupled; a step scales the weights by 1 - lr * weight_decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, settings | {"weight_decay": weight_decay})
        self.orthogonalize: Callable[..., Tensor] = orthogonalize
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if shapes:
            raise ValueError(f"Muon takes matrices only, got parameters of shape {shapes}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters; matrices of equal shape are orthogonalized as one batch."""
        if closure is not None:
            raise ValueError("Muon does not take a closure")
        step_muons([self])

    def directions(self, parameters: list[Tensor], group: Group) -> Sequence[Tensor]:
        """Updates the momentum and returns, per parameter, the matrix to orthogonalize."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        if not group["nesterov"]:
            return momenta
        return torch._foreach_lerp(gradients, momenta, group["momentum"])  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def step_muons(optimizers: Iterable[Muon]) -> None:
    """Steps several Muon optimizers; matrices of equal shape are orthogonalized as one batch across optimizers."""
    entries = [
        (optimizer, group, shape, parameters)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for shape, parameters in group_by(trained(group), layout).items()
    ]
    for (matrix, ns_steps), batch in group_by(entries, lambda entry: (entry[2], entry[1]["ns_steps"])).items():
        rows, columns = matrix.shape
        directions = [optimizer.directions(parameters, group) for optimizer, group, _, parameters in batch]
        matrices = stack([*itertools.chain(*directions)])
        updates = iter(batch[0][0].orthogonalize(matrices, steps=ns_steps, split=matrix.split).unbind())
        for _, group, _, parameters in batch:
            step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
            if shrinkage := group["lr"] * group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - shrinkage)  # pyright: ignore[reportPrivateImportUsage]
            own_updates = list(itertools.islice(updates, len(parameters)))
            torch._foreach_add_(parameters, own_updates, alpha=-step_size)  # pyright: ignore[reportPrivateImportUsage]
