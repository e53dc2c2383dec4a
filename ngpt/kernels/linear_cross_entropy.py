"""Cross-entropy of a linear head without the (N, V) matrix of its logits in memory.

The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2): walk over chunks of rows
and, as soon as the logits of a chunk are there, take from them not only the loss but the gradients of the head's input
and weight too, so that they can be forgotten. The backward pass then only multiplies. Two things are our own: the
softmax's divisor is not applied to the (rows, V) chunk but to the (rows, D) factors beside it, which saves a pass over
the logits, and the learned logit scale of nGPT is folded into the (V, D) weight.

On some CPUs all of a compiled loss is one program in C++ instead: ngpt/kernels/cpu_cross_entropy.py.
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
# A chunk of logits counted in float32: large enough for efficient matrix products, small beside the model.
CHUNK_BYTES = {"cpu": 128 * MIB, "cuda": 256 * MIB}
# What is read again at once is made in blocks that stay in a CPU's cache: several passes over logits, and a product
# that is added to a sum.
BLOCK_BYTES = {"cpu": 2 * MIB, "cuda": 256 * MIB}
# Rows of V numbers are held as a multiple of so many: tensor cores read and write 16 bytes at once, from addresses that
# are multiples of it, and rows of GPT-2's 50257 tokens would start anywhere. Nobody reads what fills them up.
PITCH = {"cpu": 1, "cuda": 64}
# A chunk of ngpt/kernels/cpu_cross_entropy.py, counted in float32 as well.
NATIVE_CHUNK_BYTES = {"cpu": 64 * MIB}

# Logits (R, V), a softcap or None, and whether gradients are wanted -> what `_exponentials` returns.
Exponentials = Callable[[Tensor, float | None, bool], tuple[Tensor, Tensor]]


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

    The matrix products are in bfloat16 when x is, or under autocast to it; softmax, loss and the sums over chunks are
    in float32 (everything in float64 when x is). Differentiable once, for x, weight and scale; under `torch.no_grad()`
    nothing is computed for gradients. No target is ignored, -100 is out of range too.

    Args:
        x: (..., D).
        weight: (V, D).
        targets: (...) int64 in [0, V); another value raises on a CPU and is a device-side assertion on a GPU.
        scale: (V,) or (1,), nGPT's s_z (arXiv 2410.01131, section 2.1).
        softcap: c of cap(z) = c * tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2); None for cap(z) = z.
        compiled: make the pass over the logits one kernel, in C++ or with torch.compile: seconds once, then faster.
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
    found = _as_one_program(x, weight, scale, targets, softcap, gradients=False) if compiled else None
    return (found or _walk(x, weight, scale, targets, softcap, compiled=compiled))[0]


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
        """x (N, D), targets (N, 1), the rest as in `linear_cross_entropy`; makes the gradients as well.

        But for the last pass over that of the head: there `backward` multiplies by its share at no cost.
        """
        found = _as_one_program(x, weight, scale, targets, softcap, gradients=True) if compiled else None
        ctx.x_dtype, ctx.compiled, ctx.has_all = x.dtype, compiled, found is not None
        if found is None:
            loss, *gradients = _walk(
                x, weight, scale, targets, softcap, compiled=compiled, wanted=ctx.needs_input_grad[:3]
            )
            ctx.save_for_backward(*gradients, weight, scale)
        else:
            loss, *gradients = found
            ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, share: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """`share` is the gradient of the loss: 1, or a micro-batch's part of the step."""
        # Where looking costs nothing. Autograd then keeps the tensors as they are, which saves a pass and a copy.
        if share is not None and share.device.type == "cpu" and share == 1:
            share = None
        if ctx.has_all:
            grad_x, grad_weight, grad_scale = (_times(gradient, share) for gradient in ctx.saved_tensors)
        else:
            grad_x, grad_scaled, weight, scale = ctx.saved_tensors
            weight, scale = weight.detach(), None if scale is None else scale.detach()
            grad_x, grad_weight, grad_scale = _times(grad_x, share), None, None
            _, for_weight, for_scale, *_ = ctx.needs_input_grad
            if grad_scaled is not None:
                kind = ("head", for_weight, for_scale, share is None, grad_scaled.dtype, weight.shape, weight.dtype)
                kind = (*kind, getattr(scale, "shape", None))
                finish = compile_for(kind, _head_gradients) if ctx.compiled else _head_gradients
                grad_weight, grad_scale = finish(grad_scaled, weight, scale, share, for_weight, for_scale)
        return None if grad_x is None else grad_x.to(ctx.x_dtype), grad_weight, grad_scale, None, None, None


