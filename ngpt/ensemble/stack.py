"""Trains K models of one graph as one program: their weights are stacked, and each model holds views of its rows.

The forward pass is the model's own code under `torch.vmap`; only the loss is reimplemented here.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.kernels.linear_cross_entropy import MIB, linear_cross_entropy
from ngpt.model.gpt import GPT

SHARED_BUFFERS = ("cos", "sin")  # RoPE tables, which are equal in all models of one graph
# Bytes of the float32 logits of all models. Above this, one model at a time is faster.
MAX_BATCHED_LOGITS = {"cpu": 8 * MIB, "cuda": 1024 * MIB}


class Stack:
    """Stacks models of one graph (see `ngpt.ensemble.train.ensemble_incompatibility`).

    `weights` and `buffers` hold a (K, ...) tensor for each name in a model; the models' own tensors become views of
    its rows. The gradients of a model are views as well; `begin` sets them to zero.
    """

    def __init__(self, models: Sequence[GPT]) -> None:
        self.models = list(models)
        first = self.models[0]
        self._template = _Features(first)
        self.weights = {name: self._stacked(name).requires_grad_() for name, _ in first.named_parameters()}
        varying = [name for name, _ in first.named_buffers() if name not in SHARED_BUFFERS]
        self.buffers = {name: self._stacked(name) for name in varying}
        self._gradients = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.grad = self._gradients[name]
        for row in range(len(self.models)):
            self._set_gradient_views(row)

    @torch.no_grad()
    def _stacked(self, name: str) -> Tensor:
        """Stacks a parameter or buffer of all models, and replaces it by a view in each of them."""
        owner, _, leaf = name.rpartition(".")
        holders = [model.get_submodule(owner) for model in self.models]
        stacked = torch.stack([getattr(holder, leaf) for holder in holders])
        for holder, row in zip(holders, stacked.unbind(), strict=True):
            if isinstance(getattr(holder, leaf), nn.Parameter):
                getattr(holder, leaf).data = row
            else:
                setattr(holder, leaf, row)
        return stacked

    def begin(self) -> None:
        """Sets all gradients to zero, and restores the models' views of them."""
        torch._foreach_zero_(list(self._gradients.values()))  # pyright: ignore[reportPrivateImportUsage]
        for row, model in enumerate(self.models):
            if next(model.parameters()).grad is None:  # dropped by a rollback or a reduced batch
                self._set_gradient_views(row)

    def _set_gradient_views(self, row: int) -> None:
        for name, parameter in self.models[row].named_parameters():
            parameter.grad = self._gradients[name][row]

    def losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Returns each model's mean cross-entropy in nats, (K,), for `idx` and `targets` (K, B, T)."""
        x = self._features(idx).flatten(1, 2)  # (K, N, D)
        cfg, targets = self.models[0].cfg, targets.flatten(1)
        head = self.weights["wte.weight" if cfg.tied else "lm_head.weight"]
        # (K, V), or (K, 1)
        scale = self.weights["s_z.stored"] * self.buffers["s_z.ratio"][:, None] if cfg.on_sphere else None
        if 4 * targets.numel() * head.shape[1] > MAX_BATCHED_LOGITS.get(x.device.type, MAX_BATCHED_LOGITS["cpu"]):
            scales = [None] * len(head) if scale is None else scale.unbind()
            each = zip(x.unbind(), head.unbind(), targets.unbind(), scales, strict=True)
            parts = [linear_cross_entropy(x, w, t, scale=s, softcap=cfg.softcap) for x, w, t, s in each]
            return torch.stack(parts)
        head = head if scale is None else head * scale[:, :, None]
        logits = torch.bmm(x, head.mT).float()  # (K, N, V)
        logits = logits if cfg.softcap is None else torch.tanh(logits / cfg.softcap) * cfg.softcap
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(1)

    def _features(self, idx: Tensor) -> Tensor:
        """Returns the inputs of the language-model heads, (K, B, T, D)."""
        with warnings.catch_warnings():  # torch has no batched CPU attention, so vmap calls it once per model
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return torch.vmap(self._template.call_with)(self.weights, self.buffers, idx)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Returns the global norm of each model's gradients, (K,)."""
        gradients = self._gradients.values()
        norms = torch.stack([torch.linalg.vector_norm(each.flatten(1), dim=1) for each in gradients])
        return torch.linalg.vector_norm(norms, dim=0)

    @torch.no_grad()
    def clip(self, norms: Sequence[float], limits: Sequence[float]) -> None:
        """Clips each model's gradients, whose global norms are given, as `torch.nn.utils.clip_grad_norm_` does."""
        for row, (norm, limit) in enumerate(zip(norms, limits, strict=True)):
            if norm > limit:  # otherwise clipping would multiply all gradients by 1
                own = [gradient[row] for gradient in self._gradients.values()]
                torch._foreach_mul_(own, limit / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]


class _Features(nn.Module):
    """A model's uncompiled `features` as a function of its weights and buffers."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor) -> Tensor:
        return self.model.features_uncompiled(idx)

    def call_with(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], idx: Tensor) -> Tensor:
        """Returns the features (B, T, D) with these `weights` and `buffers` instead of the model's own."""
        named = {f"model.{name}": tensor for name, tensor in (weights | buffers).items()}
        return torch.func.functional_call(self, named, (idx,))
