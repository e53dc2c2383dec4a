"""Records the stages of a forward pass, and of its gradients, while the real model runs.

Hooks see them: module hooks, the `rotate` attribute of attention, and a `TorchFunctionMode` for functions that are not
modules (attention scores, activations).
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ngpt.model.gpt import GPT, PreNormBlock, SphereBlock
from ngpt.model.layers import Attention
from ngpt.model.residual import Residual

Facts = dict[str, float]
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
    facts: Facts = field(default_factory=dict)


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

    def see(self, name: str, x: Tensor, facts: Callable[[], Facts] = dict, *, of: Tensor | None = None) -> None:
        """Adds a stage with result `x`. If `x` is a view made for display, `of` is the tensor that the pass uses."""
        name, used = self.where + name, x if of is None else of
        self._add(self.stages, name, x, facts)
        if self._backward and used.requires_grad:
            used.register_hook(lambda gradient: self._add(self.gradients, name, gradient))

    def see_stream(
        self, name: str, stream: Tensor, facts: Callable[[], Facts] = dict, *, before: Tensor | None = None
    ) -> None:
        """Adds a residual stream, with the angle between it and the stream `before`."""
        self.see(name, stream, lambda: facts() | ({} if before is None else _spread("degrees", angles(before, stream))))
        self.stream = stream

    def _add(self, stages: list[Stage], name: str, x: Tensor, facts: Callable[[], Facts] = dict) -> None:
        _synchronize(self._device)
        ms = (time.perf_counter() - self._since) * 1000
        with torch.no_grad():
            stages.append(_stage(name, x, ms, facts()))
        self.resume()


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between the vectors of `a` and `b` (..., D), float64, from the chord, which is exact for small angles."""
    a, b = F.normalize(a.detach().cpu().double(), dim=-1), F.normalize(b.detach().cpu().double(), dim=-1)
    return torch.rad2deg(2 * torch.asin(((a - b).norm(dim=-1) / 2).clamp(max=1)))


def score_facts(q: Tensor, k: Tensor, scale: float) -> Facts:
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


def amplitude(x: Tensor) -> Facts:
    """Facts of logits and of the input of an activation."""
    return {"sd": float(x.std()), "peak": float(x.abs().max())}


def _spread(name: str, values: Tensor) -> Facts:
    return {name: float(values.mean()), f"{name}_min": float(values.min()), f"{name}_max": float(values.max())}


def _zeros(x: Tensor) -> float:
    return float((x == 0).float().mean())


def _stage(name: str, x: Tensor, ms: float, facts: Facts) -> Stage:
    shown = x.detach().float()
    lengths = shown.norm(dim=-1) if shown.ndim else shown.abs()
    low, high = float(lengths.min()), float(lengths.max())
    radii = {"1": 1.0, "sqrt": math.sqrt(shown.shape[-1])} if shown.ndim else {}
    on = [label for label, size in radii.items() if max(abs(low - size), abs(high - size)) < SPHERE_TOLERANCE * size]
    length, dtype = (float(lengths.mean()), low, high), str(x.dtype).removeprefix("torch.")
    return Stage(name, tuple(x.shape), dtype, length, on[0] if on else "-", ms, facts)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def record_stages(model: GPT, recorder: Recorder) -> Iterator[None]:
    """Passes each stage of the forward passes in the block to the recorder; removes its hooks afterwards."""
    with ExitStack() as undo:
        undo.callback(setattr, recorder, "where", "")
        hooks = _Hooks(recorder, undo)
        hooks.after(model.wte, lambda _, x: recorder.see_stream("embedding", x))
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, SphereBlock | PreNormBlock)
            hooks.before(block, functools.partial(_enter_block, recorder, layer))
            hooks.watch_attention(block.attention)
            hooks.watch("mlp.up", block.mlp.up)
            hooks.before(block.mlp.down, lambda x: recorder.see("mlp.hidden", x, lambda: {"zeros": _zeros(x)}))
            hooks.watch("mlp.answer", block.mlp)
            if isinstance(block, SphereBlock):
                hooks.watch_residual("attention.stream", block.attention_residual)
                hooks.watch_residual("mlp.stream", block.mlp_residual)
            else:
                hooks.watch("attention.reads", block.attention_norm)
                hooks.before(
                    block.mlp_norm, lambda x: recorder.see_stream("attention.stream", x, before=recorder.stream)
                )
                hooks.watch("mlp.reads", block.mlp_norm)
                hooks.after(block, lambda _, out: recorder.see_stream("mlp.stream", out[0], before=recorder.stream))
            hooks.after(block, lambda *_: setattr(recorder, "where", ""))
        if model.normalizer is not None:
            names = itertools.cycle(("attention.r", "mlp.r"))
            hooks.after(
                model.normalizer, lambda _, r: recorder.see(next(names), r.unsqueeze(-1), lambda: _spread("r", r))
            )
        if model.final_norm is not None:
            hooks.after(model.final_norm, lambda _, x: recorder.see_stream("final norm", x))
        undo.enter_context(_Functions(recorder))
        recorder.resume()
        yield


