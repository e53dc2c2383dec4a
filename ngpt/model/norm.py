"""Normalisations, always computed in float32: onto the unit sphere (nGPT), to unit root mean square (GPT), and the
running divisor r of seed 000, which shortens the step of a residual whose answers agree with the stream.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.config.base import unknown


def l2_normalize(x: Tensor, dim: int = -1) -> Tensor:
    """`x` scaled to Euclidean length 1 along `dim`, as float32 of the same shape (nGPT's Norm, arXiv 2410.01131, 2.1).

    The zero vector stays zero instead of becoming NaN as in the official repository. The result is float32 whatever
    goes in: a stream of some 100 normalisations in bfloat16 compounds its rounding.
    """
    return F.normalize(x.float(), dim=dim, eps=1e-12)


def rms_norm(x: Tensor) -> Tensor:
    """`x` scaled to root mean square 1 along the last dimension, without learned gain, as float32.

    nanochat's norm, with its eps: torch's default, which is the machine epsilon of float32.
    """
    return F.rms_norm(x.float(), (x.shape[-1],))


def baseline(r: Tensor, dot: Tensor, decay: float) -> Tensor:
    """r stays 1: the plain residual."""
    return r


def dotprod(r: Tensor, dot: Tensor, decay: float) -> Tensor:
    """Cumulative (seed 000, section 1): r grows by <x, A> at each sublayer."""
    return r + dot


def ema(r: Tensor, dot: Tensor, decay: float) -> Tensor:
    """A moving average of 1 + <x, A> (seed 000, section 10, names an "EMA-decay variant"; the definition is ours).

    Answers at right angles to the stream leave r at 1, and so does decay = 1.
    """
    return decay * r + (1 - decay) * (1 + dot)


NORM_MODES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "baseline": baseline,
    "dotprod": dotprod,
    "ema": ema,
}


class DotProdNormalizer(nn.Module):
    """The divisor r of each token, carried over the sublayers of one forward pass (seed 000, section 2.2).

    It starts at 1 in every pass, grows by the norm mode's rule with the dot product of the stream x and the answer A,
    and divides the step: alpha / r (see `ngpt.model.residual.apply_residual`). It is kept in float32, where the seed says
    bfloat16: that stops counting at 256. A NaN becomes 1 and an infinity the largest float of its sign; both are
    counted in `replaced`, over all passes.
    """

    replaced: Tensor

    def __init__(self, mode: str = "dotprod", *, decay: float = 0.9) -> None:
        super().__init__()
        if mode not in NORM_MODES:
            raise ValueError(unknown("norm mode", mode, NORM_MODES))
        self.mode, self.decay = mode, decay
        self.register_buffer("replaced", torch.zeros((), dtype=torch.int64))

    def start(self, x: Tensor) -> Tensor:
        """r before the first sublayer: ones of shape (B, T) for a stream x of shape (B, T, D)."""
        return torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)

    def forward(self, r: Tensor, x: Tensor, answer: Tensor) -> Tensor:
        """r (B, T) after a sublayer that answers `answer` to the stream `x`, both (B, T, D)."""
        dot = (x.float() * answer.float()).sum(-1)
        r = NORM_MODES[self.mode](r, dot, self.decay)
        self.replaced += (~r.isfinite()).sum()
        return torch.nan_to_num(r, nan=1.0)
