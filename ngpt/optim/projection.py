"""Projects nGPT's matrices onto the sphere after optimizer steps."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ngpt.model.gpt import GPT
from ngpt.optim.batching import group_by, stack, write_back

# Normalized together; small enough that the second read hits the cache.
BATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}


def project_weights(model: GPT) -> None:
    """Normalizes the vectors of all sphere weights in place, in float32 (normalize_matrices in NVIDIA/ngpt)."""
    project(model.sphere_weights())


@torch.no_grad()
def project(sphere_weights: Iterable[tuple[Tensor, int]]) -> None:
    """Normalizes the vectors of (matrix, dimension) pairs to unit length in place."""
    for weights, dim in _batches(sphere_weights):
        batch = stack(weights)
        split_size = max(1, _budget(batch) * batch.shape[-1 - dim] // batch.nbytes)
        for vectors in batch.split(split_size, dim=-1 - dim):
            exact = torch.promote_types(vectors.dtype, torch.float32)
            length = torch.linalg.vector_norm(vectors, dim=dim - 2, keepdim=True, dtype=exact)
            vectors.div_(length.clamp_min_(1e-12))  # the zero vector stays zero, as in l2_normalize
        write_back(weights, batch)


def _batches(weights: Iterable[tuple[Tensor, int]]) -> Iterator[tuple[list[Tensor], int]]:
    """Yields lists of weights of equal shape, dtype and dimension that fit `BATCH_BYTES`, or one larger weight."""
    for (_, _, dim), group in group_by(weights, lambda item: (item[0].shape, item[0].dtype, item[1])).items():
        members = [weight for weight, _ in group]
        count = max(1, _budget(members[0]) // members[0].nbytes)
        for start in range(0, len(members), count):
            yield members[start : start + count], dim


def _budget(tensor: Tensor) -> int:
    return BATCH_BYTES.get(tensor.device.type, BATCH_BYTES["cpu"])