def _enter_block(recorder: Recorder, layer: int, x: Tensor) -> None:
    if x is not recorder.stream:  # a GPT normalizes the embedding
        recorder.see_stream("embedding normalised", x)
    recorder.where = f"{layer}."


class _Hooks:
    """Adds hooks, which `undo` removes. They get the first argument of a call and, `after` it, the output."""

    def __init__(self, recorder: Recorder, undo: ExitStack) -> None:
        self.recorder, self.undo = recorder, undo

    def before(self, module: nn.Module, show: Callable[[Tensor], None]) -> None:
        self.undo.callback(module.register_forward_pre_hook(lambda _, args: show(args[0])).remove)

    def after(self, module: nn.Module, show: Callable[[Tensor, Any], None]) -> None:
        self.undo.callback(module.register_forward_hook(lambda _, args, output: show(args[0], output)).remove)

    def watch(self, name: str, module: nn.Module) -> None:
        self.after(module, lambda _, output: self.recorder.see(name, output))

    def watch_attention(self, attention: Attention) -> None:
        def see_heads(letter: str, _: Tensor, output: Tensor) -> None:
            width = attention.query.in_features // attention.n_head
            self.recorder.see(f"attention.{letter}", output.unflatten(-1, (-1, width)), of=output)

        for letter, linear in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            self.after(linear, functools.partial(see_heads, letter))
        rotate, letters = attention.rotate, itertools.cycle("qk")

        def rotate_and_see(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            rotated = rotate(x, cos, sin)
            self.recorder.see(f"attention.{next(letters)} rotated", rotated)
            return rotated

        attention.rotate = rotate_and_see
        self.undo.callback(setattr, attention, "rotate", rotate)
        self.before(attention.out, lambda x: self.recorder.see("attention.mixed", x))
        self.watch("attention.answer", attention)

    def watch_residual(self, name: str, residual: Residual) -> None:
        def alpha() -> Facts:
            return {"alpha": float(residual.sign(residual.alpha()).mean())}

        self.after(residual, lambda x, output: self.recorder.see_stream(name, output, alpha, before=x))


class _Functions(TorchFunctionMode):
    """Records calls of functions that are not modules."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        see = self._recorder.see
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            see("attention.q used", q)
            see("attention.k used", k, lambda: score_facts(q, k, kwargs["scale"]))
        elif func in (F.silu, F.relu):
            see(f"mlp.into {func.__name__}", args[0], lambda: amplitude(args[0]))
        output = func(*args, **kwargs)
        if func is F.linear and not isinstance(args[1], nn.Parameter) and self._recorder.where:  # scaled by s_uv
            see("mlp.up", output)
        return output
