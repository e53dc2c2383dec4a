"""How the next token is chosen: temperature, top_k, top_p, and the draw."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ngpt.config.base import Config
from ngpt.model.config import Count

SMALLEST = torch.finfo(torch.float32).tiny


class Sampling(Config, frozen=True):
    """How the next token is sampled, see `probabilities`."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is chosen, without a draw."""
        return self.temperature == 0 or self.top_k == 1


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the distribution (B, V) of the next token for logits (B, V). Temperature 0 means greedy decoding.

    The temperature is applied first, then `top_k`, then `top_p`: nucleus sampling, which keeps the smallest set of most
    probable tokens whose total probability reaches `top_p` (Holtzman et al., arXiv 1904.09751). All other tokens get 0.
    In a tie, the lower id comes first.
    """
    if sampling.is_greedy:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # Subtracting the maximum before dividing keeps the result finite at any small temperature. Numbers that float32
    # rounds to 0 would make it 0 / 0.
    temperature = max(sampling.temperature, SMALLEST)
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if sampling.top_k is None and sampling.top_p in (None, 1):
        return p
    p, order = p.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        p[:, sampling.top_k :] = 0
        p /= p.sum(-1, keepdim=True)
    if sampling.top_p is not None:
        p = p.where(p.cumsum(-1) - p < max(sampling.top_p, SMALLEST), 0)
        p /= p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, order, p)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Returns for each distribution p (B, V), up to a factor, the token (B,) at the quantile `uniform` (B,) in [0, 1).

    One uniform number per token makes a sequence independent of the others in its batch; torch.multinomial takes V of
    them from one generator. The sum is float64, so that its rounding does not matter for any vocabulary.
    """
    if p.device.type == "mps":  # has no float64
        p = p.cpu()
    cumulated = p.double().cumsum(-1)
    total = cumulated[:, -1:]
    # Below the total, so that rounding cannot reach a token of probability 0 at the end.
    threshold = torch.minimum(uniform.to(p.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0]


def uniform_numbers(count: int, generator: torch.Generator | None) -> Tensor:
    """Draws `count` float64 numbers in [0, 1) on the device of the generator; None means torch's own on the CPU."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(count, dtype=torch.float64, generator=generator, device=device)
