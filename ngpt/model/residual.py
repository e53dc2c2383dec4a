"""How a sublayer's answer `f` moves the residual stream `x`: the rules, and the step length alpha.

A rule is a function (x, f, alpha, norm) -> x with x and f of shape (B, T, D) and alpha broadcastable to it, and one
entry in `RESIDUAL_RULES`. `norm` brings the result back to the sphere. The rules do not share the meaning of alpha:
`lerp` and `slerp` go that fraction of the way towards the *normalised* answer (0.05 turns the stream by about 3
degrees), `add_normalize` adds that multiple of the raw answer (0.15 at width 256: attention turns the stream by 2 to 3 degrees,
an MLP by 1, or with s_uv by 70 to 80). A campaign names the rule it is about.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ngpt.kernels.fused_lerp import fused_lerp, should_fuse
from ngpt.model.norm import l2_normalize

Norm = Callable[[Tensor], Tensor]
ResidualRule = Callable[[Tensor, Tensor, Tensor, Norm], Tensor]
R_MIN = 0.25  # smallest divisor of a step: no token moves more than four times as far as alpha says


def lerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """Official nGPT: a fraction alpha of the chord towards the normalised answer, then back to the sphere.

    Uncompiled on a GPU, with the plain norm, it is one kernel: see ngpt/kernels/fused_lerp.py. Source: arXiv 2410.01131, eq. 10 and
    11; NVIDIA/ngpt, model.py.
    """
    if norm is l2_normalize and should_fuse(x, f, alpha):
        return fused_lerp(x, f, alpha)
    x, f = norm(x), l2_normalize(f)
    return norm(x + alpha * (f - x))


def slerp(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """The geodesic that `lerp` approximates: a fraction alpha of the angle towards the normalised answer.

    With one alpha for all channels the result is on the sphere by itself; with one per channel it is not, and `norm`
    brings it back. An answer in the direction of x, or exactly opposite to it, says no direction to turn to: near these
    the step and its gradient stay finite. Source: arXiv 2410.01131, eq. 6 (Shoemake 1985).
    """
    x, f = norm(x), l2_normalize(f)
    cosine = (x * f).sum(-1, keepdim=True)
    tangent = f - cosine * x  # of length sin(angle); free of cancellation, unlike 1 - cosine^2
    # The bound is below what float32 resolves in the tangent, so that it changes nothing but a division by zero.
    sine = (tangent.square().sum(-1, keepdim=True) + 1e-14).sqrt()
    angle = torch.atan2(sine, cosine)
    return norm(torch.cos(alpha * angle) * x + torch.sin(alpha * angle) / sine * tangent)


def add_normalize(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """The rule of the source reports: add alpha times the raw branch, then return to the sphere."""
    return norm(x + alpha * f)


def add(x: Tensor, f: Tensor, alpha: Tensor, norm: Norm = l2_normalize) -> Tensor:
    """The pre-norm transformer's plain sum. It has no step length, and nothing of such a model is on the sphere."""
    return x + f


RESIDUAL_RULES: dict[str, ResidualRule] = {"lerp": lerp, "slerp": slerp, "add_normalize": add_normalize, "add": add}
RESIDUAL_ALIASES = {"seed": "add_normalize"}  # the name in campaigns, records and trial ids, which keep it
ALPHA_KINDS = ("vector", "scalar", "head")
ALPHA_SIGNS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,  # the official code: a step never points away from the answer
    "free": lambda alpha: alpha,
}


def apply_residual(
    x: Tensor,
    delta: Tensor,
    r: Tensor | float,
    *,
    alpha: Tensor | float = 0.05,
    rule: ResidualRule = lerp,
    norm: Norm = l2_normalize,
) -> Tensor:
    """One residual step of length alpha / r (seed 000, section 2.2); with r = 1 it is the plain rule bit for bit.

    The seed divides the answer `delta` by r instead. Under a rule that normalises its answer that would do nothing, so
    here r divides the step. It is kept above `R_MIN`: a divisor near zero, or below it, would undo the residual.

    Args:
        x, delta: stream and answer, (B, T, D).
        r: the divisor, (B, T) or one number.
        alpha: the step length, broadcastable to x.
    """
    divisor = torch.as_tensor(r, dtype=torch.float32, device=x.device).clamp(min=R_MIN)
    return rule(x, delta, torch.as_tensor(alpha, device=x.device) / divisor.unsqueeze(-1), norm)


