"""The Triton kernels of fused_lerp.py, forward and backward. They process one token (a row of D numbers) at a time.

Forward. u = x / |x|, h = f / |f|, z = u + alpha * (h - u) with alpha per channel, and y = z / |z|. Lengths are clamped
at EPS, as in `ngpt.model.norm.l2_normalize`, so the zero vector stays zero.

Backward. Let g be the gradient of y. The differential of u = v / |v| is (dv - u (u . dv)) / |v|, a symmetric map, so
the gradient of v is the gradient of u minus its component along u, divided by |v|. Where |v| < EPS the divisor is the
constant EPS, and nothing is subtracted. Applying this three times and the product rule twice:

    gz     = (g - y (y . g)) / |z|
    galpha = sum over the tokens of gz * (h - u)
    gh     = alpha * gz          gf = (gh - h (h . gh)) / |f|
    gu     = gz - alpha * gz     gx = (gu - u (u . gu)) / |x|

Only x, f and alpha are saved for the backward pass; u, h and z are recomputed in registers. For galpha, each program
sums over its tokens in order, and a second pass adds these sums. There are no atomic additions and the number of
programs depends on the shape only, so the result is reproducible. Everything is computed in float32.

Importing this module requires Triton. To run it in Triton's interpreter, set TRITON_INTERPRET=1 before the import.
"""

import math
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

EPS = tl.constexpr(1e-12)
WARP_COLUMNS = 256  # columns per warp: 8 for each of its 32 threads
MAX_WARPS = 16  # per program
BACKWARD_WARPS = 4096  # over all programs; enough to fill the largest GPUs twice


@triton.jit
def _load_row(pointer, columns, in_row):
    return tl.load(pointer + columns, mask=in_row, other=0.0).to(tl.float32)


@triton.jit
def _normalize(vector):
    """Returns the vector scaled to length 1, and its length before scaling."""
    # Correctly rounded, since Triton's plain square root and division are approximate. Once per row this costs nothing.
    length = tl.sqrt_rn(tl.sum(vector * vector, axis=0))
    return vector * tl.div_rn(1.0, tl.maximum(length, EPS)), length


@triton.jit
def _normalize_backward(gradient, unit, length):
    """Returns the gradient of a vector, given the gradient of its normalized vector."""
    along = tl.where(length >= EPS, tl.sum(gradient * unit, axis=0), 0.0)
    return (gradient - along * unit) * tl.div_rn(1.0, tl.maximum(length, EPS))


@triton.jit
def _forward(x_ptr, f_ptr, alpha_ptr, y_ptr, alpha_stride, width, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * width  # int64: the stream may hold more than 2^31 numbers
    columns = tl.arange(0, BLOCK)
    in_row = columns < width
    alpha = _load_row(alpha_ptr, columns * alpha_stride, in_row)
    u, _ = _normalize(_load_row(x_ptr + offset, columns, in_row))
    h, _ = _normalize(_load_row(f_ptr + offset, columns, in_row))
    y, _ = _normalize(u + alpha * (h - u))
    tl.store(y_ptr + offset + columns, y, mask=in_row)


@triton.jit
def _backward(
    x_ptr,
    f_ptr,
    alpha_ptr,
    gy_ptr,
    gx_ptr,
    gf_ptr,
    sums_ptr,
    alpha_stride,
    tokens,
    tokens_per_program,
    width,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    in_row = columns < width
    alpha = _load_row(alpha_ptr, columns * alpha_stride, in_row)
    galpha = tl.zeros([BLOCK], tl.float32)
    first = program * tokens_per_program
    for token in range(first, tl.minimum(first + tokens_per_program, tokens)):
        offset = token * width
        u, x_length = _normalize(_load_row(x_ptr + offset, columns, in_row))
        h, f_length = _normalize(_load_row(f_ptr + offset, columns, in_row))
        y, z_length = _normalize(u + alpha * (h - u))
        gz = _normalize_backward(_load_row(gy_ptr + offset, columns, in_row), y, z_length)
        galpha += gz * (h - u)
        gh = alpha * gz
        gf = _normalize_backward(gh, h, f_length)
        gx = _normalize_backward(gz - gh, u, x_length)
        tl.store(gf_ptr + offset + columns, gf.to(gf_ptr.dtype.element_ty), mask=in_row)
        tl.store(gx_ptr + offset + columns, gx.to(gx_ptr.dtype.element_ty), mask=in_row)
    tl.store(sums_ptr + program * width + columns, galpha, mask=in_row)


def forward(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """Returns y, float32 (N, D), for contiguous x and f (N, D) and alpha (D,), which may have stride 0."""
    tokens, width = x.shape
    y = torch.empty_like(x, dtype=torch.float32)
    _launch(_forward, tokens, width, x, f, alpha, y, alpha.stride(0), width)
    return y


def backward(x: Tensor, f: Tensor, alpha: Tensor, gy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x and f, in their dtypes, and of alpha, float32 (D,); `gy` is contiguous (N, D)."""
    tokens, width = x.shape
    tokens_per_program = math.ceil(tokens / (BACKWARD_WARPS // _sizes(width)[1]))
    programs = math.ceil(tokens / tokens_per_program)
    gx, gf = torch.empty_like(x), torch.empty_like(f)
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _launch(
        _backward, programs, width, x, f, alpha, gy, gx, gf, sums, alpha.stride(0), tokens, tokens_per_program, width
    )
    return gx, gf, sums.sum(0)


def _launch(kernel: Any, programs: int, row: int, first: Tensor, *rest: Tensor | int) -> None:
    block, warps = _sizes(row)
    with torch.cuda.device_of(first):  # Triton launches on the current device, whatever the tensors' device
        kernel[(programs,)](first, *rest, BLOCK=block, num_warps=warps)


def _sizes(width: int) -> tuple[int, int]:
    """Returns the block size, which Triton requires to be a power of two, and the number of warps for a row."""
    block = 1 << (width - 1).bit_length()
    return block, max(1, min(MAX_WARPS, block // WARP_COLUMNS))
