"""Cross-entropy of a linear head without materializing the (N, V) logits.

As in Liger Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2), rows are processed in chunks: the
forward pass computes a chunk's logits, its loss and its gradients, then discards the logits. The backward pass only
rescales the gradients. Unlike in Liger, the softmax denominator divides the (rows, D) operands instead of the (rows, V)
chunk, which saves a pass over the logits, and nGPT's logit scale is folded into the (V, D) weight. On some CPUs the
compiled loss is a single C++ kernel instead (cpu_cross_entropy.py).
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngpt.kernels.build import load_native
from ngpt.kernels.compile import compile_for
from ngpt.kernels.cpu_cross_entropy import cpu_cross_entropy

MIB = 2**20
# Bytes per chunk of logits, counted as float32: large enough for efficient products, small compared with the model.
CHUNK_BYTES = {"cpu": 128 * MIB, "cuda": 256 * MIB}
# Bytes per block that is read twice in succession and should stay in a CPU's cache.
BLOCK_BYTES = {"cpu": 2 * MIB, "cuda": 256 * MIB}
# The vocabulary dimension is padded to a multiple of this, since tensor cores read aligned groups of 16 bytes.
PITCH = {"cpu": 1, "cuda": 64}
CPU_KERNEL_CHUNK_BYTES = {"cpu": 64 * MIB}  # bytes per chunk in cpu_cross_entropy.py, counted as float32


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None = None,
    softcap: float | None = None,
    compiled: bool = False,
) -> Tensor:
    """Returns the mean cross-entropy in nats of logits cap(scale * (x @ weight.T)) against targets, a scalar.

    Matrix products are bfloat16 if x is bfloat16 or under bfloat16 autocast; softmax, loss and sums over chunks are
    float32. If x is float64, everything is. Differentiable once, for x, weight and scale. There is no ignore index:
    a target of -100 is out of range.

    Args:
        x: (..., D).
        weight: (V, D).
        targets: (...) int64 in [0, V); other values raise an error on a CPU and a device-side assertion on a GPU.
        scale: (V,) or (1,), nGPT's s_z (arXiv 2410.01131, section 2.1).
        softcap: c of cap(z) = c * tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2); None: cap(z) = z.
        compiled: fuse the pass over the logits into a kernel, in C++ or by torch.compile; building it takes seconds.
    """
    vocabulary, width = weight.shape
    if x.shape[-1] != width or x.shape[:-1] != targets.shape or targets.numel() == 0:
        raise ValueError(
            f"shapes of x (..., D), weight (V, D) and targets (...) do not fit together, or targets is empty: "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if scale is not None and scale.shape not in ((vocabulary,), (1,)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, allowed are ({vocabulary},) and (1,)")
    x, targets = x.reshape(-1, width), targets.reshape(-1, 1)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, scale)):
        return _LinearCrossEntropy.apply(x, weight, scale, targets, softcap, compiled)  # pyright: ignore[reportReturnType]
    results = _cpu_kernel_loss(x, weight, scale, targets, softcap, gradients=False) if compiled else None
    return (results or _chunked_loss(x, weight, scale, targets, softcap, compiled=compiled))[0]


@torch.no_grad()
def token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, *, scale: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Returns the cross-entropy of each token in nats, (N,) for targets with N elements, without gradients.

    Arguments are as in `linear_cross_entropy`, whose result is the mean up to rounding.
    """
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)
    dtype, accum_dtype = _dtypes(x)
    with torch.autocast(x.device.type, enabled=False):
        scaled_weight, losses = _scale_weight(weight, scale, dtype), []
        size = _rows(CHUNK_BYTES, x.device, len(weight))
        for chunk, target in zip(x.split(size), targets.split(size), strict=True):
            logits = chunk.to(dtype) @ scaled_weight.t()
            target_logits = _cap(logits.gather(1, target).to(accum_dtype), softcap)
            row_max, exp_sum = _softmax_by_blocks(logits, softcap, False)
            losses.append((row_max - target_logits + exp_sum.log())[:, 0])
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        compiled: bool,
    ) -> Tensor:
        """Computes the loss of x (N, D) and the gradients, but leaves the last pass over the weight's to `backward`."""
        ctx.x_dtype, ctx.compiled = x.dtype, compiled
        results = _cpu_kernel_loss(x, weight, scale, targets, softcap, gradients=True) if compiled else None
        ctx.is_complete = results is not None
        if results is None:
            needs_grad = ctx.needs_input_grad[:3]
            results = _chunked_loss(x, weight, scale, targets, softcap, compiled=compiled, needs_grad=needs_grad)
        loss, *gradients = results
        ctx.save_for_backward(*gradients, *(() if ctx.is_complete else (weight, scale)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Multiplies the gradients by `grad_loss`: 1, or less if the step has several micro-batches.

        If `forward` used the C++ kernel, it has computed all of them (`is_complete`). Otherwise those of weight and
        scale are computed here from `grad_scaled`, the gradient of their product.
        """
        # On a CPU the comparison does not synchronize, and skipping the multiplication saves a pass and a copy.
        if grad_loss is not None and grad_loss.device.type == "cpu" and grad_loss == 1:
            grad_loss = None
        if ctx.is_complete:
            grad_x, grad_weight, grad_scale = (_scale_by(gradient, grad_loss) for gradient in ctx.saved_tensors)
        else:
            grad_x, grad_scaled, weight, scale = ctx.saved_tensors
            weight, scale = weight.detach(), None if scale is None else scale.detach()
            grad_x, grad_weight, grad_scale = _scale_by(grad_x, grad_loss), None, None
            if grad_scaled is not None:
                for_scale, shapes = ctx.needs_input_grad[2], (weight.shape, weight.dtype, getattr(scale, "shape", None))
                key = ("head", for_scale, grad_loss is None, grad_scaled.dtype, *shapes)
                finish = compile_for(key, _head_gradients) if ctx.compiled else _head_gradients
                grad_weight, grad_scale = finish(grad_scaled, weight, scale, grad_loss, for_scale)
        return None if grad_x is None else grad_x.to(ctx.x_dtype), grad_weight, grad_scale, None, None, None


def _scale_by(gradient: Tensor | None, grad_loss: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or grad_loss is None else gradient * grad_loss


def _head_gradients(
    grad_scaled: Tensor, weight: Tensor, scale: Tensor | None, grad_loss: Tensor | None, for_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns `grad_loss` times the gradients of weight (V, D) and scale, given that of (scale * weight).T (D, V)."""
    grad_weight, grad_scale = grad_scaled.t().contiguous(), None
    if for_scale and scale is not None:
        grad_scale = _scale_by((grad_weight * weight).sum(1).sum_to_size(scale.shape).to(scale.dtype), grad_loss)
    factor = grad_loss if scale is None else _scale_by(scale, grad_loss)
    if factor is not None:
        grad_weight.mul_(factor.view(-1, 1))
    # Compiled code may return the gradient with a (D, V) memory layout, which autograd would copy.
    return grad_weight.to(weight.dtype).contiguous(), grad_scale


def _cpu_kernel_loss(
    x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, softcap: float | None, *, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """Returns the loss and its gradients for x, weight and scale from the C++ kernel; None if it does not apply."""
    dtype, _ = _dtypes(x)
    if softcap is not None or x.device.type != "cpu" or dtype != torch.bfloat16:
        return None
    rows = _rows(CPU_KERNEL_CHUNK_BYTES, x.device, len(weight))
    return cpu_cross_entropy(x.to(dtype), weight, scale, targets, rows=rows, gradients=gradients)


def _chunked_loss(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    *,
    compiled: bool,
    needs_grad: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the loss and its gradients for x and for scale * weight, the latter transposed (D, V).

    `needs_grad` tells which of x, weight and scale need a gradient; gradients that are not needed are None.
    """
    dtype, accum_dtype = _dtypes(x)
    weight, scale = weight.detach(), None if scale is None else scale.detach()
    (n, width), vocabulary, device = x.shape, weight.shape[0], x.device
    for_x, needs_gradients = needs_grad[0], any(needs_grad)
    rows, pitch = min(n, _rows(CHUNK_BYTES, device, vocabulary)), PITCH.get(device.type, PITCH["cpu"])
    padded = -(-vocabulary // pitch) * pitch
    total = torch.zeros((), dtype=accum_dtype, device=device)
    grad_x = torch.empty(n, width, dtype=accum_dtype, device=device) if for_x else None
    # Transposed, since CPUs compute the (D, V) product a quarter faster than the (V, D) one.
    grad_scaled = torch.zeros(width, padded, dtype=accum_dtype, device=device) if any(needs_grad[1:]) else None
    buffer = torch.empty(rows, padded, dtype=dtype, device=device)
    row_numbers = torch.arange(rows, device=device)
    softmax = _compiled_softmax(buffer[:, :vocabulary], softcap, needs_gradients) if compiled else _softmax_by_blocks
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        key = ("scaled", dtype, weight.shape, weight.dtype, None if scale is None else scale.shape)
        scale_weight = compile_for(key, _scale_weight) if compiled and scale is not None else _scale_weight
        scaled_weight = scale_weight(weight, scale, dtype)
        for start in range(0, n, rows):
            chunk, target = x[start : start + rows], targets[start : start + rows]
            logits = torch.mm(chunk.to(dtype), scaled_weight.t(), out=buffer[: len(chunk), :vocabulary])
            target_logits = _cap(logits.gather(1, target).to(accum_dtype), softcap)
            is_full = len(chunk) == rows  # a shorter last chunk is not worth a separate compilation
            row_max, exp_sum = (softmax if is_full else _softmax_by_blocks)(logits, softcap, needs_gradients)
            losses = row_max - target_logits + exp_sum.log()  # (rows, 1), in nats
            total += losses.sum()
            if not needs_gradients:
                continue
            grad_logits = logits  # softmax overwrote them in place
            # At the target: (softmax - 1) * exp_sum, as the row is unnormalized; expm1 avoids cancellation.
            cap_grad = 1.0 if softcap is None else 1 - (target_logits / softcap).square()
            grad_target = torch.expm1(-losses) * exp_sum * cap_grad
            # scatter_ on a CPU would copy the whole bfloat16 chunk to float32 and back.
            grad_logits[row_numbers[: len(chunk)], target[:, 0]] = grad_target[:, 0].to(dtype)
            if grad_x is not None:
                torch.div(grad_logits @ scaled_weight, exp_sum * n, out=grad_x[start : start + rows])
            if grad_scaled is not None:
                _add_product(grad_scaled, (chunk / (exp_sum * n)).to(dtype).t(), buffer[: len(chunk)])
    return total / n, grad_x, None if grad_scaled is None else grad_scaled[:, :vocabulary]


def _scale_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (weight if scale is None else weight * scale[:, None]).to(dtype)


def _dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Returns the dtype of the matrix products and the dtype of everything else."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"cannot multiply in {dtype}: allowed are bfloat16, float32 and float64")
    return dtype, torch.promote_types(dtype, torch.float32)


def _rows(budget: dict[str, int], device: torch.device, vocabulary: int) -> int:
    """Returns how many rows of float32 logits fit the budget, as a power of two, which divides most batch sizes."""
    rows = budget.get(device.type, budget["cpu"]) // (4 * vocabulary)
    return 2 ** int(math.log2(max(1, rows)))


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def _unnormalized_softmax(z: Tensor, softcap: float | None, needs_gradients: bool) -> tuple[Tensor, Tensor]:
    """Returns row_max = max y and exp_sum = sum exp(y - row_max), both (R, 1), for y = cap(z) and logits z (R, V).

    Overwrites z with exp(y - row_max) * dy/dz. Without gradients, z is undefined afterwards and only
    row_max + log(exp_sum) is meaningful.
    """
    y, cap_grad = z.to(torch.promote_types(z.dtype, torch.float32)), None
    if softcap is not None:
        y = y.div_(softcap).tanh_()
        cap_grad = 1 - y.square() if needs_gradients else None
        y.mul_(softcap)
    if not needs_gradients:  # torch's fused kernel is faster if only the log-sum-exp is needed
        log_sum_exp = y[:, :1] - torch.log_softmax(y, -1)[:, :1]
        return log_sum_exp, torch.ones_like(log_sum_exp)
    row_max = y.amax(-1, keepdim=True)
    y.sub_(row_max).exp_()
    exp_sum = y.sum(-1, keepdim=True)
    z.copy_(y if cap_grad is None else y.mul_(cap_grad))
    return row_max, exp_sum


def _compiled_softmax(z: Tensor, softcap: float | None, needs_gradients: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns `_unnormalized_softmax` as one kernel for the shape of z: C++ for bfloat16 on a CPU, else compiled."""
    has_cpp_kernel = z.device.type == "cpu" and z.dtype == torch.bfloat16 and softcap is None
    if has_cpp_kernel and (library := load_native("softmax")):
        return functools.partial(_cpp_softmax, library)
    return compile_for(("softmax", softcap, needs_gradients, z.dtype, z.shape), _unnormalized_softmax)


def _cpp_softmax(library: ctypes.CDLL, z: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """`_unnormalized_softmax` without softcap, computed by softmax.cpp."""
    rows, vocabulary = z.shape
    row_max, exp_sum = torch.empty(2, rows, 1).unbind()
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (z, row_max, exp_sum))
    library.unnormalized_softmax(*pointers, ctypes.c_int64(rows), ctypes.c_int64(vocabulary))
    return row_max, exp_sum


def _softmax_by_blocks(z: Tensor, softcap: float | None, needs_gradients: bool) -> tuple[Tensor, Tensor]:
    """`_unnormalized_softmax`, computed in blocks of rows that fit in the cache."""
    blocks = z.split(_rows(BLOCK_BYTES, z.device, z.shape[1]))
    parts = [_unnormalized_softmax(block, softcap, needs_gradients) for block in blocks]
    row_maxes, exp_sums = zip(*parts, strict=True)
    return torch.cat(row_maxes), torch.cat(exp_sums)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to total. The product of bfloat16 matrices is rounded to bfloat16; the sum is not."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    columns = _rows(BLOCK_BYTES, total.device, len(total))
    for part, factor in zip(total.split(columns, 1), b.split(columns, 1), strict=True):
        part.add_(a @ factor)
