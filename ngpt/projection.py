"""Keeping nGPT's matrices on the sphere: projection every N steps."""

import torch

from ngpt.model import GPT
from ngpt.norm import l2_normalize


@torch.no_grad()
def project_weights(model: GPT) -> None:
    """Scales every sphere weight's vectors back to length 1, in float32 (NVIDIA/ngpt calls this normalize_matrices).

    It runs after an optimizer step, every `project_every` steps. A GPT has nothing to project.
    """
    for weight, dim in model.sphere_weights():
        weight.copy_(l2_normalize(weight, dim))
