"""Measurements of a model in training: distance from the sphere, step lengths alpha, divisors r."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ngpt.model.gpt import GPT
from ngpt.model.norm import DotProdNormalizer
from ngpt.model.residual import Residual


@torch.no_grad()
def weight_norm_error(model: GPT) -> float:
    """Largest deviation from length 1 of the vectors of the sphere weights; 0 for a GPT."""
    errors = [_deviation(weight, dim) for weight, dim in model.sphere_weights()]
    return float(torch.stack(errors).max()) if errors else 0.0


@torch.no_grad()
def activation_norm_error(model: GPT, idx: Tensor) -> float:
    """Largest deviation from length 1 of the residual stream for tokens `idx` (B, T); 0 for a GPT.

    Measured before the first sublayer and after each. In training mode, the last step's stochastic norms apply.
    """
    if not model.cfg.on_sphere:
        return 0.0
    return float(torch.stack([_deviation(x, -1) for x in (model.wte(idx), *_outputs(model, idx, Residual))]).max())


@torch.no_grad()
def divisors(model: GPT, idx: Tensor) -> dict[str, Tensor]:
    """Divisor r (B, T) after each sublayer for tokens `idx` (B, T), by name; empty in norm mode `baseline`."""
    if model.normalizer is None:
        return {}
    names = (f"r/{sublayer}.{layer}" for layer in range(len(model.blocks)) for sublayer in ("attention", "mlp"))
    return dict(zip(names, _outputs(model, idx, DotProdNormalizer), strict=True))


def divisor_statistics(divisors: dict[str, Tensor]) -> dict[str, float]:
    """`r_mean`, `r_min` and `r_max` over all tokens and sublayers; empty without divisors."""
    if not divisors:
        return {}
    r = torch.stack(list(divisors.values()))
    return {"r_mean": float(r.mean()), "r_min": float(r.min()), "r_max": float(r.max())}


@torch.no_grad()
def effective_alphas(model: GPT) -> dict[str, Tensor]:
    """Effective alphas of each residual by name, 1-D; empty for a GPT."""
    alphas = {}
    for name, module in model.named_modules():
        if isinstance(module, Residual):
            _, layer, attribute = name.split(".")  # blocks.0.attention_residual
            alphas[f"alpha/{attribute.removesuffix('_residual')}.{layer}"] = module.sign(module.alpha())
    return alphas


@contextlib.contextmanager
def restore_counts_on_error(model: GPT) -> Iterator[None]:
    """Restores the count of non-finite divisors r if the pass in the block fails, since it will be retried."""
    with contextlib.ExitStack() as undo:
        undo.callback(_count_restorer(model))
        yield
        undo.pop_all()


def _count_restorer(model: GPT) -> Callable[[], object]:
    """A function that sets the count of non-finite divisors back to its present value."""
    if model.normalizer is None:
        return lambda: None
    count = model.normalizer.replaced
    return functools.partial(count.copy_, count.clone())


def _outputs(model: GPT, idx: Tensor, kind: type[nn.Module]) -> list[Tensor]:
    """Outputs of the modules of type `kind` for tokens `idx`, one per call; non-finite divisors are not counted."""
    outputs: list[Tensor] = []
    with contextlib.ExitStack() as undo:
        undo.callback(_count_restorer(model))
        for module in model.modules():
            if isinstance(module, kind):
                undo.callback(module.register_forward_hook(lambda *call: outputs.append(call[-1])).remove)
        model.features_uncompiled(idx)
    return outputs


def _deviation(x: Tensor, dim: int) -> Tensor:
    return (torch.linalg.vector_norm(x.float(), dim=dim) - 1).abs().max()
