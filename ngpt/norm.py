"""Normalisations: onto the unit sphere (nGPT) and to unit root mean square (GPT); always computed in float32."""

import torch.nn.functional as F
from torch import Tensor


def l2_normalize(x: Tensor, dim: int = -1) -> Tensor:
    """`x` scaled to Euclidean length 1 along `dim`, as float32 of the same shape (nGPT's Norm, arXiv 2410.01131, 2.1).

    The zero vector stays zero instead of becoming NaN as in the official repository. The result is float32 whatever
    goes in: a stream of some 100 normalisations in bfloat16 compounds its rounding.
    """
    return F.normalize(x.float(), dim=dim, eps=1e-12)


def rms_norm(x: Tensor) -> Tensor:
    """`x` scaled to root mean square 1 along the last dimension, without learned gain, as float32 (nanochat's norm)."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6)