def _times(gradient: Tensor | None, share: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or share is None else gradient * share


def _head_gradients(
    grad_scaled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    share: Tensor | None,
    for_weight: bool,
    for_scale: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight (V, D) and scale, times `share`, from that of scale * weight, transposed (D, V)."""
    grad_weight, grad_scale = grad_scaled.t().contiguous(), None
    if for_scale and scale is not None:
        grad_scale = _times((grad_weight * weight).sum(1).sum_to_size(scale.shape).to(scale.dtype), share)
    factor = share if scale is None else _times(scale, share)
    if factor is not None:
        grad_weight.mul_(factor.view(-1, 1))
    # Compiled, the gradient may still lie as (D, V), and autograd would copy it.
    return grad_weight.to(weight.dtype).contiguous() if for_weight else None, grad_scale


def _as_one_program(
    x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, softcap: float | None, *, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """The loss, and its gradients for x, weight and scale, by ngpt/kernels/cpu_cross_entropy.py; None where it does not fit."""
    dtype, _ = _dtypes(x)
    if softcap is not None or x.device.type != "cpu" or dtype != torch.bfloat16:
        return None
    weight, scale = weight.detach(), None if scale is None else scale.detach()
    rows = _rows(NATIVE_CHUNK_BYTES, x.device, len(weight))
    return cpu_cross_entropy(x.detach().to(dtype), weight, scale, targets, rows=rows, gradients=gradients)


def _walk(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    *,
    compiled: bool,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and where wanted its gradients for x and for scale * weight, transposed (D, V)."""
    dtype, exact = _dtypes(x)
    weight, scale = weight.detach(), None if scale is None else scale.detach()
    (n, width), vocabulary, device = x.shape, weight.shape[0], x.device
    for_x, for_weight, for_scale = wanted
    gradient = any(wanted)
    rows, pitch = min(n, _rows(CHUNK_BYTES, device, vocabulary)), PITCH.get(device.type, PITCH["cpu"])
    filled = -(-vocabulary // pitch) * pitch
    total = torch.zeros((), dtype=exact, device=device)
    grad_x = torch.empty(n, width, dtype=exact, device=device) if for_x else None
    # As (D, V): the product that CPUs do a quarter faster than (V, D).
    grad_scaled = torch.zeros(width, filled, dtype=exact, device=device) if for_weight or for_scale else None
    buffer, lines = torch.empty(rows, filled, dtype=dtype, device=device), torch.arange(rows, device=device)
    exponentiate = _fastest(buffer[:, :vocabulary], softcap, gradient) if compiled else _by_blocks
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        if scale is None:
            factor = weight.to(dtype)
        else:
            kind = ("scaled", dtype, weight.shape, weight.dtype, scale.shape)
            factor = (compile_for(kind, _scaled) if compiled else _scaled)(weight, scale, dtype)
        for start in range(0, n, rows):
            chunk, target = x[start : start + rows], targets[start : start + rows]
            logits = torch.mm(chunk.to(dtype), factor.t(), out=buffer[: len(chunk), :vocabulary])
            hit = _cap(logits.gather(1, target).to(exact), softcap)
            whole = len(chunk) == rows  # a last, shorter chunk is not worth a compilation of its own
            peak, mass = (exponentiate if whole else _by_blocks)(logits, softcap, gradient)
            surprise = peak - hit + mass.log()  # (rows, 1), in nats
            total += surprise.sum()
            if not gradient:
                continue
            slope = logits  # in their place
            # softmax - 1 at the target, times `mass` as the rest of the row; expm1 keeps the digits that 1 would eat.
            at_target = torch.expm1(-surprise) * mass * _cap_slope(hit, softcap)
            # Not scatter_, which on a CPU copies the whole chunk of bfloat16 to float32 and back.
            slope[lines[: len(chunk)], target[:, 0]] = at_target[:, 0].to(dtype)
            if grad_x is not None:
                torch.div(slope @ factor, mass * n, out=grad_x[start : start + rows])
            if grad_scaled is not None:
                _add_product(grad_scaled, (chunk / (mass * n)).to(dtype).t(), buffer[: len(chunk)])
    return total / n, grad_x, None if grad_scaled is None else grad_scaled[:, :vocabulary]


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * weight (V, D), as the matrix products take it."""
    return (weight * scale[:, None]).to(dtype)


def _dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The type of the matrix products, and that of everything else."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"cannot multiply in {dtype}: allowed are bfloat16, float32 and float64")
    return dtype, torch.promote_types(dtype, torch.float32)


def _rows(budget: dict[str, int], device: torch.device, vocabulary: int) -> int:
    """The largest power of two of rows whose logits in float32 fit the budget: batches are powers of two as well."""
    rows = budget.get(device.type, budget["cpu"]) // (4 * vocabulary)
    return 2 ** int(math.log2(max(1, rows)))


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def _cap_slope(capped: Tensor, softcap: float | None) -> Tensor | float:
    """The derivative of the cap, where it gives `capped`."""
    return 1.0 if softcap is None else 1 - (capped / softcap).square()


def _exponentials(z: Tensor, softcap: float | None, gradient: bool) -> tuple[Tensor, Tensor]:
    """Logits z (R, V) before the cap -> their peak (R, 1) and mass (R, 1), and in place of z the slope.

    With capped logits y: peak = max y, mass = sum of exp(y - peak), slope = exp(y - peak) * dy/dz. Without `gradient`
    there is no slope, and only peak + log(mass) has a meaning.
    """
    y = z.to(torch.promote_types(z.dtype, torch.float32))
    bend = None
    if softcap is not None:
        y = y.div_(softcap).tanh_()
        bend = 1 - y.square() if gradient else None
        y.mul_(softcap)
    if not gradient:  # torch's fused kernel is faster when nothing but the sum is wanted
        log_mass = y[:, :1] - torch.log_softmax(y, -1)[:, :1]
        return log_mass, torch.ones_like(log_mass)
    peak = y.amax(-1, keepdim=True)
    y.sub_(peak).exp_()
    mass = y.sum(-1, keepdim=True)
    z.copy_(y if bend is None else y.mul_(bend))
    return peak, mass


def _fastest(z: Tensor, softcap: float | None, gradient: bool) -> Exponentials:
    """`_exponentials` as one kernel for logits such as z: in C++ for bfloat16 on a CPU, else by torch.compile."""
    fits = z.device.type == "cpu" and z.dtype == torch.bfloat16 and softcap is None
    if fits and (library := load_native("softmax")):
        return functools.partial(_natively, library)
    return compile_for(("exponentials", softcap, gradient, z.dtype, z.shape), _exponentials)


def _natively(library: ctypes.CDLL, z: Tensor, softcap: float | None, gradient: bool) -> tuple[Tensor, Tensor]:
    """`_exponentials` by softmax.cpp."""
    rows, vocabulary = z.shape
    peak, mass = torch.empty(2, rows, 1).unbind()
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (z, peak, mass))
    library.unnormalized_softmax(*pointers, ctypes.c_int64(rows), ctypes.c_int64(vocabulary))
    return peak, mass


def _by_blocks(z: Tensor, softcap: float | None, gradient: bool) -> tuple[Tensor, Tensor]:
    """`_exponentials` on a few rows at a time."""
    blocks = z.split(_rows(BLOCK_BYTES, z.device, z.shape[1]))
    peaks, masses = zip(*(_exponentials(block, softcap, gradient) for block in blocks), strict=True)
    return torch.cat(peaks), torch.cat(masses)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the product of bfloat16 matrices is rounded but the sum is not."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    columns = _rows(BLOCK_BYTES, total.device, len(total))
    for part, factor in zip(total.split(columns, 1), b.split(columns, 1), strict=True):
        part.add_(a @ factor)
