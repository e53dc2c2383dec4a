"""How a sublayer's output, the branch `f`, moves the residual stream `x`: the rules, and the step length alpha.

A rule is a function (x, f, alpha, norm) -> x in `RESIDUAL_RULES`, with x and f of shape (B, T, D), alpha broadcastable
to it, and `norm` to return to the sphere. `lerp` and `slerp` go a fraction alpha of the way to the *normalized* branch
(0.05 turns the stream by about 3 degrees); `add_normalize` adds that multiple of the raw branch (0.15 at width 256
turns it by 2 to 3 degrees in attention, by 1 degree in an MLP, or by 70 to 80 with s_uv).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ngpt.kernels.fused_lerp import fused_lerp, should_fuse
from ngpt.model.norm import l2_normalize

Norm = Callable[[Tensor], Tensor]
ResidualRule = Callable[[Tensor, Tensor, Tensor, Norm], Tensor]
R_MIN = 0.25  # smallest divisor: no step is longer than four times alpha


def lerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """Official nGPT: a fraction alpha of the chord to the normalized branch (arXiv 2410.01131, equations 10 and 11)."""
    if norm is l2_normalize and should_fuse(x, f, alpha):
        return fused_lerp(x, f, alpha)
    x, f = norm(x), l2_normalize(f)
    return norm(x + alpha * (f - x))


def slerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """The geodesic that `lerp` approximates: a fraction alpha of the angle to the normalized branch.

    With one alpha per channel only `norm` gives length 1. If the branch points along x or opposite to it, step and
    gradient stay finite. Source: arXiv 2410.01131, equation 6 (Shoemake 1985).
    """
    x, f = norm(x), l2_normalize(f)
    cosine = (x * f).sum(-1, keepdim=True)
    tangent = f - cosine * x  # its length is sin(angle), without the cancellation of 1 - cosine^2
    # Below the float32 resolution of the tangent, 1e-14 only prevents a division by zero.
    sine = (tangent.square().sum(-1, keepdim=True) + 1e-14).sqrt()
    angle = torch.atan2(sine, cosine)
    return norm(torch.cos(alpha * angle) * x + torch.sin(alpha * angle) / sine * tangent)


def add_normalize(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """The rule of the source reports: add alpha times the raw branch, then return to the sphere."""
    return norm(x + alpha * f)


def add(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """The plain sum of a pre-norm transformer, which has no step length and nothing on the sphere."""
    return x + f


RESIDUAL_RULES: dict[str, ResidualRule] = {"lerp": lerp, "slerp": slerp, "add_normalize": add_normalize, "add": add}
RESIDUAL_ALIASES = {"seed": "add_normalize"}  # the name in campaigns, records and trial ids, which keep it
ALPHA_KINDS = ("vector", "scalar", "head")
ALPHA_SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,  # as in the official code: a step never points away from the branch
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
    """One residual step of length alpha / r (source report 000, section 2.2); r = 1 is the plain rule bit for bit.

    The report divides the branch `f` by r, which has no effect under a rule that normalizes the branch; here r divides
    the step. r, (B, T) or one number, is kept above `R_MIN`: a divisor near or below zero would undo the residual.
    """
    divisor = torch.as_tensor(r, dtype=torch.float32, device=x.device).clamp(min=R_MIN)
    return rule(x, f, torch.as_tensor(alpha, device=x.device) / divisor.unsqueeze(-1), norm)


class Scale(nn.Module):
    """A learned scaling with the init/scale trick of arXiv 2410.01131, section 2.5.

    It is stored as `scale` and acts as `stored * init / scale`, so an optimizer step of size lr moves the effective
    value by `lr * init / scale`: with scale = 1/sqrt(n_embd) about as fast as the entries of a unit row. With
    scale = init the stored value is the effective one. If not `learned`, it is a buffer, saved but not trained.
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
        # A tensor, not a constant of the graph, so trials that differ in `init` share compiled code.
        self.register_buffer("ratio", torch.tensor(self._ratio), persistent=False)

    def forward(self) -> Tensor:
        return self.stored * self.ratio

    def multiply(self, factor: float) -> None:
        """Multiplies the effective value by `factor` until the next call; a schedule calls this at each step."""
        self.ratio.fill_(self._ratio * factor)


def spread_over_depth(values: float | Sequence[float], n_layer: int) -> list[float]:
    """One value per layer, from one for all or from several that are spread evenly over the depth and interpolated."""
    if isinstance(values, float | int):
        return [float(values)] * n_layer
    return np.interp(np.linspace(0, 1, n_layer), np.linspace(0, 1, len(values)), values).tolist()


class Residual(nn.Module):
    """One residual connection: a rule and its alphas.

    Source report 004 names alphas per head without a definition. Here the heads' parts of the branch are weighted by
    alpha over the mean alpha, and the mean is the step. With equal alphas this is the scalar rule; under
    `add_normalize` it is x + sum_h alpha_h f_h.

    Args:
        size: number of alphas: n_embd, 1, or with `per_head` the number of heads.
        alpha: the initial step length; `scale` and `learned` as in `Scale`.
        renormalize: probability with which a training step returns the stream to the sphere at this sublayer.
            Evaluation always does, unless this is 0.
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
        # Drawn by the train loop: the same for all micro-batches of a step, and a tensor for the compiler.
        self.register_buffer("renormalized", torch.ones((), dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor, f: Tensor, r: Tensor | None = None) -> Tensor:
        """The stream after branch `f`, both (B, T, D); `r` (B, T) divides the step, None is the plain rule."""
        alpha = self.sign(self.alpha())
        if self.per_head:
            alpha = alpha.abs().mean(0, keepdim=True)  # 1-D: a 0-D tensor would take the dtype of a bfloat16 branch
        if r is None:
            return self.rule(x, f, alpha, self._norm)
        return apply_residual(x, f, r, alpha=alpha, rule=self.rule, norm=self._norm)

    def normalized_branch(self, f: Tensor) -> Tensor:
        """The branch as the rule uses it, for the divisor r: raw under `add_normalize`, else of length 1."""
        return f.float() if self.rule is add_normalize else l2_normalize(f)

    def head_weights(self) -> Tensor | None:
        """Factors (H,) of the heads' outputs before they are joined; None without alphas per head."""
        if not self.per_head:
            return None
        alpha = self.sign(self.alpha())
        return alpha / alpha.abs().mean().clamp(min=1e-12)  # clamped: alphas of zero give no step instead of NaN

    @property
    def _norm(self) -> Norm:
        if self.renormalize == 0:
            return lambda x: x
        if self.renormalize == 1 or not self.training:
            return l2_normalize
        return lambda x: torch.where(self.renormalized, l2_normalize(x), x)
