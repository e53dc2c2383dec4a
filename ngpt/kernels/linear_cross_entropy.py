"""Cross-entropy of a linear head without holding the (N, V) matrix of its logits in memory.

As in Liger Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2), the rows are processed in chunks, and
loss and gradients of a chunk are computed from its logits, which are then discarded. The backward pass only multiplies.
Unlike in Liger, the softmax's divisor is applied to the (rows, D) factors instead of the (rows, V) chunk, which saves a
pass over the logits, and nGPT's logit scale is folded into the (V, D) weight. On some CPUs the whole compiled loss is
one C++ kernel instead: cpu_cross_entropy.py.
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
# Bytes of a chunk of logits, counted in float32: large enough for efficient products, small beside the model.
CHUNK_BYTES = {"cpu": 128 * MIB, "cuda": 256 * MIB}
# Bytes of a block that is read again at once and should stay in a CPU's cache.
BLOCK_BYTES = {"cpu": 2 * MIB, "cuda": 256 * MIB}
# Rows of V numbers are padded to a multiple of this, since tensor cores read aligned groups of 16 bytes.
PITCH = {"cpu": 1, "cuda": 64}
CPU_KERNEL_CHUNK_BYTES = {"cpu": 64 * MIB}  # bytes of a chunk of cpu_cross_entropy.py, counted in float32


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None = None,
    softcap: float | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean cross-entropy in nats of logits = cap(scale * (x @ weight.T)) against targets, a scalar.

    Products are in bfloat16 if x is, or under autocast; softmax, loss and sums over chunks are in float32. If x is
    float64, so is everything. Differentiable once, for x, weight and scale; under `torch.no_grad()` no gradients are
    computed. No target is ignored: -100 is out of range too.

    Args:
        x: (..., D).
        weight: (V, D).
        targets: (...) int64 in [0, V); another value raises an error on a CPU and a device-side assertion on a GPU.
        scale: (V,) or (1,), nGPT's s_z (arXiv 2410.01131, section 2.1).
        softcap: c of cap(z) = c * tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2); None: cap(z) = z.
        compiled: run the pass over the logits as one kernel, in C++ or by torch.compile; building it takes seconds.
    """
    vocabulary, width = weight.shape
    if x.shape[-1] != width or x.shape[:-1] != targets.shape or targets.numel() == 0:
        raise ValueError(
            f"x (..., D), weight (V, D) and targets (...) do not fit together, or are empty: "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if scale is not None and scale.shape not in ((vocabulary,), (1,)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, allowed are ({vocabulary},) and (1,)")
    x, targets = x.reshape(-1, width), targets.reshape(-1, 1)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, scale)):
        return _LinearCrossEntropy.apply(x, weight, scale, targets, softcap, compiled)  # pyright: ignore[reportReturnType]
    results = _by_cpu_kernel(x, weight, scale, targets, softcap, gradients=False) if compiled else None
    return (results or _by_chunks(x, weight, scale, targets, softcap, compiled=compiled))[0]


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
        """Computes the gradients too, but leaves the last pass over the head's to `backward`, which scales it there.

        x (N, D), targets (N, 1), the rest as in `linear_cross_entropy`.
        """
        ctx.x_dtype, ctx.compiled = x.dtype, compiled
        results = _by_cpu_kernel(x, weight, scale, targets, softcap, gradients=True) if compiled else None
        ctx.is_complete = results is not None
        if results is None:
            wanted = ctx.needs_input_grad[:3]
            results = _by_chunks(x, weight, scale, targets, softcap, compiled=compiled, wanted=wanted)
        loss, *gradients = results
        ctx.save_for_backward(*gradients, *(() if ctx.is_complete else (weight, scale)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, share: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """`share` is the gradient of the loss: 1, or the micro-batch's share of the step."""
        # On a CPU the comparison is free and saves a pass and a copy.
        if share is not None and share.device.type == "cpu" and share == 1:
            share = None
        if ctx.is_complete:
            grad_x, grad_weight, grad_scale = (_times(gradient, share) for gradient in ctx.saved_tensors)
        else:
            grad_x, grad_scaled, weight, scale = ctx.saved_tensors
            weight, scale = weight.detach(), None if scale is None else scale.detach()
            grad_x, grad_weight, grad_scale = _times(grad_x, share), None, None
            _, for_weight, for_scale, *_ = ctx.needs_input_grad
            if grad_scaled is not None:
                shapes = weight.shape, weight.dtype, getattr(scale, "shape", None)
                key = ("head", for_weight, for_scale, share is None, grad_scaled.dtype, *shapes)
                finish = compile_for(key, _head_gradients) if ctx.compiled else _head_gradients
                grad_weight, grad_scale = finish(grad_scaled, weight, scale, share, for_weight, for_scale)
        return None if grad_x is None else grad_x.to(ctx.x_dtype), grad_weight, grad_scale, None, None, None


def _times(gradient: Tensor | None, share: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or share is None else gradient * share


def _head_gradients(
    grad_scaled: Tensor, weight: Tensor, scale: Tensor | None, share: Tensor | None, for_weight: bool, for_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight (V, D) and scale, times `share`, from that of scale * weight, transposed (D, V)."""
    grad_weight, grad_scale = grad_scaled.t().contiguous(), None
    if for_scale and scale is not None:
        grad_scale = _times((grad_weight * weight).sum(1).sum_to_size(scale.shape).to(scale.dtype), share)
    factor = share if scale is None else _times(scale, share)
    if factor is not None:
        grad_weight.mul_(factor.view(-1, 1))
    # Compiled code may leave the gradient in (D, V) order, and autograd would copy it.
    return grad_weight.to(weight.dtype).contiguous() if for_weight else None, grad_scale


def _by_cpu_kernel(
    x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, softcap: float | None, *, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """The loss and its gradients for x, weight and scale by `cpu_cross_entropy`; None if it does not apply."""
    dtype, _ = _dtypes(x)
    if softcap is not None or x.device.type != "cpu" or dtype != torch.bfloat16:
        return None
    rows = _rows(CPU_KERNEL_CHUNK_BYTES, x.device, len(weight))
    return cpu_cross_entropy(x.to(dtype), weight, scale, targets, rows=rows, gradients=gradients)


def _by_chunks(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    *,
    compiled: bool,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and, if wanted, its gradients for x and for scale * weight, transposed (D, V)."""
    dtype, exact = _dtypes(x)
    weight, scale = weight.detach(), None if scale is None else scale.detach()
    (n, width), vocabulary, device = x.shape, weight.shape[0], x.device
    for_x, needs_gradients = wanted[0], any(wanted)
    rows, pitch = min(n, _rows(CHUNK_BYTES, device, vocabulary)), PITCH.get(device.type, PITCH["cpu"])
    padded = -(-vocabulary // pitch) * pitch
    total = torch.zeros((), dtype=exact, device=device)
    grad_x = torch.empty(n, width, dtype=exact, device=device) if for_x else None
    # As (D, V): CPUs compute that product a quarter faster than (V, D).
    grad_scaled = torch.zeros(width, padded, dtype=exact, device=device) if any(wanted[1:]) else None
    buffer = torch.empty(rows, padded, dtype=dtype, device=device)
    row_numbers = torch.arange(rows, device=device)
    softmax = _compiled_softmax(buffer[:, :vocabulary], softcap, needs_gradients) if compiled else _softmax_by_blocks
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        key = ("scaled", dtype, weight.shape, weight.dtype, None if scale is None else scale.shape)
        scaled = compile_for(key, _scaled) if compiled and scale is not None else _scaled
        factor = scaled(weight, scale, dtype)
        for start in range(0, n, rows):
            chunk, target = x[start : start + rows], targets[start : start + rows]
            logits = torch.mm(chunk.to(dtype), factor.t(), out=buffer[: len(chunk), :vocabulary])
            target_logits = _cap(logits.gather(1, target).to(exact), softcap)
            is_full = len(chunk) == rows  # a shorter last chunk is not worth a separate compilation
            peak, mass = (softmax if is_full else _softmax_by_blocks)(logits, softcap, needs_gradients)
            losses = peak - target_logits + mass.log()  # (rows, 1), in nats
            total += losses.sum()
            if not needs_gradients:
                continue
            slope = logits  # overwritten in place
            # softmax - 1 at the target, times `mass` like the rest of the row; expm1 avoids cancellation.
            cap_slope = 1.0 if softcap is None else 1 - (target_logits / softcap).square()
            at_target = torch.expm1(-losses) * mass * cap_slope
            # Not scatter_, which on a CPU copies the whole bfloat16 chunk to float32 and back.
            slope[row_numbers[: len(chunk)], target[:, 0]] = at_target[:, 0].to(dtype)
            if grad_x is not None:
                torch.div(slope @ factor, mass * n, out=grad_x[start : start + rows])
            if grad_scaled is not None:
                _add_product(grad_scaled, (chunk / (mass * n)).to(dtype).t(), buffer[: len(chunk)])
    return total / n, grad_x, None if grad_scaled is None else grad_scaled[:, :vocabulary]


def _scaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (weight if scale is None else weight * scale[:, None]).to(dtype)


def _dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the matrix products, and that of everything else."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"cannot multiply in {dtype}: allowed are bfloat16, float32 and float64")
    return dtype, torch.promote_types(dtype, torch.float32)


def _rows(budget: dict[str, int], device: torch.device, vocabulary: int) -> int:
    """The largest power of two of rows whose logits in float32 fit the budget; batches are powers of two too."""
    rows = budget.get(device.type, budget["cpu"]) // (4 * vocabulary)
    return 2 ** int(math.log2(max(1, rows)))


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def _unnormalized_softmax(z: Tensor, softcap: float | None, needs_gradients: bool) -> tuple[Tensor, Tensor]:
    """Peak = max y and mass = sum of exp(y - peak), (R, 1), of uncapped logits z (R, V) with capped logits y.

    Overwrites z by the slope exp(y - peak) * dy/dz; without gradients only peak + log(mass) is meaningful.
    """
    y, cap_slope = z.to(torch.promote_types(z.dtype, torch.float32)), None
    if softcap is not None:
        y = y.div_(softcap).tanh_()
        cap_slope = 1 - y.square() if needs_gradients else None
        y.mul_(softcap)
    if not needs_gradients:  # torch's fused kernel is faster for the sum alone
        log_mass = y[:, :1] - torch.log_softmax(y, -1)[:, :1]
        return log_mass, torch.ones_like(log_mass)
    peak = y.amax(-1, keepdim=True)
    y.sub_(peak).exp_()
    mass = y.sum(-1, keepdim=True)
    z.copy_(y if cap_slope is None else y.mul_(cap_slope))
    return peak, mass


def _compiled_softmax(z: Tensor, softcap: float | None, needs_gradients: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """`_unnormalized_softmax` as one kernel for logits like z: C++ for bfloat16 on a CPU, else torch.compile."""
    by_cpp = z.device.type == "cpu" and z.dtype == torch.bfloat16 and softcap is None
    if by_cpp and (library := load_native("softmax")):
        return functools.partial(_cpp_softmax, library)
    return compile_for(("softmax", softcap, needs_gradients, z.dtype, z.shape), _unnormalized_softmax)


def _cpp_softmax(library: ctypes.CDLL, z: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """`_unnormalized_softmax` without softcap, by softmax.cpp."""
    rows, vocabulary = z.shape
    peak, mass = torch.empty(2, rows, 1).unbind()
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (z, peak, mass))
    library.unnormalized_softmax(*pointers, ctypes.c_int64(rows), ctypes.c_int64(vocabulary))
    return peak, mass


def _softmax_by_blocks(z: Tensor, softcap: float | None, needs_gradients: bool) -> tuple[Tensor, Tensor]:
    """`_unnormalized_softmax` on a few rows at a time."""
    blocks = z.split(_rows(BLOCK_BYTES, z.device, z.shape[1]))
    peaks, masses = zip(*(_unnormalized_softmax(block, softcap, needs_gradients) for block in blocks), strict=True)
    return torch.cat(peaks), torch.cat(masses)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the product of bfloat16 matrices is rounded, the sum is not."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    columns = _rows(BLOCK_BYTES, total.device, len(total))
    for part, factor in zip(total.split(columns, 1), b.split(columns, 1), strict=True):
        part.add_(a @ factor)
