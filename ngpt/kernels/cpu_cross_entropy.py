"""The loss of the head and its gradients on a CPU with AVX512_BF16, as one program in C++: head.cpp.

It is for processors whose matrix products of bfloat16 are vector instructions (AMD from Zen 4 on, Intel's Cooper Lake):
1.5 times as fast there as products by oneDNN with a pass over the logits between them (docs/benchmarks.md).
"""

import ctypes

import torch
from torch import Tensor

from ngpt.kernels.build import load_native

PANEL = 48  # the vocabulary is filled up to a multiple of it, as in head.cpp
WIDTHS = 32  # D must be a multiple of it


def cpu_cross_entropy(
    x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, *, rows: int, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """The mean cross-entropy of logits x @ (scale * weight).T, and its gradients for x, weight and scale.

    The products are in bfloat16 with sums in float32, everything else is in float32.

    Args:
        x: (N, D) bfloat16.
        weight: (V, D) float32.
        scale: (V,) or (1,) float32, or None.
        targets: (N, 1) int64.
        rows: how many rows are walked at once: for so many the exponentials (rows, V) lie in memory, in bfloat16.
        gradients: whether they are wanted; else they are None.

    Returns:
        Loss (), gradients (N, D), (V, D) and as the scale, in float32; None where this way does not fit: another
        processor, D not a multiple of 32, a target outside the vocabulary, or logits that are not finite or more than
        69 above that of the target.
    """
    (n, width), vocabulary = x.shape, len(weight)
    factors = [weight] if scale is None else [weight, scale]
    if width % WIDTHS or any(factor.dtype != torch.float32 for factor in factors):
        return None
    library = load_native("cpu_cross_entropy")
    if library is None or not hasattr(library, "linear_cross_entropy"):  # it is empty for another processor
        return None
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    scale = None if scale is None else scale.contiguous()
    rows, filled = min(rows, n), -(-vocabulary // PANEL) * PANEL
    packed = torch.empty(2 if gradients else 1, filled, width, dtype=torch.bfloat16)
    others = torch.empty(n)
    slope = torch.empty(filled, -(-rows // 8) * 8, dtype=torch.bfloat16) if gradients else None
    grad_x = torch.empty(n, width) if gradients else None
    grad_weight = torch.empty(vocabulary, width) if gradients else None
    grad_scale = torch.empty(vocabulary) if gradients and scale is not None else None
    sizes = (0 if scale is None else len(scale), n, width, vocabulary, rows)
    failed = library.linear_cross_entropy(
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
