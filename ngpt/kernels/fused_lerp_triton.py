"""The Triton kernels of fused_lerp.py, forward and backward. They process one token, a row of D numbers, at a time.

Forward. With u = x / |x|, h = f / |f| and z = u + alpha * (h - u), alpha per channel: y = z / |z|. A length below EPS
counts as EPS, as in `ngpt.model.norm.l2_normalize`, so the zero vector stays zero.

Backward. Let g be the gradient of y. The differential of u = v / |v| is (dv - u (u . dv)) / |v|, a symmetric map, so
the gradient of v is the gradient of u minus its part along u, over |v|. Where |v| < EPS the divisor is constant and the
gradient is only divided by it. Applying this three times and the product rule twice:

    gz     = (g - y (y . g)) / |z|
    galpha = sum over the tokens of gz * (h - u)
    gh     = alpha * gz          gf = (gh - h (h . gh)) / |f|
    gu     = gz - alpha * gz     gx = (gu - u (u . gu)) / |x|

Only x and f are kept for it; u, h and z are recomputed in registers. For galpha, each program adds up its tokens in
order, and a second pass adds these sums: without atomic additions, and with a number of programs that depends on the
shape only, the result is reproducible. Everything is computed in float32.

Importing this file needs Triton. To run it in Triton's interpreter, set TRITON_INTERPRET=1 before.
"""

import math
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

EPS = tl.constexpr(1e-12)
WARP_COLUMNS = 256  # columns per warp: 8 for each of 32 threads
MAX_WARPS = 16  # per program
BACKWARD_WARPS = 4096  # of all programs together: fills the largest GPUs twice


@triton.jit
def _row(start, columns, inside):
    return tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _unit(vector):
    """The vector scaled to length 1, and its length."""
    # Correctly rounded: Triton's plain square root and division are approximate. Once per row, they cost nothing.
    length = tl.sqrt_rn(tl.sum(vector * vector, axis=0))
    return vector * tl.div_rn(1.0, tl.maximum(length, EPS)), length


@triton.jit
def _before_unit(gradient, unit, length):
    """The gradient of a vector, given that of its unit vector."""
    along = tl.where(length >= EPS, tl.sum(gradient * unit, axis=0), 0.0)
    return (gradient - along * unit) * tl.div_rn(1.0, tl.maximum(length, EPS))


@triton.jit
def _forward(x_start, f_start, alpha_start, y_start, alpha_stride, width, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * width  # int64: the stream may hold more than 2^31 numbers
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    alpha = _row(alpha_start, columns * alpha_stride, inside)
    u, _ = _unit(_row(x_start + at, columns, inside))
    h, _ = _unit(_row(f_start + at, columns, inside))
    y, _ = _unit(u + alpha * (h - u))
    tl.store(y_start + at + columns, y, mask=inside)


@triton.jit
def _backward(
    x_start,
    f_start,
    alpha_start,
    gy_start,
    gx_start,
    gf_start,
    sums_start,
    alpha_stride,
    tokens,
    tokens_each,
    width,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    alpha = _row(alpha_start, columns * alpha_stride, inside)
    galpha = tl.zeros([BLOCK], tl.float32)
    first = program * tokens_each
    for token in range(first, tl.minimum(first + tokens_each, tokens)):
        at = token * width
        u, x_length = _unit(_row(x_start + at, columns, inside))
        h, f_length = _unit(_row(f_start + at, columns, inside))
        y, z_length = _unit(u + alpha * (h - u))
        gz = _before_unit(_row(gy_start + at, columns, inside), y, z_length)
        galpha += gz * (h - u)
        gh = alpha * gz
        gf = _before_unit(gh, h, f_length)
        gx = _before_unit(gz - gh, u, x_length)
        tl.store(gf_start + at + columns, gf.to(gf_start.dtype.element_ty), mask=inside)
        tl.store(gx_start + at + columns, gx.to(gx_start.dtype.element_ty), mask=inside)
    tl.store(sums_start + program * width + columns, galpha, mask=inside)


def forward(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """y, float32 (N, D), for contiguous x and f (N, D) and alpha (D,), which may be an expanded number."""
    tokens, width = x.shape
    y = torch.empty_like(x, dtype=torch.float32)
    _launch(_forward, tokens, width, x, f, alpha, y, alpha.stride(0), width)
    return y


def backward(x: Tensor, f: Tensor, alpha: Tensor, gy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and f, in their dtypes, and of alpha, float32 (D,), from that of y, contiguous (N, D)."""
    tokens, width = x.shape
    tokens_each = math.ceil(tokens / (BACKWARD_WARPS // _sizes(width)[1]))
    programs = math.ceil(tokens / tokens_each)
    gx, gf = torch.empty_like(x), torch.empty_like(f)
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _launch(_backward, programs, width, x, f, alpha, gy, gx, gf, sums, alpha.stride(0), tokens, tokens_each, width)
    return gx, gf, sums.sum(0)


def _launch(kernel: Any, programs: int, row: int, first: Tensor, *rest: Tensor | int) -> None:
    block, warps = _sizes(row)
    with torch.cuda.device_of(first):  # Triton launches on the current device, not on that of the tensors
        kernel[(programs,)](first, *rest, BLOCK=block, num_warps=warps)


def _sizes(width: int) -> tuple[int, int]:
    """The width rounded up to a power of two, as Triton's blocks need it, and the number of warps for it."""
    block = 1 << (width - 1).bit_length()
    return block, max(1, min(MAX_WARPS, block // WARP_COLUMNS))
