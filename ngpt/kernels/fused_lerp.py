"""The residual rule `lerp` as one Triton kernel forward and one backward, for uncompiled models on a GPU.

Eager torch reads and writes the (B, T, D) stream once per operation and saves intermediate results for the backward
pass. The kernels (fused_lerp_triton.py) read x and f once and save only those. Under torch.compile, Inductor fuses the
operations itself.

The kernels have only run in Triton's interpreter, not on a GPU yet, so they are off unless NGPT_FUSED_LERP=1 is set.
The first use on each device checks them against float64.
"""

import functools
import importlib.util
import logging
import math
import os
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ngpt.system.memory import is_out_of_memory

log = logging.getLogger(__name__)
SWITCH = "NGPT_FUSED_LERP"  # environment variable; 1 turns the kernels on
MAX_WIDTH = 4096  # one program holds a whole row in registers
# Supported dtypes of x and f, and the error, relative to the largest entry, at which a kernel counts as wrong.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CHECKED_TOKENS = 64


def should_fuse(x: Tensor, f: Tensor, alpha: Tensor) -> bool:
    """Whether to use `fused_lerp`: it must be switched on, and run uncompiled on a GPU where it is correct."""
    # The kernels do not support vmap, and torch has no public function to detect it.
    is_vmapped = torch._C._functorch.is_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]
    if torch.compiler.is_compiling() or is_vmapped or not x.is_cuda or os.environ.get(SWITCH) != "1":
        return False
    return supports(x, f, alpha) and is_correct(x.device, x.shape[-1], x.dtype, f.dtype)


def supports(x: Tensor, f: Tensor, alpha: Tensor) -> bool:
    """Whether the kernels accept operands of these shapes and dtypes."""
    width = x.shape[-1]
    return (
        x.shape == f.shape
        and x.numel() > 0
        and width <= MAX_WIDTH
        and alpha.shape in ((width,), (1,), ())
        and {x.dtype, f.dtype} <= TOLERANCE.keys()
        and alpha.dtype == torch.float32
        and x.device == f.device == alpha.device
    )


def fused_lerp(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """Computes `ngpt.model.residual.lerp` with its default norm in float32; differentiable once for all inputs.

    x and f are (..., D), float32 or bfloat16; alpha is float32 (D,), (1,) or (). The result has the shape of x.
    """
    # A single alpha is expanded to a row with stride 0; autograd sums its gradient.
    return _Lerp.apply(x, f, alpha.expand(x.shape[-1]))  # pyright: ignore[reportReturnType]


class _Lerp(torch.autograd.Function):
    """The gradient is derived in fused_lerp_triton.py."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
        from ngpt.kernels import fused_lerp_triton

        ctx.save_for_backward(x, f, alpha)
        return fused_lerp_triton.forward(_rows(x), _rows(f), alpha).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from ngpt.kernels import fused_lerp_triton

        x, f, alpha = ctx.saved_tensors
        gx, gf, galpha = fused_lerp_triton.backward(_rows(x), _rows(f), alpha, _rows(gy))
        return gx.view(x.shape), gf.view(f.shape), galpha


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


@functools.cache
def is_correct(device: torch.device, width: int, x_dtype: torch.dtype, f_dtype: torch.dtype) -> bool:
    """Whether Triton is installed, as with CUDA builds of torch, and the kernels agree with torch on this device.

    If the build fails (it needs a C compiler, Python's headers and a recent GPU) or a result is wrong, logs a warning.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    try:
        error = max_error(device, width, x_dtype, f_dtype)
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as reason:
        if is_out_of_memory(reason):
            raise
        log.warning("residual steps run without the fused kernel, which cannot be built on this machine: %s", reason)
        return False
    if error < max(TOLERANCE[x_dtype], TOLERANCE[f_dtype]):  # false for NaN
        return True
    log.warning("residual steps run without the fused kernel, whose error on %s is %.1g", device, error)
    return False


def max_error(device: torch.device, width: int, x_dtype: torch.dtype, f_dtype: torch.dtype) -> float:
    """Returns the largest error of output and gradients against float64, relative to the largest entry; may be NaN."""

    def waves(phase: float, *shape: int) -> Tensor:  # not random numbers, which would advance the run's generator
        return torch.sin(phase * torch.arange(math.prod(shape), device=device)).view(shape)

    shape = CHECKED_TOKENS, width
    inputs = waves(1.1, *shape).to(x_dtype), waves(1.7, *shape).to(f_dtype), waves(0.3, width).abs()
    results = []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for formula, dtype in ((fused_lerp, None), (_reference_lerp, torch.float64)):
            leaves = [tensor.to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in inputs]
            y = formula(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, waves(2.3, *shape).to(y.dtype))])
    errors = [(fused - exact).abs().max() / exact.abs().max() for fused, exact in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


def _reference_lerp(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    return F.normalize(torch.lerp(F.normalize(x, dim=-1), F.normalize(f, dim=-1), alpha), dim=-1)
