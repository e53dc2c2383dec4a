"""Cross-entropy in C++ for CPUs with AVX512_BF16, 1.5 times as fast as with oneDNN (docs/benchmarks.md)."""

import ctypes

import torch
from torch import Tensor

from ngpt.kernels.build import load_native

PANEL = 48  # the vocabulary is padded to a multiple of this; must equal PANEL in the C++ file
WIDTH_MULTIPLE = 32  # D must be a multiple of this


def cpu_cross_entropy(
    x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, *, rows: int, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """Returns the mean cross-entropy of logits x @ (scale * weight).T and its gradients for x, weight and scale.

    x is (N, D) bfloat16, weight (V, D), scale (V,) or (1,), targets (N, 1) int64. `rows` rows of x are processed at a
    time. Gradients are float32, or None without `gradients`. Matrix products multiply bfloat16 and accumulate in
    float32; exponentials are stored in bfloat16; everything else is float32.

    Returns None if the kernel does not apply: the processor lacks AVX512_BF16, weight or scale is not float32, D is not
    a multiple of 32, a target is outside the vocabulary, or a logit is not finite or over 69 above the target's logit.
    """
    (n, width), vocabulary = x.shape, len(weight)
    parameters = [weight] if scale is None else [weight, scale]
    if width % WIDTH_MULTIPLE or any(parameter.dtype != torch.float32 for parameter in parameters):
        return None
    library = load_native("cpu_cross_entropy")
    if library is None or not hasattr(library, "cpu_cross_entropy"):  # empty library without AVX512_BF16
        return None
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    scale = None if scale is None else scale.contiguous()
    rows, padded_vocabulary = min(rows, n), -(-vocabulary // PANEL) * PANEL
    packed = torch.empty(2 if gradients else 1, padded_vocabulary, width, dtype=torch.bfloat16)
    other_sums = torch.empty(n)
    grad_logits = torch.empty(padded_vocabulary, -(-rows // 8) * 8, dtype=torch.bfloat16) if gradients else None
    grad_x = torch.empty(n, width) if gradients else None
    grad_weight = torch.empty(vocabulary, width) if gradients else None
    grad_scale = torch.empty(vocabulary) if gradients and scale is not None else None
    sizes = (0 if scale is None else len(scale), n, width, vocabulary, rows)
    failed = library.cpu_cross_entropy(
        *map(_pointer, (x, targets, weight, scale)),
        *map(ctypes.c_int64, sizes),
        *map(_pointer, (packed, grad_logits, other_sums, grad_x, grad_weight, grad_scale)),
    )
    if failed:
        return None
    if grad_scale is not None and scale is not None:
        grad_scale = grad_scale.sum_to_size(scale.shape)
    return other_sums.log1p().mean(), grad_x, grad_weight, grad_scale


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