class Scale(nn.Module):
    """A learned scaling with the init/scale trick of arXiv 2410.01131, section 2.5.

    It is stored as `scale` and acts as `stored * init / scale`, so that an optimizer step of size lr moves what acts by
    `lr * init / scale`: with scale = 1/sqrt(n_embd) a scaling moves about as fast as the entries of a unit row. With
    scale = init it is stored as it acts. `init / scale` is a tensor, not a constant of the graph: trials that differ in
    `init` share compiled code. A scale that is not `learned` is a buffer: saved, but no optimizer sees it.
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
        self.register_buffer("ratio", torch.tensor(self._ratio), persistent=False)

    def forward(self) -> Tensor:
        """The effective values, shape (size,)."""
        return self.stored * self.ratio

    def multiply(self, factor: float) -> None:
        """Makes it act as `factor` times what has been learned, until the next call (a schedule calls each step)."""
        self.ratio.fill_(self._ratio * factor)


def spread_over_depth(values: float | Sequence[float], n_layer: int) -> list[float]:
    """One value per layer from one for all, or from several that are spread evenly and joined by straight lines.

    As many values as layers are one each; `[0.3, 0.1]` falls from the first layer to the last, however many there are.
    """
    if isinstance(values, float | int):
        return [float(values)] * n_layer
    return np.interp(np.linspace(0, 1, n_layer), np.linspace(0, 1, len(values)), values).tolist()


class Residual(nn.Module):
    """One residual connection: a rule and its alpha, learned per channel (`vector`), as one number (`scalar`) or per
    attention head (`head`).

    Per head (seed 004 names it; the definition is ours): the heads' contributions to the answer are weighed by their
    alphas relative to the mean alpha, and that mean is the step. Equal alphas are the scalar rule, and under
    `add_normalize` it is x + sum_h alpha_h f_h.

    Args:
        rule: an entry of `RESIDUAL_RULES`.
        size: how many alphas there are: n_embd, 1, or the number of heads.
        alpha: the initial step length; `scale` and `learned` as in `Scale`.
        sign: an entry of `ALPHA_SIGNS`.
        per_head: whether the alphas are those of heads.
        renormalize: the probability with which this sublayer brings the stream back to the sphere in training; in
            evaluation it always does, unless this is 0.
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
        # Drawn by the train loop, not here: the same for all micro-batches of a step, and a tensor for the compiler.
        self.register_buffer("renormalized", torch.ones((), dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor, f: Tensor, r: Tensor | None = None) -> Tensor:
        """The stream after answer `f`, both (B, T, D); `r` (B, T) divides the step, None is the plain rule."""
        alpha = self.sign(self.alpha())
        if self.per_head:
            alpha = alpha.abs().mean(0, keepdim=True)  # 1-D: a 0-D tensor would take on the answer's bfloat16
        if r is None:
            return self.rule(x, f, alpha, self._norm)
        return apply_residual(x, f, r, alpha=alpha, rule=self.rule, norm=self._norm)

    def normalized_branch(self, f: Tensor) -> Tensor:
        """The answer as the rule takes it, which is what the divisor r counts: raw under `add_normalize`, else of length 1."""
        return f.float() if self.rule is add_normalize else l2_normalize(f)

    def head_weights(self) -> Tensor | None:
        """What each head's values are multiplied with before they are joined, (H,); None without alphas per head."""
        if not self.per_head:
            return None
        alpha = self.sign(self.alpha())
        return alpha / alpha.abs().mean().clamp(min=1e-12)  # all zero: no step, and not NaN

    @property
    def _norm(self) -> Norm:
        if self.renormalize == 0:
            return lambda x: x
        if self.renormalize == 1 or not self.training:
            return l2_normalize
        return lambda x: torch.where(self.renormalized, l2_normalize(x), x)
