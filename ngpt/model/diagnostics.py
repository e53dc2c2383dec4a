"""Looking into a model while it trains: how far it has left the sphere, its step lengths alpha, the divisors r."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ngpt.model.gpt import GPT, SphereBlock
from ngpt.model.norm import DotProdNormalizer
from ngpt.model.residual import Residual


@torch.no_grad()
def weight_norm_error(model: GPT) -> float:
    """The largest deviation from length 1 among all vectors of the sphere weights; 0 for a GPT."""
    errors = [_deviation(weight, dim) for weight, dim in model.sphere_weights()]
    return float(torch.stack(errors).max()) if errors else 0.0


@torch.no_grad()
def activation_norm_error(model: GPT, idx: Tensor) -> float:
    """The largest deviation from length 1 of the residual stream for tokens `idx` (B, T); 0 for a GPT.

    It is measured before the first sublayer and after each, where lazy projection and left-out norms leave their
    traces; with stochastic norms in training, by the draws of the last step.
    """
    if not model.cfg.on_sphere:
        return 0.0
    return float(torch.stack([_deviation(x, -1) for x in (model.wte(idx), *_outputs(model, idx, Residual))]).max())


@torch.no_grad()
def divisors(model: GPT, idx: Tensor) -> dict[str, Tensor]:
    """The divisor r after each sublayer for tokens `idx` (B, T), by name; empty in norm mode `baseline`."""
    if model.normalizer is None:
        return {}
    names = (f"r/{sublayer}.{layer}" for layer in range(len(model.blocks)) for sublayer in ("attention", "mlp"))
    return dict(zip(names, _outputs(model, idx, DotProdNormalizer), strict=True))


def divisor_statistics(found: dict[str, Tensor]) -> dict[str, float]:
    """`r_mean`, `r_min` and `r_max` over all tokens and sublayers of `divisors`; nothing where there are none."""
    if not found:
        return {}
    r = torch.stack(list(found.values()))
    return {"r_mean": float(r.mean()), "r_min": float(r.min()), "r_max": float(r.max())}


@torch.no_grad()
def effective_alphas(model: GPT) -> dict[str, Tensor]:
    """The effective alphas of each residual by name, 1-D; empty for a GPT."""
    found = {}
    for layer, block in enumerate(model.blocks):
        if isinstance(block, SphereBlock):
            for name, residual in (("attention", block.attention_residual), ("mlp", block.mlp_residual)):
                found[f"alpha/{name}.{layer}"] = residual.sign(residual.alpha())
    return found


@contextlib.contextmanager
def restore_counts_on_error(model: GPT) -> Iterator[None]:
    """Divisors r that were not finite do not count in a pass that breaks off: it is tried again."""
    counts = [] if model.normalizer is None else [model.normalizer.replaced]
    before = [count.clone() for count in counts]
    try:
        yield
    except BaseException:
        for count, old in zip(counts, before, strict=True):
            count.copy_(old)
        raise


def _outputs(model: GPT, idx: Tensor, kind: type[nn.Module]) -> list[Tensor]:
    """What the modules of a kind return for tokens `idx`, one entry a call."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output)

    hooks = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, kind)]
    replaced = [] if model.normalizer is None else [model.normalizer.replaced]
    counted = [count.clone() for count in replaced]
    try:
        for _ in model.stream(idx):
            pass
    finally:
        for hook in hooks:
            hook.remove()
        for count, before in zip(replaced, counted, strict=True):
            count.copy_(before)  # looking does not count
    return found


def _deviation(x: Tensor, dim: int) -> Tensor:
    return (torch.linalg.vector_norm(x.float(), dim=dim) - 1).abs().max()
