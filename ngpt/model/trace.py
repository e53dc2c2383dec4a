"""Records the stages of a forward pass, and of its gradients, while the real model runs.

Hooks see them: module hooks, the `rotate` attribute of attention, and a `TorchFunctionMode` for functions that are not
modules (attention scores, activations).
"""

import functools
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ngpt.model.gpt import GPT, PreNormBlock, SphereBlock
from ngpt.model.layers import MLP, Attention
from ngpt.model.residual import Residual

SPHERE_TOLERANCE = 1e-3  # relative deviation of lengths that count as on a sphere


@dataclass(frozen=True)
class Stage:
    """The result of one stage of a pass.

    `length` is the Euclidean length of the last dimension's vectors (mean, smallest, largest). `sphere` is the radius
    of the sphere that they all lie on: `1`, `sqrt` (root of their dimension, the result of an RMSNorm), or `-` for
    none. `ms` is the time since the previous stage. `facts` are numbers of this stage only, see `Recorder`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    length: tuple[float, float, float]
    sphere: str
    ms: float
    facts: dict[str, float] = field(default_factory=dict)


class Recorder:
    """Collects the stages of one pass. Its own work does not count in their times.

    Facts: `alpha` (mean); `degrees` that the stream turned and divisor `r` (mean, min, max each); of the attention
    scores a query may use, `sd`, `peak` (largest size), `reads` (effective number of keys: the exponential of the
    entropy, mean) and `sees` (number of visible keys); `zeros`, the share of hidden units that are exactly 0; `sd` and
    `peak` of the input of an activation, and of logits.
    """

    def __init__(self, device: torch.device, *, backward: bool = False) -> None:
        self.stages: list[Stage] = []
        self.gradients: list[Stage] = []
        self.where = ""  # prefix of the current block: `0.`
        self.stream = torch.empty(0)  # the last residual stream that was recorded
        self._device, self._backward = device, backward
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Starts the clock of the next stage."""
        _synchronize(self._device)
        self._since = time.perf_counter()

    def see(self, name: str, x: Tensor, facts: dict[str, float] | None = None, *, of: Tensor | None = None) -> None:
        """Adds a stage with result `x`. If `x` is a view made for display, `of` is the tensor that the pass uses."""
        _synchronize(self._device)
        name, used = self.where + name, x if of is None else of
        self.stages.append(_stage(name, x, time.perf_counter() - self._since, facts or {}))
        if self._backward and used.requires_grad:
            used.register_hook(functools.partial(self._see_gradient, name))
        self.resume()

    def see_step(self, name: str, before: Tensor, after: Tensor, facts: dict[str, float] | None = None) -> None:
        """Adds the residual stream after a sublayer, with the angle between before and after."""
        with torch.no_grad():
            turned = angles(before, after)
        self.see(name, after, (facts or {}) | _spread("degrees", turned))
        self.stream = after

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        _synchronize(self._device)
        self.gradients.append(_stage(name, gradient, time.perf_counter() - self._since, {}))
        self.resume()


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between the vectors of `a` and `b` (..., D), float64, from the chord, which is exact for small angles."""
    a, b = F.normalize(a.detach().cpu().double(), dim=-1), F.normalize(b.detach().cpu().double(), dim=-1)
    return torch.rad2deg(2 * torch.asin(((a - b).norm(dim=-1) / 2).clamp(max=1)))


def score_facts(q: Tensor, k: Tensor, scale: float) -> dict[str, float]:
    """Facts of causal attention scores scale * <q, k>, for q (B, H, T, K) and k (B, G, T, K), H a multiple of G."""
    time = q.shape[2]
    seen = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
    parts = []
    for queries, keys in zip(q.float(), k.float(), strict=True):  # one sequence at a time: scores (H, T, T) are large
        scores = scale * queries @ keys.repeat_interleave(len(queries) // len(keys), 0).mT
        log_weights = scores.masked_fill(~seen, -math.inf).log_softmax(-1).masked_fill(~seen, 0)
        reads = -(log_weights.exp() * seen * log_weights).sum(-1)
        visible = scores[:, seen]
        parts.append([visible.mean(), visible.square().mean(), visible.abs().max(), reads.exp().mean()])
    mean, square, peak, reads = torch.tensor(parts).unbind(1)
    sd = (square.mean() - mean.mean().square()).clamp(min=0).sqrt()
    return {"sd": float(sd), "peak": float(peak.max()), "reads": float(reads.mean()), "sees": (time + 1) / 2}


def _spread(name: str, values: Tensor) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_min": float(values.min()), f"{name}_max": float(values.max())}


def _stage(name: str, x: Tensor, seconds: float, facts: dict[str, float]) -> Stage:
    shown = x.detach().float()
    lengths = shown.norm(dim=-1) if shown.ndim else shown.abs()
    low, high = float(lengths.min()), float(lengths.max())
    radii = {"1": 1.0, "sqrt": math.sqrt(shown.shape[-1])} if shown.ndim else {}
    sphere = [
        radius for radius, size in radii.items() if max(abs(low - size), abs(high - size)) < SPHERE_TOLERANCE * size
    ]
    dtype = str(x.dtype).removeprefix("torch.")
    length = (float(lengths.mean()), low, high)
    return Stage(name, tuple(x.shape), dtype, length, sphere[0] if sphere else "-", seconds * 1000, facts)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- hooks -----------------------------------------------------------------------------------------------------------


@contextmanager
def record_stages(model: GPT, recorder: Recorder) -> Iterator[None]:
    """Passes each stage of the forward passes in the block to the recorder; removes its hooks afterwards."""
    with ExitStack() as undo:

        def after(module: nn.Module, show: Any) -> None:
            undo.callback(module.register_forward_hook(show).remove)

        def before(module: nn.Module, show: Any) -> None:
            undo.callback(module.register_forward_pre_hook(show).remove)

        undo.callback(setattr, recorder, "where", "")
        after(model.wte, functools.partial(_show_embedding, recorder))
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, SphereBlock | PreNormBlock)
            before(block, functools.partial(_enter_block, recorder, layer))
            after(block, functools.partial(_leave_block, recorder))
            _watch_attention(block.attention, recorder, after, before, undo)
            _watch_mlp(block.mlp, recorder, after, before)
            for name in ("attention", "mlp"):
                if isinstance(block, SphereBlock):
                    after(getattr(block, f"{name}_residual"), functools.partial(_show_residual, recorder, name))
                else:
                    after(getattr(block, f"{name}_norm"), functools.partial(_show, recorder, f"{name}.reads"))
            if isinstance(block, PreNormBlock):
                before(block.mlp_norm, functools.partial(_show_sum, recorder, "attention"))
        if model.normalizer is not None:
            sublayers = itertools.cycle(("attention", "mlp"))
            after(model.normalizer, functools.partial(_show_divisor, recorder, sublayers))
        if model.final_norm is not None:
            after(model.final_norm, functools.partial(_show_features, recorder))
        undo.enter_context(_Functions(recorder))
        recorder.resume()
        yield


def _watch_attention(attention: Attention, recorder: Recorder, after: Any, before: Any, undo: ExitStack) -> None:
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        split = functools.partial(_show_heads, recorder, f"attention.{letter}", attention.query.in_features)
        after(getattr(attention, name), functools.partial(split, attention.n_head))
    turning, names = attention.rotate, itertools.cycle("qk")

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = turning(x, cos, sin)
        recorder.see(f"attention.{next(names)} rotated", turned)
        return turned

    attention.rotate = rotate
    undo.callback(setattr, attention, "rotate", turning)
    before(attention.out, functools.partial(_show_input, recorder, "attention.mixed"))
    after(attention, functools.partial(_show, recorder, "attention.answer"))


def _watch_mlp(mlp: MLP, recorder: Recorder, after: Any, before: Any) -> None:
    after(mlp.up, functools.partial(_show, recorder, "mlp.up"))
    before(mlp.down, functools.partial(_show_input, recorder, "mlp.hidden"))
    after(mlp, functools.partial(_show, recorder, "mlp.answer"))


class _Functions(TorchFunctionMode):
    """Records calls of functions that are not modules."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            with torch.no_grad():
                facts = score_facts(q, k, kwargs["scale"])
            self._recorder.see("attention.q used", q)
            self._recorder.see("attention.k used", k, facts)
        elif func in (F.silu, F.relu):
            entering = args[0].detach()
            facts = {"sd": float(entering.std()), "peak": float(entering.abs().max())}
            self._recorder.see(f"mlp.into {func.__name__}", args[0], facts)
        output = func(*args, **kwargs)
        if func is F.linear and not isinstance(args[1], nn.Parameter) and self._recorder.where:  # scaled by s_uv
            self._recorder.see("mlp.up", output)
        return output


