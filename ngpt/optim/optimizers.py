"""Optimizers: which one updates which parameter, at which learning rate.

`OPTIMIZERS` holds functions (model, cfg) -> torch optimizers that together hold every parameter once, `WIDTH_RULES`
functions (kind, ratio) -> factor that transfer learning rates from another width. Each parameter has one kind:
`matrices` (2-D, in the blocks), `embedding` (wte), `head` (lm_head; a tied one is the embedding) or `scales` (1-D:
alpha, s_qk, s_uv, s_z, gains of norms).
"""

import itertools
from typing import Annotated, Self

import torch
from pydantic import Field, Strict, model_validator
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
    """AdamW for everything (arXiv 1711.05101): `lr` for matrices, embedding and head, `lr_other` for the scales."""
    return _adamw(_groups(model, cfg), cfg)


def muon(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """Muon at `lr` for the matrices of the blocks; AdamW at `lr_other` for embedding, head and scales."""
    matrices, *rest = _groups(model, cfg, muon=True)
    settings = {"momentum": cfg.momentum, "nesterov": cfg.nesterov, "ns_steps": cfg.ns_steps}
    return [Muon([matrices], weight_decay=cfg.weight_decay, **settings), *_adamw(rest, cfg)]


def geodesic_muon(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """Geodesic Muon at `lr` for the matrices of the blocks; at `lr_other` Riemannian AdamW for embedding and head, and
    AdamW for the scales. No weight decay, which has no effect on the sphere."""
    matrices, *rest = _groups(model, cfg, muon=True)
    settings = {"momentum": cfg.momentum, "nesterov": cfg.nesterov, "ns_steps": cfg.ns_steps}
    return [GeodesicMuon(_by_dim(model, [matrices]), **settings), *_riemannian_adamw(model, rest, cfg)]


def riemannian_adamw(model: GPT, cfg: "OptimConfig") -> list[torch.optim.Optimizer]:
    """Riemannian AdamW at `lr` for matrices, embedding and head; AdamW at `lr_other` for the scales. No weight
    decay, which has no effect on the sphere."""
    return _riemannian_adamw(model, _groups(model, cfg), cfg)


OPTIMIZERS = {"adamw": adamw, "muon": muon, "geodesic_muon": geodesic_muon, "riemannian_adamw": riemannian_adamw}
ON_SPHERE = ("geodesic_muon", "riemannian_adamw")  # these rotate unit vectors, so the model must have some


def none(kind: str, ratio: float) -> float:
    """Unchanged rates."""
    return 1.0


def nanochat(kind: str, ratio: float) -> float:
    """1 / sqrt(ratio) for all but scales (karpathy/nanochat, gpt.py, setup_optimizer, where base_width is 768).
    nanochat always trains the matrices with Muon; under AdamW they are scaled like the rest."""
    return 1.0 if kind == "scales" else ratio**-0.5


def mup(kind: str, ratio: float) -> float:
    """muP for Adam, the learning rates of Tensor Programs V (arXiv 2203.03466), table 3: 1 / ratio for matrices and
    head, whose fan-in grows with the width, 1 for embedding and scales.

    Table 8 and the package `mup` divide the head's output by the width instead of its rate. Initial variances and
    softmax scale are not part of a rule for rates. A tied head gets the embedding's factor, as in table 8 only.
    """
    return 1 / ratio if kind in ("matrices", "head") else 1.0


def nugpt(kind: str, ratio: float) -> float:
    """nuGPT (arXiv 2604.27077), for nGPT under Adam: ratio^(-1/2) for the embedding, ratio^(-3/4) for matrices and
    head. Scales keep their rate; how they are stored is up to the model."""
    return {"embedding": ratio**-0.5, "matrices": ratio**-0.75, "head": ratio**-0.75, "scales": 1.0}[kind]


WIDTH_RULES = {"none": none, "nanochat": nanochat, "mup": mup, "nugpt": nugpt}


class OptimConfig(Config):
    """The optimizer, with the peak learning rate of each kind of parameter."""

    name: Annotated[str, one_of(OPTIMIZERS, "optimizer")] = "adamw"
    lr: Rate = 1e-3  # of the parameters that the optimizer is named for, see its function
    lr_other: Rate | None = None  # of the rest; null: the same as lr
    lr_embedding: Rate | None = None  # of the embedding; null: lr or lr_other, depending on the optimizer
    lr_head: Rate | None = None  # of the head, likewise; not used when it is tied to the embedding
    lr_scales: Rate | None = None  # of the scales, likewise
    width_rule: Annotated[str, one_of(WIDTH_RULES, "width rule")] = "none"  # of Adam's rates; Muon's stay as given
    base_width: Annotated[int, Field(ge=1)] | None = None  # n_embd for which the rates above were tuned
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Rate = 0.0  # decoupled, of adamw and muon, on matrices, embedding and head only
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0  # largest global gradient norm
    momentum: Decay = 0.95  # muon and geodesic_muon
    nesterov: bool = True  # muon and geodesic_muon
    ns_steps: Annotated[int, Field(ge=1)] = 5  # muon and geodesic_muon: Newton-Schulz iterations

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width_rule != "none" and self.base_width is None:
            text = f"width_rule {self.width_rule} needs base_width, the n_embd for which the learning rates were tuned"
            raise invalid_setting(text, "width_rule")
        return self


def incompatibility(cfg: OptimConfig, model: ModelConfig) -> str | None:
    """Why the optimizer cannot train this kind of model; None if it can."""
    if model.on_sphere or cfg.name not in ON_SPHERE:
        return None
    rules, optimizers = sorted(RESIDUAL_RULES.keys() - {"add"}), sorted(OPTIMIZERS.keys() - ON_SPHERE)
    reason = f"rotates weights on the sphere, and a model with residual rule {model.residual} has none"
    advice = f"choose another residual rule ({', '.join(rules)}) or another optimizer ({', '.join(optimizers)})"
    return f"optimizer {cfg.name} {reason}: {advice}"


def build_optimizers(model: GPT, cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    """The configured optimizer for `model`. Each torch group has a `kind` of `KINDS` and a `base_lr`, which
    `set_learning_rates` multiplies; the first group holds matrices. Raises a ConfigError if they are incompatible.
    """
    if reason := incompatibility(cfg, model.cfg):
        raise ConfigError(reason)
    optimizers = OPTIMIZERS[cfg.name](model, cfg)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters())), f"{cfg.name} must hold every parameter exactly once"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], multiplier: float) -> None:
    """Sets every group's learning rate to its base rate times the schedule's `multiplier`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier


def parameters_by_kind(model: GPT) -> dict[str, list[nn.Parameter]]:
    """The parameters of each kind, in the order of `KINDS`; a kind may be empty."""
    parameters: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    outer = {id(model.head_weight): "head", id(model.wte.weight): "embedding"}
    for name, parameter in model.named_parameters():
        kind = outer.get(id(parameter), "scales" if parameter.ndim == 1 else "matrices")
        is_matrix = parameter.ndim == 2 and name.startswith("blocks.")
        assert kind != "matrices" or is_matrix, f"{name} is of none of the kinds {KINDS}"
        parameters[kind].append(parameter)
    return parameters


def _groups(model: GPT, cfg: OptimConfig, *, muon: bool = False) -> list[Group]:
    """One torch group per kind that has parameters. Under Muon, `lr` is that of the matrices, without a width rule."""
    other = cfg.lr if cfg.lr_other is None else cfg.lr_other
    usual = {"matrices": cfg.lr, "embedding": other if muon else cfg.lr, "head": other if muon else cfg.lr}
    own = {"embedding": cfg.lr_embedding, "head": cfg.lr_head, "scales": cfg.lr_scales}
    rates = usual | {"scales": other} | {kind: rate for kind, rate in own.items() if rate is not None}
    ratio = model.cfg.n_embd / (cfg.base_width or model.cfg.n_embd)
    for kind in KINDS[1:] if muon else KINDS:
        rates[kind] *= WIDTH_RULES[cfg.width_rule](kind, ratio)
    kinds = parameters_by_kind(model).items()
    return [{"params": members, "kind": kind, "lr": rates[kind]} for kind, members in kinds if members]


def _by_dim(model: GPT, groups: list[Group]) -> list[Group]:
    """The groups, split by the dimension along which their weights have length 1."""
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
