"""Optimizers: who updates which parameter with which learning rate.

An entry of `OPTIMIZERS` is a builder (model, cfg) -> list of torch optimizers that together hold every parameter once.
"""

from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from pydantic import Field, Strict
from torch import nn

from ngpt.config import Config, one_of
from ngpt.model import GPT
from ngpt.muon import Muon

Rate = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def adamw(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """AdamW for all (arXiv 1711.05101): `lr` for matrices and embeddings, `lr_other` for the 1-D scales."""
    matrices, scales = _split(model.parameters(), lambda p: p.ndim >= 2)
    return [_adamw([(matrices, cfg.lr), (scales, cfg.other)], cfg)]


def muon(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """Muon at `lr` for the blocks' matrices; AdamW at `lr_other` for embeddings, head and scales."""
    hidden, scales = _split(model.blocks.parameters(), lambda p: p.ndim == 2)
    inside = {id(parameter) for parameter in model.blocks.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    matrices = Muon(
        hidden,
        lr=cfg.lr,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        ns_steps=cfg.ns_steps,
        weight_decay=cfg.weight_decay,
    )
    return [matrices, _adamw([(outside + scales, cfg.other)], cfg)]


OPTIMIZERS: dict[str, Callable[[GPT, "OptimConfig"], list[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "muon": muon,
}


class OptimConfig(Config):
    name: Annotated[str, one_of(OPTIMIZERS, "optimizer")] = "adamw"
    lr: Rate = 1e-3  # of what the optimizer is named for: see its function
    lr_other: Rate | None = None  # of the rest; null: the same as lr
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Rate = 0.0  # decoupled, on matrices and embeddings only
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0  # largest global gradient norm
    momentum: Decay = 0.95  # muon
    nesterov: bool = True  # muon
    ns_steps: Annotated[int, Field(ge=1)] = 5  # muon: Newton-Schulz iterations

    @property
    def other(self) -> float:
        return self.lr if self.lr_other is None else self.lr_other


def build_optimizers(model: GPT, cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    """The named optimizer for `model`; each group remembers its `base_lr`, which `set_rates` multiplies."""
    optimizers = OPTIMIZERS[cfg.name](model, cfg)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters())), f"{cfg.name} must hold every parameter exactly once"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], multiplier: float) -> None:
    """Sets every group's learning rate to its base rate times the schedule's `multiplier`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier


def _adamw(rates: list[tuple[list[nn.Parameter], float]], cfg: OptimConfig) -> torch.optim.AdamW:
    groups = []
    for parameters, lr in rates:
        decayed, plain = _split(parameters, lambda p: p.ndim >= 2)
        for members, decay in ((decayed, cfg.weight_decay), (plain, 0.0)):
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=cfg.betas, eps=cfg.eps, fused=True)


def _split(
    parameters: Iterable[nn.Parameter], wanted: Callable[[nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    chosen, rest = [], []
    for parameter in parameters:
        (chosen if wanted(parameter) else rest).append(parameter)
    return chosen, rest
