"""Rotary position embedding (RoFormer, arXiv 2104.09864): position p turns each pair of channels by p * frequency.

Pairs are interleaved, (x[2i], x[2i+1]), as in the paper. `rotary` is a true rotation; `nvidia` is what the official
nGPT repository computes instead (its issue 10), for loading its checkpoints. With a scaling, a model reads a context
`factor` times as long as the one it was trained with.
"""

import math

import torch
from torch import Tensor

YARN_SLOW, YARN_FAST = 1.0, 32.0  # turns over the trained context: alpha and beta of arXiv 2309.00071, section 3.2


def unscaled(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """The frequencies as trained."""
    return frequencies


def linear(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """Position interpolation (arXiv 2306.15595): squeezes all positions into the trained range."""
    return frequencies / factor


def ntk(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """NTK-aware: a larger base interpolates the slowest pair and keeps the fastest (arXiv 2309.00071, section 3.1)."""
    pairs = len(frequencies)
    exponents = torch.arange(pairs, dtype=frequencies.dtype) / max(1, pairs - 1)
    return frequencies * factor**-exponents


def yarn(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """NTK by parts (YaRN, arXiv 2309.00071, section 3.2): keeps pairs that turn often within the `trained` context,
    interpolates those that never complete a turn, and mixes the two in between."""
    turns = trained * frequencies / (2 * math.pi)
    kept = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


ROPE_SCALINGS = {"none": unscaled, "linear": linear, "ntk": ntk, "yarn": yarn}


def attention_temperature(scaling: str, factor: float) -> float:
    """An extra factor of the attention scores: YaRN sharpens them for a longer context (section 3.4)."""
    return (0.1 * math.log(factor) + 1) ** 2 if scaling == "yarn" else 1.0


def rope_tables(
    length: int, head_dim: int, *, base: float = 10_000.0, scaling: str = "none", factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of each position, float32 (length, head_dim / 2); trained with length / factor."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    frequencies = ROPE_SCALINGS[scaling](frequencies, factor, length / factor)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (..., T, K) with its channel pairs turned by the angles of `cos` and `sin` (T, K/2), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def nvidia_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What NVIDIA/ngpt's `apply_rotary_position_embeddings` computes for `x` (..., T, K), in float32: not a rotation.

    That code interleaves sine and cosine in one table but uses its halves as sine and cosine, and lacks two terms.
    """
    first, second = torch.stack((sin, cos), dim=-1).flatten(-2).chunk(2, dim=-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd * second, even * first), dim=-1).flatten(-2)


ROPE_KINDS = {"rotary": rotate, "nvidia": nvidia_rotate}
