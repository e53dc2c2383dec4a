"""Causal attention in C++, for compiled models on a CPU: attention.cpp.

In float32, and still 2 to 3 times as fast there as torch's attention in float32 or bfloat16 (docs/benchmarks.md). torch
knows it as an operation with a gradient, so that it may stand in a compiled graph.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ngpt.kernels.build import load_native

LONGEST = 1024  # tokens: a core keeps two squares of scores, and beyond this they are slower than torch's blocks


def has_cpu_attention() -> bool:
    """Whether `causal_attention` can be called here: it is built at the first question, once per machine."""
    return load_native("cpu_attention") is not None


@torch.library.custom_op("ngpt::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the tokens up to each one's own, on a CPU; differentiable once.

    Args:
        q: (B, T, H, K) float32.
        k: (B, T, G, K) float32, where H is a multiple of G: a key belongs to H / G heads.
        v: as k.
        scale: of the scores, above 0.

    Returns:
        (B, T, H, K), and the logarithm of each softmax's divisor (B, H, T), which has no gradient.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, log_sum = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    _call("attention_forward", [q, k, v], scale, [out, log_sum])
    return out, log_sum


@torch.library.custom_op("ngpt::causal_attention_backward", mutates_args=(), device_types="cpu")
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    given = [tensor.contiguous() for tensor in (q, k, v, out, log_sum, grad)]
    grad_q, grad_k, grad_v = (torch.empty_like(tensor) for tensor in given[:3])
    _call("attention_backward", given, scale, [grad_q, grad_k, grad_v])
    return grad_q, grad_k, grad_v


def _call(name: str, given: list[Tensor], scale: float, results: list[Tensor]) -> None:
    """Calls a function of attention.cpp, whose first two tensors are q and k."""
    batch, tokens, heads, width = given[0].shape
    sizes = (batch, heads, given[1].shape[2], tokens, width)
    getattr(load_native("cpu_attention"), name)(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in given),
        ctypes.c_float(scale),
        *map(ctypes.c_int64, sizes),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in results),
    )


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@_gradients.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_gradients(*ctx.saved_tensors, grad, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_keep)
