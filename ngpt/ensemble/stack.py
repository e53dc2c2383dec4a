"""K models of one graph as one program: every weight is a row of a stacked tensor, and each model a view of its rows.

The forward pass is the model's own code under `torch.vmap` (PyTorch's "model ensembling"), so that there is no second
formulation of it to keep up with; only the loss is written out here. Since the models keep living on their views, all
that works on one model, from its optimizer to its checkpoints, works on them as before.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.kernels.linear_cross_entropy import MIB, linear_cross_entropy
from ngpt.model.gpt import GPT

ALIKE = ("cos", "sin")  # buffers that the graph decides, the same for all models
# Logits of all models, in float32, up to which they are made at once; beyond it one model's at a time is faster.
AT_ONCE = {"cpu": 8 * MIB, "cuda": 1024 * MIB}


class Stack:
    """The models, all of one graph (see `ngpt.ensemble.train.ensemble_incompatibility`), which from now on share memory by name.

    `weights` and `buffers` hold (K, ...) by the name that each model has for its row. Gradients are added to rows, too:
    `begin` sets them to zero.
    """

    def __init__(self, models: Sequence[GPT]) -> None:
        self.models = list(models)
        first = self.models[0]
        self._template = _Features(first)
        self.weights = {name: self._stacked(name).requires_grad_() for name, _ in first.named_parameters()}
        varying = [name for name, _ in first.named_buffers() if name not in ALIKE]
        self.buffers = {name: self._stacked(name) for name in varying}
        self._gradients = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.grad = self._gradients[name]
        for row in range(len(self.models)):
            self._hand_out_gradients(row)

    @torch.no_grad()
    def _stacked(self, name: str) -> Tensor:
        """One tensor of all models' parameters or buffers of that name, which become views of it."""
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
        """Sets all gradients to zero; those of the models' parameters are views of them from here on."""
        torch._foreach_zero_(list(self._gradients.values()))  # pyright: ignore[reportPrivateImportUsage]
        for row, model in enumerate(self.models):
            if next(model.parameters()).grad is None:  # a run that has gone back, or given way, has dropped them
                self._hand_out_gradients(row)

    def _hand_out_gradients(self, row: int) -> None:
        for name, parameter in self.models[row].named_parameters():
            parameter.grad = self._gradients[name][row]

    def losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Each model's mean cross-entropy in nats, (K,), of its own `idx` and `targets`, (K, B, T)."""
        x = self._features(idx).flatten(1, 2)  # (K, N, D)
        cfg, targets = self.models[0].cfg, targets.flatten(1)
        head = self.weights["wte.weight" if cfg.tied else "lm_head.weight"]
        scale = None
        if cfg.on_sphere:
            scale = self.weights["s_z.stored"] * self.buffers["s_z.ratio"][:, None]  # (K, V), or (K, 1)
        if 4 * targets.numel() * head.shape[1] > AT_ONCE.get(x.device.type, AT_ONCE["cpu"]):
            scales = [None] * len(head) if scale is None else scale.unbind()
            each = zip(x.unbind(), head.unbind(), targets.unbind(), scales, strict=True)
            parts = [linear_cross_entropy(x, w, t, scale=s, softcap=cfg.softcap) for x, w, t, s in each]
            return torch.stack(parts)
        head = head if scale is None else head * scale[:, :, None]
        logits = torch.bmm(x, head.mT).float()  # (K, N, V)
        logits = logits if cfg.softcap is None else torch.tanh(logits / cfg.softcap) * cfg.softcap
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(1)

    def _features(self, idx: Tensor) -> Tensor:
        """What the heads read, (K, B, T, D)."""
        with _known_fallback():
            return torch.vmap(self._template.of)(self.weights, self.buffers, idx)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The global norm of each model's gradients, (K,)."""
        gradients = self._gradients.values()
        norms = torch.stack([torch.linalg.vector_norm(each.flatten(1), dim=1) for each in gradients])
        return torch.linalg.vector_norm(norms, dim=0)

    @torch.no_grad()
    def clip(self, norms: Sequence[float], largest: Sequence[float]) -> None:
        """Scales each model's gradients, of global norm `norms`, down to its largest one, as
        `torch.nn.utils.clip_grad_norm_` does for one."""
        for row, (norm, most) in enumerate(zip(norms, largest, strict=True)):
            if norm > most:  # seldom: else a pass over all gradients would multiply them by 1
                own = [gradient[row] for gradient in self._gradients.values()]
                torch._foreach_mul_(own, most / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]


class _Features(nn.Module):
    """A model's `features`, also of one that was compiled, as a function of its weights and buffers."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor) -> Tensor:
        return self.model.features_uncompiled(idx)

    def of(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], idx: Tensor) -> Tensor:
        """(B, T, D) of the model with these `weights` and `buffers` in place of its own."""
        named = {f"model.{name}": tensor for name, tensor in (weights | buffers).items()}
        return torch.func.functional_call(self, named, (idx,))


@contextlib.contextmanager
def _known_fallback() -> Iterator[None]:
    """torch has no batched form of its CPU attention; vmap calls it once per model and warns each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield
