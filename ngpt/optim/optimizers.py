"""Assigns parameters to optimizers and learning rates.

`OPTIMIZERS` holds functions (model, cfg) -> torch optimizers that together cover every parameter exactly once.
`WIDTH_RULES` holds functions (kind, ratio) -> learning-rate factor for a model `ratio` times as wide as the one that
the rates were tuned for. Each parameter has one kind: `matrices` (2-D, in the blocks), `embedding` (wte), `head`
(lm_head; a tied head counts as embedding) or `scales` (1-D: alpha, s_qk, s_uv, s_z, norm gains).
"""

import itertools
from typing import Annotated, Self

import torch
from pydantic import AfterValidator, Field, Strict, model_validator
from torch import nn

from ngpt.config.base import Config, ConfigError, invalid_setting, one_of
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.residual import RESIDUAL_RULES
from ngpt.optim.batching import Group
from ngpt.optim.muon import Muon
from ngpt.optim.riemannian import GeodesicMuon, RiemannianAdamW

KINDS = ("matrices", "embedding", "head", "scales")
Rate = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def adamw(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101): `lr` for matrices, embedding and head, `lr_other` for scales."""
    return _adamw(parameter_groups(model, cfg), cfg)


def muon(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """Muon at `lr` for matrices; AdamW at `lr_other` for embedding, head and scales."""
    matrices, *rest = parameter_groups(model, cfg, muon=True)
    settings = {"momentum": cfg.momentum, "nesterov": cfg.nesterov, "ns_steps": cfg.ns_steps}
    return [Muon([matrices], weight_decay=cfg.weight_decay, **settings), *_adamw(rest, cfg)]


def geodesic_muon(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """Geodesic Muon at `lr` for matrices; at `lr_other`, Riemannian AdamW for embedding and head, AdamW for scales."""
    matrices, *rest = parameter_groups(model, cfg, muon=True)
    settings = {"momentum": cfg.momentum, "nesterov": cfg.nesterov, "ns_steps": cfg.ns_steps}
    return [GeodesicMuon(_by_dim(model, [matrices]), **settings), *_riemannian_adamw(model, rest, cfg)]


def riemannian_adamw(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """Riemannian AdamW at `lr` for matrices, embedding and head; AdamW at `lr_other` for scales."""
    return _riemannian_adamw(model, parameter_groups(model, cfg), cfg)


OPTIMIZERS = {"adamw": adamw, "muon": muon, "geodesic_muon": geodesic_muon, "riemannian_adamw": riemannian_adamw}
ON_SPHERE = ("geodesic_muon", "riemannian_adamw")  # these rotate unit vectors, so they need a model on the sphere


def none(kind: str, ratio: float) -> float:
    """Keeps the rates."""
    return 1.0


def nanochat(kind: str, ratio: float) -> float:
    """Multiplies the rates of all parameters but scales by 1 / sqrt(width ratio). base_width is 768 in the source.

    Source: karpathy/nanochat, gpt.py, setup_optimizer, which always trains the matrices with Muon; under AdamW they get
    the same factor here.
    """
    return 1.0 if kind == "scales" else ratio**-0.5


def mup(kind: str, ratio: float) -> float:
    """muP for Adam (Tensor Programs V, arXiv 2203.03466, table 3): 1 / ratio for matrices and head, 1 for the rest.

    Fan-in grows with the width for matrices and head only. Table 8 and the package `mup` divide the head's output
    instead of its rate. This rule changes learning rates only, not initial variances or the softmax scale. A tied
    head gets the embedding's factor, as in table 8.
    """
    return 1 / ratio if kind in ("matrices", "head") else 1.0


def nugpt(kind: str, ratio: float) -> float:
    """nuGPT for nGPT under Adam (arXiv 2604.27077): ratio^(-1/2) for the embedding, ratio^(-3/4) for matrices, head."""
    return {"embedding": ratio**-0.5, "matrices": ratio**-0.75, "head": ratio**-0.75, "scales": 1.0}[kind]


WIDTH_RULES = {"none": none, "nanochat": nanochat, "mup": mup, "nugpt": nugpt}


def _above_zero(norm: float) -> float:
    """Refuses 0, by which nanoGPT and others mean that gradients are not clipped."""
    if norm <= 0:
        raise invalid_setting(f"must be greater than 0, got {norm:g}; write null to switch clipping off")
    return norm


class OptimConfig(Config):
    """Optimizer settings, with the peak learning rate of each kind of parameter."""

    name: Annotated[str, one_of(OPTIMIZERS, "optimizer")] = "adamw"
    """The optimizer; `muon` and `geodesic_muon` train the matrices of the blocks, and AdamW the rest."""
    lr: Rate = 1e-3
    """Peak learning rate; AdamW: of matrices, embedding and head; Muons: of the matrices in the blocks."""
    lr_other: Rate | None = None
    """Peak learning rate of all other parameters; null: `lr`."""
    lr_embedding: Rate | None = None
    """Peak learning rate of the embedding; null: `lr` or `lr_other`, depending on the optimizer."""
    lr_head: Rate | None = None
    """Peak learning rate of the head, unless it is tied; null: `lr` or `lr_other`."""
    lr_scales: Rate | None = None
    """Peak learning rate of the 1-D scales; null: `lr` or `lr_other`."""
    width_rule: Annotated[str, one_of(WIDTH_RULES, "width rule")] = "none"
    """Rule that carries the rates of Adam, not of Muon, over from `base_width` to `n_embd`."""
    base_width: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """The `n_embd` for which the rates were tuned."""
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.9, 0.95)
    """Decays of AdamW's two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Epsilon in the denominator of AdamW."""
    weight_decay: Rate = 0.0
    """Decoupled weight decay of matrices, embedding and head; `adamw` and `muon` only."""
    grad_clip: Annotated[float, AfterValidator(_above_zero)] | None = 1.0
    """Largest global norm of the gradient; null: gradients are not clipped."""
    momentum: Decay = 0.95
    """Momentum of the Muons."""
    nesterov: bool = True
    """Whether the momentum of the Muons is Nesterov's."""
    ns_steps: Annotated[int, Field(ge=1, le=1000)] = 5
    """Newton-Schulz iterations of the Muons."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width_rule != "none" and self.base_width is None:
            text = f"width_rule {self.width_rule} needs base_width, the n_embd for which the learning rates were tuned"
            raise invalid_setting(text, "width_rule")
        return self


def incompatibility(cfg: OptimConfig, model: ModelConfig) -> str | None:
    """Returns why the optimizer cannot train this model, or None if it can."""
    if model.on_sphere or cfg.name not in ON_SPHERE:
        return None
    rules, optimizers = sorted(RESIDUAL_RULES.keys() - {"add"}), sorted(OPTIMIZERS.keys() - ON_SPHERE)
    reason = f"rotates unit vectors, but a model with residual rule {model.residual} has no weights on the sphere"
    advice = f"choose another residual rule ({', '.join(rules)}) or another optimizer ({', '.join(optimizers)})"
    return f"optimizer {cfg.name} {reason}: {advice}"


def build_optimizers(model: GPT, cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    """Builds the configured torch optimizers for `model`; the first group of the first one holds matrices.

    Each parameter group has a `kind`, one of `KINDS`, and a `base_lr`, which `set_learning_rates` multiplies. Raises
    ConfigError if the optimizer cannot train this model.
    """
    if reason := incompatibility(cfg, model.cfg):
        raise ConfigError(reason)
    optimizers = OPTIMIZERS[cfg.name](model, cfg)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    optimized = sorted(id(parameter) for group in groups for parameter in group["params"])
    if optimized != sorted(map(id, model.parameters())):
        raise ConfigError(f"optimizer {cfg.name} must optimize every parameter of the model exactly once")
    if any(group.get("kind") not in KINDS for group in groups):
        raise ConfigError(f"optimizer {cfg.name}: every parameter group has a `kind`, one of {', '.join(KINDS)}")
    for group in groups:
        group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], multiplier: float) -> None:
    """Sets every group's learning rate to its base rate times the schedule's `multiplier`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier


