"""Causal attention in C++ for compiled models on a CPU, 2 to 3 times as fast as torch's (docs/benchmarks.md).

It is registered as a torch operator, so compiled graphs can contain it.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ngpt.kernels.build import load_native

MAX_TOKENS = 1024  # each core holds two (T, T) score matrices; for longer sequences torch's blockwise kernel is faster


def has_cpu_attention() -> bool:
    """Whether `causal_attention` can be built on this machine; the first call builds it."""
    return load_native("cpu_attention") is not None


@torch.library.custom_op("ngpt::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns causal softmax(scale * q k^T) v (B, T, H, K) and the log-sum-exp of the scores (B, H, T), on a CPU.

    q is (B, T, H, K); k and v are (B, T, G, K), so H / G query heads share each key head. All are float32; scale is
    positive. The first output is differentiable once, the log-sum-exp is not.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, log_sum_exp = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    _call("attention_forward", [q, k, v], scale, [out, log_sum_exp])
    return out, log_sum_exp


@torch.library.custom_op("ngpt::causal_attention_backward", mutates_args=(), device_types="cpu")
def _attention_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [tensor.contiguous() for tensor in (q, k, v, out, log_sum_exp, grad)]
    grad_q, grad_k, grad_v = (torch.empty_like(tensor) for tensor in inputs[:3])
    _call("attention_backward", inputs, scale, [grad_q, grad_k, grad_v])
    return grad_q, grad_k, grad_v


def _call(name: str, inputs: list[Tensor], scale: float, outputs: list[Tensor]) -> None:
    """Calls a function of cpu_attention.cpp; the first two inputs are q and k."""
    batch, tokens, heads, width = inputs[0].shape
    sizes = (batch, heads, inputs[1].shape[2], tokens, width)
    getattr(load_native("cpu_attention"), name)(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs),
        ctypes.c_float(scale),
        *map(ctypes.c_int64, sizes),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in outputs),
    )


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@_attention_gradients.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_attention_gradients(*ctx.saved_tensors, grad, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_save_for_backward)