def _show(recorder: Recorder, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    recorder.see(name, output)


def _show_input(recorder: Recorder, name: str, module: nn.Module, args: Any) -> None:
    zeros = {"zeros": float((args[0] == 0).float().mean())} if name == "mlp.hidden" else {}
    recorder.see(name, args[0], zeros)


def _show_heads(recorder: Recorder, name: str, width: int, n_head: int, module: Any, args: Any, output: Tensor) -> None:
    recorder.see(name, output.unflatten(-1, (-1, width // n_head)), of=output)


def _show_embedding(recorder: Recorder, module: nn.Module, args: Any, output: Tensor) -> None:
    recorder.see("embedding", output)
    recorder.stream = output


def _show_features(recorder: Recorder, module: nn.Module, args: Any, output: Tensor) -> None:
    recorder.see("final norm", output)
    recorder.stream = output


def _enter_block(recorder: Recorder, layer: int, module: nn.Module, args: Any) -> None:
    if args[0] is not recorder.stream:  # a GPT normalizes the embedding
        recorder.see("embedding normalised", args[0])
        recorder.stream = args[0]
    recorder.where = f"{layer}."


def _leave_block(recorder: Recorder, block: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
    if isinstance(block, PreNormBlock):
        recorder.see_step("mlp.stream", recorder.stream, output[0])
    recorder.where = ""


def _show_sum(recorder: Recorder, name: str, module: nn.Module, args: Any) -> None:
    recorder.see_step(f"{name}.stream", recorder.stream, args[0])


def _show_residual(recorder: Recorder, name: str, residual: Residual, args: Any, output: Tensor) -> None:
    alpha = float(residual.sign(residual.alpha()).detach().mean())
    recorder.see_step(f"{name}.stream", args[0], output, {"alpha": alpha})


def _show_divisor(recorder: Recorder, names: Iterator[str], module: nn.Module, args: Any, output: Tensor) -> None:
    recorder.see(f"{next(names)}.r", output.unsqueeze(-1), _spread("r", output.detach()))
