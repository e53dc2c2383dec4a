"""`lerp` of ngpt/model/residual.py as one GPU kernel forward and one backward, where no compiler makes them.

Uncompiled, torch walks over the (B, T, D) stream for each operation of y = normalize(u + alpha * (h - u)) with
u = normalize(x) and h = normalize(f), and keeps what lies between for the backward pass. The Triton kernels of
ngpt/kernels/fused_lerp_triton.py read x and f once and keep only them. The torch formulation in ngpt/model/residual.py is their
reference, and what runs everywhere else: on a CPU, without Triton, and under torch.compile. There Inductor makes one
kernel of the formula by itself, together with what stands before and after it, which a call into a kernel of ours
would cut apart.
"""

import functools
import importlib.util
import logging
import math
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngpt.system.memory import is_out_of_memory

log = logging.getLogger(__name__)
WIDEST = 4096  # a row is held in the registers of one program
DTYPES = (torch.float32, torch.bfloat16)
TRIED = 64  # tokens
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative to the largest entry; a wrong kernel is far outside


def should_fuse(x: Tensor, f: Tensor, alpha: Tensor) -> bool:
    """Whether `fused_lerp` is the way to take: an uncompiled step on a GPU where the kernels are known to work."""
    # Under vmap, which does not know the kernels; torch has no public word for it.
    batched = torch._C._functorch.is_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]
    if torch.compiler.is_compiling() or batched or not x.is_cuda:
        return False
    return fits(x, f, alpha) and has_triton() and works(x.device, x.shape[-1], x.dtype, f.dtype)


def fits(x: Tensor, f: Tensor, alpha: Tensor) -> bool:
    """Whether the kernels are made for operands of these shapes and types."""
    width = x.shape[-1]
    return (
        x.shape == f.shape
        and x.numel() > 0
        and width <= WIDEST
        and alpha.shape in ((width,), (1,), ())
        and x.dtype in DTYPES
        and f.dtype in DTYPES
        and alpha.dtype == torch.float32
        and x.device == f.device == alpha.device
    )


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; the CUDA builds of torch bring it."""
    return importlib.util.find_spec("triton") is not None


def fused_lerp(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """`ngpt.model.residual.lerp` with its default norm: float32 of the shape of x, differentiable once for all three.

    Args:
        x, f: stream and answer, (..., D), float32 or bfloat16.
        alpha: the step length, float32 (D,), (1,) or ().
    """
    # One number is a row with stride 0, whose gradient autograd adds up.
    return _Lerp.apply(x, f, alpha.expand(x.shape[-1]))  # pyright: ignore[reportReturnType]


class _Lerp(torch.autograd.Function):
    """The gradient is derived in ngpt/kernels/fused_lerp_triton.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
        from ngpt.kernels import fused_lerp_triton as fused_kernels

        ctx.save_for_backward(x, f, alpha)
        return fused_kernels.forward(_rows(x), _rows(f), alpha).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from ngpt.kernels import fused_lerp_triton as fused_kernels

        x, f, alpha = ctx.saved_tensors
        gx, gf, galpha = fused_kernels.backward(_rows(x), _rows(f), alpha, _rows(gy))
        return gx.view(x.shape), gf.view(f.shape), galpha


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


@functools.cache
def works(device: torch.device, width: int, x_dtype: torch.dtype, f_dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device, and are right; tried once in a process for each kind of operands.

    To build a kernel takes more than Triton: a C compiler, Python's headers, a GPU that is not too old. Where it cannot
    be built, or its results are not torch's, a warning says why the torch formulation is used.
    """
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    try:
        error = deviation(device, width, x_dtype, f_dtype)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as reason:
        if is_out_of_memory(reason):
            raise
        log.warning("the residual steps go without the fused kernel, which cannot be built here: %s", reason)
        return False
    if right := error < max(TOLERANCE[x_dtype], TOLERANCE[f_dtype]):
        return right
    log.warning("the residual steps go without the fused kernel: on %s it is wrong by %.1g", device, error)
    return False


def deviation(device: torch.device, width: int, x_dtype: torch.dtype, f_dtype: torch.dtype) -> float:
    """The largest error of the kernels' value and gradients against torch in float64, relative to the largest entry."""

    def waves(phase: float, *shape: int) -> Tensor:  # no random numbers: those of the run stay what they are
        return torch.sin(phase * torch.arange(math.prod(shape), device=device)).view(shape)

    given = waves(1.1, TRIED, width).to(x_dtype), waves(1.7, TRIED, width).to(f_dtype), waves(0.3, width).abs()
    results = []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for formulation, dtype in ((fused_lerp, None), (_exact_lerp, torch.float64)):
            leaves = [tensor.to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in given]
            y = formulation(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, waves(2.3, TRIED, width).to(y.dtype))])
    errors = [(ours - exact).abs().max() / exact.abs().max() for ours, exact in zip(*results, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is


def _exact_lerp(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    return F.normalize(torch.lerp(F.normalize(x, dim=-1), F.normalize(f, dim=-1), alpha), dim=-1)
