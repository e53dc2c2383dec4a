"""Rotary position embedding (RoFormer, arXiv 2104.09864): each channel pair is rotated by position * frequency.

Pairs are interleaved, (x[2i], x[2i+1]), as in the paper. `rotary` is a true rotation. `nvidia` is what the official
nGPT repository computes instead (its issue 10), needed to load its checkpoints. RoPE scaling extends the context to
`factor` times the length the model was trained with.
"""

import math

import torch
from torch import Tensor

SLOW = 1.0  # rotations per trained context: alpha of YaRN, arXiv 2309.00071, section 3.2, and as in Llama 3.1
YARN_FAST, LLAMA3_FAST = 32.0, 4.0  # YaRN's beta, and the value of Llama 3.1


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
    return _by_parts(frequencies, factor, trained, fast=YARN_FAST)


def llama3(frequencies: Tensor, factor: float, trained: float) -> Tensor:
    """NTK by parts as in Llama 3.1: pairs with at least 4 rotations keep their frequency; no change of temperature.

    Source: `_compute_llama3_parameters` in Hugging Face's transformers, with low and high factors of 1 and 4.
    """
    return _by_parts(frequencies, factor, trained, fast=LLAMA3_FAST)


def _by_parts(frequencies: Tensor, factor: float, trained: float, *, fast: float) -> Tensor:
    rotations = trained * frequencies / (2 * math.pi)
    ramp = ((rotations - SLOW) / (fast - SLOW)).clamp(0, 1)
    return frequencies * (ramp + (1 - ramp) / factor)


ROPE_SCALINGS = {"none": unscaled, "linear": linear, "ntk": ntk, "yarn": yarn, "llama3": llama3}


def attention_temperature(scaling: str, factor: float) -> float:
    """Returns the factor by which YaRN multiplies attention scores for a longer context (section 3.4); else 1."""
    return (0.1 * math.log(factor) + 1) ** 2 if scaling == "yarn" else 1.0


def rope_tables(
    length: int,
    head_dim: int,
    *,
    base: float = 10_000.0,
    scaling: str = "none",
    factor: float = 1.0,
    trained: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines, float32 (length, head_dim / 2).

    The model was trained on contexts of `trained` tokens; None means length / factor.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    frequencies = ROPE_SCALINGS[scaling](frequencies, factor, length / factor if trained is None else trained)
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
