"""How a block's answer `f` moves the residual stream `x`: the rules, and the learned step length alpha.

A rule is a function (x, f, alpha) -> x with x and f of shape (B, T, D) and alpha broadcastable to it, and one entry
in `RESIDUAL_RULES`. The rules do not share the meaning of alpha: `lerp` goes that fraction of the way towards the
*normalised* answer (0.05 turns the stream by about 3 degrees), `seed` adds that multiple of the raw answer (0.15 turns
it by about 1 degree at width 256). A campaign names the rule it is about.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ngpt.norm import l2_normalize

ResidualRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def lerp(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """Official nGPT: a fraction alpha of the chord towards the normalised answer, then back to the sphere.

    Source: arXiv 2410.01131, eq. 10 and 11; NVIDIA/ngpt, model.py.
    """
    x, f = l2_normalize(x), l2_normalize(f)
    return l2_normalize(x + alpha * (f - x))


def seed(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """The rule of the project's seed documents: add alpha times the raw answer, then back to the sphere."""
    return l2_normalize(x + alpha * f)


def add(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    """The pre-norm transformer's plain sum. It has no step length, and nothing of such a model is on the sphere."""
    return x + f


RESIDUAL_RULES: dict[str, ResidualRule] = {"lerp": lerp, "seed": seed, "add": add}
ALPHA_KINDS = ("vector", "scalar")


class Scale(nn.Module):
    """A learned scaling with the init/scale trick of arXiv 2410.01131, section 2.5.

    It is stored as `scale` and acts as `stored * init / scale`, so that an optimizer step of size lr moves what acts by
    `lr * init / scale`: with scale = 1/sqrt(n_embd) a scaling moves about as fast as the entries of a unit row.
    `init / scale` is a tensor, not a constant of the graph: trials that differ in `init` share compiled code.
    """

    ratio: Tensor

    def __init__(self, size: int, *, init: float, scale: float) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.full((size,), scale))
        self.register_buffer("ratio", torch.tensor(init / scale), persistent=False)

    def forward(self) -> Tensor:
        """The effective values, shape (size,)."""
        return self.stored * self.ratio


class Residual(nn.Module):
    """One residual connection: a rule and its alpha, learned per channel (`vector`) or as one number (`scalar`)."""

    def __init__(self, rule: str, *, n_embd: int, alpha: float, alpha_kind: str) -> None:
        super().__init__()
        self.rule = RESIDUAL_RULES[rule]
        size = 1 if alpha_kind == "scalar" else n_embd
        self.alpha = Scale(size, init=alpha, scale=n_embd**-0.5)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        # The official code takes the absolute value: a step never points away from the answer.
        return self.rule(x, f, self.alpha().abs())
