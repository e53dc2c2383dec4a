"""Keeping nGPT's matrices on the sphere: projection every N steps."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ngpt.model.gpt import GPT
from ngpt.optim.muon import stack, write_back

MIB = 2**20
# What is normalised at once: it is read twice, and the second time it should still be in the cache.
BATCH_BYTES = {"cpu": 4 * MIB, "cuda": 32 * MIB}


def project_weights(model: GPT) -> None:
    """Scales every sphere weight's vectors back to length 1, in float32 (NVIDIA/ngpt calls this normalize_matrices).

    It runs after an optimizer step, every `project_every` steps. A GPT has nothing to project.
    """
    project(model.sphere_weights())


@torch.no_grad()
def project(sphere_weights: Iterable[tuple[Tensor, int]]) -> None:
    """Scales matrices' vectors, along the dimension beside each, to length 1.

    Each weight is read and written once, where it lies, and small weights of one shape are one batch: launches are what
    they cost on a GPU.
    """
    for weights, dim in _batches(sphere_weights):
        batch = stack(weights)
        for vectors in batch.split(_at_once(batch, dim), dim=-1 - dim):
            exact = torch.promote_types(vectors.dtype, torch.float32)
            length = torch.linalg.vector_norm(vectors, dim=dim - 2, keepdim=True, dtype=exact)
            vectors.div_(length.clamp_min_(1e-12))  # as in l2_normalize: the zero vector stays zero
        write_back(weights, batch)


def _batches(weights: Iterable[tuple[Tensor, int]]) -> Iterator[tuple[list[Tensor], int]]:
    """Weights of one shape, type and dimension together, as many as fit `BATCH_BYTES`, or one."""
    alike: dict[object, list[tuple[Tensor, int]]] = defaultdict(list)
    for weight, dim in weights:
        alike[weight.shape, weight.dtype, dim].append((weight, dim))
    for group in alike.values():
        (first, dim), members = group[0], [weight for weight, _ in group]
        count = max(1, _budget(first) // first.nbytes)
        for start in range(0, len(members), count):
            yield members[start : start + count], dim


def _at_once(batch: Tensor, dim: int) -> int:
    """How many vectors, which are counted along the other dimension, of each weight of the batch fit `BATCH_BYTES`."""
    return max(1, _budget(batch) * batch.shape[-1 - dim] // batch.nbytes)


def _budget(tensor: Tensor) -> int:
    return BATCH_BYTES.get(tensor.device.type, BATCH_BYTES["cpu"])
