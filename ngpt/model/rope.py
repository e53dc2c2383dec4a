"""Rotary position embedding (RoFormer, arXiv 2104.09864): each channel pair is rotated by position * frequency.

Pairs are interleaved, (x[2i], x[2i+1]), as in the paper. `rotary` is a true rotation. `nvidia` is what the official
nGPT repository computes instead (its issue 10), needed to load its checkpoints. RoPE scaling extends the context to
`factor` times the length the model was trained with.
"""

import math

import torch
from torch import Tensor

YARN_SLOW, YARN_FAST = 1.0, 32.0  # rotations per trained context: alpha and beta of arXiv 2309.00071, section 3.2


def unscaled(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """Keeps the frequencies."""
    return frequencies


def linear(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """Position interpolation (arXiv 2306.15595): compresses all positions into the trained range."""
    return frequencies / factor


def ntk(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """NTK-aware: divides the lowest frequency by `factor` and keeps the highest (arXiv 2309.00071, section 3.1)."""
    pairs = len(frequencies)
    exponents = torch.arange(pairs, dtype=frequencies.dtype) / max(1, pairs - 1)
    return frequencies * factor**-exponents


def yarn(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """NTK by parts (YaRN, arXiv 2309.00071, section 3.2): keeps high frequencies and divides low ones by `factor`.

    Pairs with at least 32 rotations within the `trained` context keep their frequency, pairs with at most one rotation
    are interpolated, and the others mix the two linearly.
    """
    rotations = trained * frequencies / (2 * math.pi)
    ramp = ((rotations - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
    return frequencies * (ramp + (1 - ramp) / factor)


ROPE_SCALINGS = {"none": unscaled, "linear": linear, "ntk": ntk, "yarn": yarn}


def attention_temperature(scaling: str, factor: float) -> float:
    """Returns the factor by which YaRN multiplies attention scores for a longer context (section 3.4); else 1."""
    return (0.1 * math.log(factor) + 1) ** 2 if scaling == "yarn" else 1.0


def rope_tables(
    length: int, head_dim: int, *, base: float = 10_000.0, scaling: str = "none", factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines, float32 (length, head_dim / 2), for a model trained on length / factor tokens."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    frequencies = ROPE_SCALINGS[scaling](frequencies, factor, length / factor)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs of `x` (..., T, K) by the angles of `cos` and `sin` (T, K / 2), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def nvidia_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes NVIDIA/ngpt's `apply_rotary_position_embeddings` for `x` (..., T, K), in float32; it is no rotation.

    That code reads the halves of a table of interleaved sines and cosines, and omits two of the four terms.
    """
    first, second = torch.stack((sin, cos), dim=-1).flatten(-2).chunk(2, dim=-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd * second, even * first), dim=-1).flatten(-2)


ROPE_KINDS = {"rotary": rotate, "nvidia": nvidia_rotate}