def parameters_by_kind(model: GPT) -> dict[str, list[nn.Parameter]]:
    """Returns the parameters of each kind, in the order of `KINDS`; some lists may be empty."""
    parameters: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    ends = {id(model.head_weight): "head", id(model.wte.weight): "embedding"}
    for name, parameter in model.named_parameters():
        kind = ends.get(id(parameter), "scales" if parameter.ndim == 1 else "matrices")
        is_matrix = parameter.ndim == 2 and name.startswith("blocks.")
        assert kind != "matrices" or is_matrix, f"{name} belongs to none of the kinds {KINDS}"
        parameters[kind].append(parameter)
    return parameters


def parameter_groups(model: GPT, cfg: OptimConfig, *, muon: bool = False) -> list[Group]:
    """Returns one parameter group per non-empty kind. With `muon`, only the matrices use `lr`, without width rule."""
    other = cfg.lr if cfg.lr_other is None else cfg.lr_other
    default = {"matrices": cfg.lr, "embedding": other if muon else cfg.lr, "head": other if muon else cfg.lr}
    own = {"embedding": cfg.lr_embedding, "head": cfg.lr_head, "scales": cfg.lr_scales}
    rates = default | {"scales": other} | {kind: rate for kind, rate in own.items() if rate is not None}
    ratio = model.cfg.n_embd / (cfg.base_width or model.cfg.n_embd)
    for kind in KINDS[1:] if muon else KINDS:
        rates[kind] *= WIDTH_RULES[cfg.width_rule](kind, ratio)
    kinds = parameters_by_kind(model).items()
    return [{"params": members, "kind": kind, "lr": rates[kind]} for kind, members in kinds if members]


def _by_dim(model: GPT, groups: list[Group]) -> list[Group]:
    """Splits each group by the dimension along which its weights have unit length."""
    dims = {id(weight): dim for weight, dim in model.sphere_weights()}
    split = []
    for group, dim in itertools.product(groups, (1, 0)):
        if members := [p for p in group["params"] if dims[id(p)] == dim]:
            split.append(group | {"params": members, "dim": dim})
    return split


def _adamw(groups: list[Group], cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    decayed = [group | {"weight_decay": 0.0 if group["kind"] == "scales" else cfg.weight_decay} for group in groups]
    return [torch.optim.AdamW(decayed, betas=cfg.betas, eps=cfg.eps, fused=True)] if decayed else []


def _riemannian_adamw(model: GPT, groups: list[Group], cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    sphere = _by_dim(model, [group for group in groups if group["kind"] != "scales"])
    scales = [group for group in groups if group["kind"] == "scales"]
    return [RiemannianAdamW(sphere, betas=cfg.betas, eps=cfg.eps), *_adamw(scales, cfg)]
