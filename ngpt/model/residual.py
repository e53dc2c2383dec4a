"""Residual rules: how a sublayer's output, the branch `f`, updates the residual stream `x` with step size alpha.

A rule is a function (x, f, alpha, norm) -> x in `RESIDUAL_RULES`, with x and f of shape (B, T, D) and alpha
broadcastable to that shape; `norm` returns x to the sphere. `lerp` and `slerp` move x a fraction alpha of the way to
the *normalized* branch (0.05 rotates the stream by about 3 degrees). `add_normalize` adds alpha times the raw branch
(0.15 at width 256 rotates the stream by 2 to 3 degrees in attention and by 1 degree in an MLP, or 70 to 80 with s_uv).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ngpt.kernels.fused_lerp import fused_lerp, should_fuse
from ngpt.model.norm import l2_normalize

Norm = Callable[[Tensor], Tensor]
ResidualRule = Callable[[Tensor, Tensor, Tensor, Norm], Tensor]
R_MIN = 0.25  # lower bound of the divisor, so a step is at most four times alpha


def lerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """Official nGPT: moves x by alpha along the chord to the normalized branch (arXiv 2410.01131, equations 10, 11)."""
    if norm is l2_normalize and should_fuse(x, f, alpha):
        return fused_lerp(x, f, alpha)
    x, f = norm(x), l2_normalize(f)
    return norm(x + alpha * (f - x))


def slerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """Rotates x by a fraction alpha of its angle to the normalized branch, the geodesic that `lerp` approximates.

    With one alpha per channel the result needs `norm` to have unit length. If the branch is parallel or antiparallel to
    x, step and gradient stay finite. Source: arXiv 2410.01131, equation 6 (Shoemake 1985).
    """
    x, f = norm(x), l2_normalize(f)
    cosine = (x * f).sum(-1, keepdim=True)
    tangent = f - cosine * x  # its length is sin(angle), computed without the cancellation in 1 - cosine^2
    # 1e-14 is below the float32 resolution of the tangent and only prevents a division by zero.
    sine = (tangent.square().sum(-1, keepdim=True) + 1e-14).sqrt()
    angle = torch.atan2(sine, cosine)
    return norm(torch.cos(alpha * angle) * x + torch.sin(alpha * angle) / sine * tangent)


def add_normalize(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """Adds alpha times the raw branch, then normalizes, as in the source reports."""
    return norm(x + alpha * f)


def add(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """Adds the branch, as in a pre-norm transformer; alpha and norm are ignored."""
    return x + f


RESIDUAL_RULES: dict[str, ResidualRule] = {"lerp": lerp, "slerp": slerp, "add_normalize": add_normalize, "add": add}
RESIDUAL_ALIASES = {"seed": "add_normalize"}  # older name, still used in campaign files, records and trial ids
ALPHA_KINDS = ("vector", "scalar", "head")
ALPHA_SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,  # as in the official code, so a step never points away from the branch
    "free": lambda alpha: alpha,
}


def apply_residual(
    x: Tensor,
    f: Tensor,
    r: Tensor | float,
    *,
    alpha: Tensor | float = 0.05,
    rule: ResidualRule = lerp,
    norm: Norm = l2_normalize,
) -> Tensor:
    """Applies `rule` with step size alpha / r (source report 000, section 2.2); r = 1 gives the rule bit for bit.

    The report divides the branch `f` by r, which has no effect if the rule normalizes the branch; here r divides alpha.
    r, (B, T) or a number, is clamped at `R_MIN`, since a divisor near or below zero would blow up or reverse the step.
    """
    divisor = torch.as_tensor(r, dtype=torch.float32, device=x.device).clamp(min=R_MIN)
    return rule(x, f, torch.as_tensor(alpha, device=x.device) / divisor.unsqueeze(-1), norm)


class Scale(nn.Module):
    """Learned scaling vector with the init/scale reparametrization of arXiv 2410.01131, section 2.5.

    The parameter is initialized to `scale`, and its effective value is `stored * init / scale`. An optimizer step of
    size lr thus changes the effective value by `lr * init / scale`: scale = 1/sqrt(n_embd) matches the size of the
    entries of a unit vector, scale = init makes stored and effective value equal. Without `learned` it is a buffer,
    saved but not trained.
    """

    stored: Tensor
    ratio: Tensor

    def __init__(self, size: int, *, init: float, scale: float, learned: bool = True) -> None:
        super().__init__()
        stored = torch.full((size,), scale)
        if learned:
            self.stored = nn.Parameter(stored)
        else:
            self.register_buffer("stored", stored)
        self._ratio = init / scale
        # A tensor instead of a graph constant, so models that differ only in `init` share compiled code.
        self.register_buffer("ratio", torch.tensor(self._ratio), persistent=False)

    def forward(self) -> Tensor:
        return self.stored * self.ratio

    def multiply(self, factor: float) -> None:
        """Sets the effective value to `factor` times its unscheduled value; successive calls do not compound."""
        self.ratio.fill_(self._ratio * factor)


def spread_over_depth(values: float | Sequence[float], n_layer: int) -> list[float]:
    """Returns one value per layer; several `values` are placed evenly over the depth and interpolated linearly."""
    if isinstance(values, float | int):
        return [float(values)] * n_layer
    return np.interp(np.linspace(0, 1, n_layer), np.linspace(0, 1, len(values)), values).tolist()


class Residual(nn.Module):
    """Residual connection with a rule and its alphas.

    Source report 004 mentions per-head alphas without defining them. Here each head's contribution to the branch is
    weighted by its alpha divided by the mean of |alpha|, and that mean is the step size. With equal alphas this is the
    scalar rule; under `add_normalize` it is x + sum_h alpha_h f_h, then normalized.

    Args:
        size: number of alphas: n_embd, 1, or the number of heads with `per_head`.
        alpha: initial step size; `scale` and `learned` as in `Scale`.
        renormalize: probability that a training step normalizes the stream at this sublayer. Evaluation always
            normalizes it, unless the probability is 0.
    """

    renormalized: Tensor

    def __init__(
        self,
        rule: str,
        *,
        size: int,
        alpha: float,
        scale: float,
        learned: bool = True,
        sign: str = "abs",
        per_head: bool = False,
        renormalize: float = 1.0,
    ) -> None:
        super().__init__()
        self.rule, self.sign = RESIDUAL_RULES[rule], ALPHA_SIGNS[sign]
        self.per_head, self.renormalize = per_head, renormalize
        self.alpha = Scale(size, init=alpha, scale=scale, learned=learned)
        # Drawn once per step by `GPT.prepare_step`, for all its micro-batches; a tensor, so a draw does not recompile.
        self.register_buffer("renormalized", torch.ones((), dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor, f: Tensor, r: Tensor | None = None) -> Tensor:
        """Returns the stream (B, T, D) after adding branch `f` (B, T, D); `r` (B, T) divides the step size."""
        alpha = self.sign(self.alpha())
        if self.per_head:
            alpha = alpha.abs().mean(0, keepdim=True)  # 1-D: a 0-D tensor would take the dtype of a bfloat16 branch
        if r is None:
            return self.rule(x, f, alpha, self._norm)
        return apply_residual(x, f, r, alpha=alpha, rule=self.rule, norm=self._norm)

    def normalized_branch(self, f: Tensor) -> Tensor:
        """Returns the branch as the rule uses it: raw under `add_normalize`, else of unit length."""
        return f.float() if self.rule is add_normalize else l2_normalize(f)

    def head_weights(self) -> Tensor | None:
        """Returns the weights (H,) of the head outputs; None without per-head alphas."""
        if not self.per_head:
            return None
        alpha = self.sign(self.alpha())
        return alpha / alpha.abs().mean().clamp(min=1e-12)  # if all alphas are zero: no step instead of NaN

    @property
    def _norm(self) -> Norm:
        if self.renormalize == 0:
            return lambda x: x
        if self.renormalize == 1 or not self.training:
            return l2_normalize
        return lambda x: torch.where(self.renormalized, l2_normalize(x), x)
