"""Rotary position embedding (RoFormer, arXiv 2104.09864): position p turns each pair of channels by p * frequency.

Pairs are interleaved, (x[2i], x[2i+1]), as in the paper. This is a true rotation: it keeps lengths, and dot products
depend on the distance of two positions only. (The table in the official nGPT repository is not, see its issue 10.)
"""

import torch
from torch import Tensor


def rope_tables(length: int, head_dim: int, *, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, float32, each (length, head_dim / 2)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs of `x` (..., T, K) by the angles of `cos` and `sin` (T, K/2); float32 of x's shape."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
