"""Float32 normalizations: L2 (nGPT), RMS (GPT), and the divisor r, which shortens steps along the stream."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.config.base import unknown_message


def l2_normalize(x: Tensor, dim: int = -1) -> Tensor:
    """Scales `x` to unit Euclidean length along `dim`, in float32 (nGPT's Norm, arXiv 2410.01131, section 2.1).

    The zero vector stays zero; in the official repository it becomes NaN.
    """
    return F.normalize(x.float(), dim=dim, eps=1e-12)


def rms_norm(x: Tensor, eps: float | None = None) -> Tensor:
    """Scales `x` to root mean square 1 along the last dimension, in float32, without gain; `eps` None means torch's."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps)


def baseline(r: Tensor, dot: Tensor, decay: float) -> Tensor:
    """Leaves r at 1, as in a residual step without divisor."""
    return r


def dotprod(r: Tensor, dot: Tensor, decay: float) -> Tensor:
    """Adds <x, f> at each sublayer (source report 000, section 1)."""
    return r + dot


def ema(r: Tensor, dot: Tensor, decay: float) -> Tensor:
    """Averages 1 + <x, f> exponentially, our reading of the "EMA-decay variant" in source report 000, section 10."""
    return decay * r + (1 - decay) * (1 + dot)


NORM_MODES = {"baseline": baseline, "dotprod": dotprod, "ema": ema}


class DotProdNormalizer(nn.Module):
    """Divisor r of each token, updated at every sublayer of a forward pass (source report 000, section 2.2).

    r starts at 1. The norm mode updates it with the dot product of stream x and branch f, and
    `ngpt.model.residual.apply_residual` divides the step by it. It is float32, since the report's bfloat16 cannot
    represent consecutive integers above 256. NaN becomes 1 and infinity the largest float of the same sign; `replaced`
    counts both over all passes.
    """

    replaced: Tensor

    def __init__(self, mode: str = "dotprod", *, decay: float = 0.9) -> None:
        super().__init__()
        if mode not in NORM_MODES:
            raise ValueError(unknown_message("norm mode", mode, NORM_MODES))
        self.mode, self.decay = mode, decay
        self.register_buffer("replaced", torch.zeros((), dtype=torch.int64))
        self._counts = True

    def start(self, x: Tensor) -> Tensor:
        """Returns r before the first sublayer: ones of shape (B, T) for a stream x (B, T, D)."""
        return torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)

    def forward(self, r: Tensor, x: Tensor, f: Tensor) -> Tensor:
        """Returns the updated r (B, T) for a sublayer with stream `x` and branch `f`, both (B, T, D)."""
        dot = (x.float() * f.float()).sum(-1)
        r = NORM_MODES[self.mode](r, dot, self.decay)
        if self._counts:
            self.replaced += (~r.detach().isfinite()).sum()  # the graph keeps nothing of it
        return torch.nan_to_num(r, nan=1.0)

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Returns context managers for a pass and for its repetition, which counts nothing."""
        return contextlib.nullcontext(), self._uncounted()

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        self._counts = False
        try:
            yield
        finally:
            self._counts = True
