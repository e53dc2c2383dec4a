"""Cross-entropy of the head and its gradients in C++ for CPUs with AVX512_BF16: cpu_cross_entropy.cpp.

It is 1.5 times as fast as oneDNN's products with a pass over the logits between them (docs/benchmarks.md).
"""

import ctypes

import torch
from torch import Tensor

from ngpt.kernels.build import load_native

PANEL = 48  # the vocabulary is padded to a multiple of this, as in the C++
WIDTH_MULTIPLE = 32  # of D


def cpu_cross_entropy(
    x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, *, rows: int, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """Mean cross-entropy of logits x @ (scale * weight).T, and float32 gradients for x, weight and scale, if wanted.

    Products are in bfloat16 with float32 sums; everything else is in float32. x is (N, D) bfloat16, weight (V, D) and
    scale (V,) or (1,) float32, targets (N, 1) int64. `rows` are processed at once, with exponentials in bfloat16.

    Returns None if this kernel does not apply: another processor or dtype, D not a multiple of 32, a target outside the
    vocabulary, or a logit that is not finite or more than 69 above the target's.
    """
    (n, width), vocabulary = x.shape, len(weight)
    factors = [weight] if scale is None else [weight, scale]
    if width % WIDTH_MULTIPLE or any(factor.dtype != torch.float32 for factor in factors):
        return None
    library = load_native("cpu_cross_entropy")
    if library is None or not hasattr(library, "cpu_cross_entropy"):  # other processors get an empty library
        return None
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    scale = None if scale is None else scale.contiguous()
    rows, padded = min(rows, n), -(-vocabulary // PANEL) * PANEL
    packed = torch.empty(2 if gradients else 1, padded, width, dtype=torch.bfloat16)
    others = torch.empty(n)
    slope = torch.empty(padded, -(-rows // 8) * 8, dtype=torch.bfloat16) if gradients else None
    grad_x = torch.empty(n, width) if gradients else None
    grad_weight = torch.empty(vocabulary, width) if gradients else None
    grad_scale = torch.empty(vocabulary) if gradients and scale is not None else None
    sizes = (0 if scale is None else len(scale), n, width, vocabulary, rows)
    failed = library.cpu_cross_entropy(
        *map(_pointer, (x, targets, weight, scale)),
        *map(ctypes.c_int64, sizes),
        *map(_pointer, (packed, slope, others, grad_x, grad_weight, grad_scale)),
    )
    if failed:
        return None
    if grad_scale is not None and scale is not None:
        grad_scale = grad_scale.sum_to_size(scale.shape)
    return others.log1p().mean(), grad_x, grad_weight, grad_scale


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
