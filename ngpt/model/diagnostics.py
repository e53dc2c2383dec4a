"""Diagnostics of a model in training: deviation from the sphere, residual step sizes alpha and divisors r."""

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
    """Largest deviation from unit length of any vector in the sphere weights; 0 for a GPT."""
    errors = [_deviation(weight, dim) for weight, dim in model.sphere_weights()]
    return float(torch.stack(errors).max()) if errors else 0.0


@torch.no_grad()
def activation_norm_error(model: GPT, idx: Tensor) -> float:
    """Largest deviation from unit length of the stream for tokens `idx` (B, T), before and after each sublayer.

    0 for a GPT. In training mode, the stochastic norms drawn for the current step apply.
    """
    if not model.cfg.on_sphere:
        return 0.0
    return float(torch.stack([_deviation(x, -1) for x in (model.wte(idx), *_outputs(model, idx, Residual))]).max())


@torch.no_grad()
def divisors(model: GPT, idx: Tensor) -> dict[str, Tensor]:
    """Returns the divisor r (B, T) after each sublayer, by name, for tokens `idx` (B, T).

    Empty for norm_mode `baseline`, which has no divisor.
    """
    if model.normalizer is None:
        return {}
    names = (f"r/{sublayer}.{layer}" for layer in range(len(model.blocks)) for sublayer in ("attention", "mlp"))
    return dict(zip(names, _outputs(model, idx, DotProdNormalizer), strict=True))


def divisor_statistics(divisors: dict[str, Tensor]) -> dict[str, float]:
    """Returns `r_mean`, `r_min` and `r_max` over all tokens and sublayers; empty if there are no divisors."""
    if not divisors:
        return {}
    r = torch.stack(list(divisors.values()))
    return {"r_mean": float(r.mean()), "r_min": float(r.min()), "r_max": float(r.max())}


@torch.no_grad()
def effective_alphas(model: GPT) -> dict[str, Tensor]:
    """Returns the effective alphas (1-D) of each residual, by name; empty for a GPT."""
    alphas = {}
    for name, module in model.named_modules():
        if isinstance(module, Residual):
            _, layer, attribute = name.split(".")  # blocks.0.attention_residual
            alphas[f"alpha/{attribute.removesuffix('_residual')}.{layer}"] = module.sign(module.alpha())
    return alphas


@contextlib.contextmanager
def restore_counts_on_error(model: GPT) -> Iterator[None]:
    """Restores the count of non-finite divisors if the with block raises, so that a retry does not count them twice."""
    with contextlib.ExitStack() as undo:
        undo.callback(_count_restorer(model))
        yield
        undo.pop_all()


@contextlib.contextmanager
def restore_counts(model: GPT) -> Iterator[None]:
    """Restores the count of non-finite divisors at the end, since passes that only look at the model do not count."""
    with contextlib.ExitStack() as undo:
        undo.callback(_count_restorer(model))
        yield


def _count_restorer(model: GPT) -> Callable[[], object]:
    """Returns a function that resets the count of non-finite divisors to its current value."""
    if model.normalizer is None:
        return lambda: None
    count = model.normalizer.replaced
    return functools.partial(count.copy_, count.clone())


def _outputs(model: GPT, idx: Tensor, kind: type[nn.Module]) -> list[Tensor]:
    """Returns the outputs of all modules of type `kind` for `idx`, without counting non-finite divisors."""
    outputs: list[Tensor] = []
    with restore_counts(model), contextlib.ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, kind):
                undo.callback(module.register_forward_hook(lambda *call: outputs.append(call[-1])).remove)
        model.features_uncompiled(idx)
    return outputs


def _deviation(x: Tensor, dim: int) -> Tensor:
    return (torch.linalg.vector_norm(x.float(), dim=dim) - 1).abs().max()
