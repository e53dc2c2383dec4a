"""Keeping nGPT's matrices on the sphere: projection every N steps, and how far things have drifted in between."""

import torch
from torch import Tensor

from ngpt.model import GPT
from ngpt.norm import l2_normalize


@torch.no_grad()
def project_weights(model: GPT) -> None:
    """Scales every sphere weight's vectors back to length 1, in float32 (NVIDIA/ngpt calls this normalize_matrices).

    It runs after an optimizer step, every `project_every` steps. A GPT has nothing to project.
    """
    for weight, dim in model.sphere_weights():
        weight.copy_(l2_normalize(weight, dim))


@torch.no_grad()
def weight_norm_error(model: GPT) -> float:
    """The largest deviation from length 1 among all vectors of the sphere weights; 0 for a GPT."""
    errors = [_deviation(weight, dim) for weight, dim in model.sphere_weights()]
    return float(torch.stack(errors).max()) if errors else 0.0


@torch.no_grad()
def activation_norm_error(model: GPT, idx: Tensor) -> float:
    """The largest deviation from length 1 of the residual stream for tokens `idx` (B, T); 0 for a GPT."""
    if not model.cfg.on_sphere:
        return 0.0
    return float(torch.stack([_deviation(x, -1) for x in model.stream(idx)]).max())


def _deviation(x: Tensor, dim: int) -> Tensor:
    return (torch.linalg.vector_norm(x.float(), dim=dim) - 1).abs().max()
