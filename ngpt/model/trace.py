"""Records the intermediate results of a forward pass, and their gradients, while the real model runs.

Module hooks record the outputs of modules, a wrapper of the `rotate` attribute records RoPE, and a `TorchFunctionMode`
records functions that are not modules (attention scores, activations).
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
from ngpt.system.timing import synchronize

Facts = dict[str, float]
SPHERE_TOLERANCE = 1e-3  # relative deviation of vector lengths that still counts as on a sphere


@dataclass(frozen=True)
class Stage:
    """Statistics of one intermediate result of a pass.

    `length` holds the mean, minimum and maximum Euclidean length of the vectors along the last dimension. `sphere` is
    their common radius: `1`, `sqrt` (square root of the dimension, as after an RMSNorm), or `-` if neither.
    `ms` is the time since the previous stage. `facts` are further statistics, listed in `Recorder`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    length: tuple[float, float, float]
    sphere: str
    ms: float
    facts: Facts = field(default_factory=dict)


class Recorder:
    """Collects the stages of one pass. The recording time is not included in their `ms`.

    Facts of a stage:
        residual stream: mean `alpha`, and the rotation in `degrees` (mean, min, max).
        divisor: `r` (mean, min, max).
        attention scores, unmasked only: `sd`, `peak` (largest absolute value), `reads` (mean effective number of keys,
            the exponential of the entropy) and `sees` (mean number of visible keys).
        hidden units of the MLP: `zeros`, the fraction that is exactly 0.
        input of an activation, and logits: `sd` and `peak`.
    """

    def __init__(self, device: torch.device, *, backward: bool = False) -> None:
        self.stages: list[Stage] = []
        self.gradients: list[Stage] = []
        self.prefix = ""  # of stage names, such as `0.` within block 0
        self.stream = torch.empty(0)  # most recently recorded residual stream
        self._device, self._backward = device, backward
        self._stage_start = time.perf_counter()

    def resume(self) -> None:
        """Starts timing the next stage."""
        synchronize(self._device)
        self._stage_start = time.perf_counter()

    def record(self, name: str, x: Tensor, facts: Callable[[], Facts] = dict, *, of: Tensor | None = None) -> None:
        """Adds a stage with result `x`. If `x` is a view for display only, pass the model's own tensor as `of`."""
        name, tensor = self.prefix + name, x if of is None else of
        self._add(self.stages, name, x, facts)
        if self._backward and tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._add(self.gradients, name, gradient))

    def record_stream(
        self, name: str, stream: Tensor, facts: Callable[[], Facts] = dict, *, before: Tensor | None = None
    ) -> None:
        """Adds a residual stream, with its angle to the stream `before` the update."""
        self.record(
            name, stream, lambda: facts() | ({} if before is None else _spread("degrees", angles(before, stream)))
        )
        self.stream = stream

    def _add(self, stages: list[Stage], name: str, x: Tensor, facts: Callable[[], Facts] = lambda: {}) -> None:
        """Adds a stage with output x. Its time ends here, and that of the next begins after `facts` are computed."""
        synchronize(self._device)
        ms = (time.perf_counter() - self._stage_start) * 1000
        with torch.no_grad():
            stages.append(_stage(name, x, ms, facts()))
        self.resume()


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Returns the angles in degrees between vectors of `a` and `b` (..., D), in float64; accurate for small angles."""
    a, b = (F.normalize(vectors.detach().cpu().double(), dim=-1) for vectors in (a, b))
    return torch.rad2deg(2 * torch.asin(((a - b).norm(dim=-1) / 2).clamp(max=1)))


def score_facts(q: Tensor, k: Tensor, scale: float) -> Facts:
    """Returns facts of the causal attention scores scale * <q, k>, for q (B, H, T, K) and k (B, G, T, K)."""
    tokens = q.shape[2]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    parts = []
    for queries, keys in zip(q.float(), k.float(), strict=True):  # one by one, since the scores (H, T, T) are large
        scores = scale * queries @ keys.repeat_interleave(len(queries) // len(keys), 0).mT
        log_weights = scores.masked_fill(~causal, -math.inf).log_softmax(-1).masked_fill(~causal, 0)
        entropy = -(log_weights.exp() * causal * log_weights).sum(-1)
        visible = scores[:, causal]
        parts.append([visible.mean(), visible.square().mean(), visible.abs().max(), entropy.exp().mean()])
    mean, square, peak, reads = torch.tensor(parts).unbind(1)
    sd = (square.mean() - mean.mean().square()).clamp(min=0).sqrt()
    return {"sd": float(sd), "peak": float(peak.max()), "reads": float(reads.mean()), "sees": (tokens + 1) / 2}


def amplitude(x: Tensor) -> Facts:
    """Returns the facts of logits or of the input of an activation."""
    return {"sd": float(x.std()), "peak": float(x.abs().max())}


def _spread(name: str, values: Tensor) -> Facts:
    return {name: float(values.mean()), f"{name}_min": float(values.min()), f"{name}_max": float(values.max())}


def _zeros(x: Tensor) -> float:
    return float((x == 0).float().mean())


def _stage(name: str, x: Tensor, ms: float, facts: Facts) -> Stage:
    values = x.detach().float()
    lengths = values.norm(dim=-1) if values.ndim else values.abs()
    low, high = float(lengths.min()), float(lengths.max())
    radii = {"1": 1.0, "sqrt": math.sqrt(values.shape[-1])} if values.ndim else {}
    spheres = [label for label, r in radii.items() if max(abs(low - r), abs(high - r)) < SPHERE_TOLERANCE * r]
    length, dtype = (float(lengths.mean()), low, high), str(x.dtype).removeprefix("torch.")
    return Stage(name, tuple(x.shape), dtype, length, spheres[0] if spheres else "-", ms, facts)


@contextmanager
def record_stages(model: GPT, recorder: Recorder) -> Iterator[None]:
    """Records the stages of forward passes inside the with block; removes the hooks afterwards."""
    with ExitStack() as stack:
        stack.callback(setattr, recorder, "prefix", "")
        hooks = _Hooks(recorder, stack)
        record, record_stream = recorder.record, recorder.record_stream
        hooks.after(model.wte, lambda _, x: record_stream("embedding", x))
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, SphereBlock | PreNormBlock)
            hooks.before(block, functools.partial(_enter_block, recorder, layer))
            hooks.record_attention(block.attention)
            hooks.record_output("mlp.up", block.mlp.up)
            hooks.before(block.mlp.down, lambda x: record("mlp.hidden", x, lambda: {"zeros": _zeros(x)}))
            hooks.record_output("mlp.answer", block.mlp)
            if isinstance(block, SphereBlock):
                hooks.record_residual("attention.stream", block.attention_residual)
                hooks.record_residual("mlp.stream", block.mlp_residual)
            else:
                hooks.record_output("attention.reads", block.attention_norm)
                hooks.before(block.mlp_norm, lambda x: record_stream("attention.stream", x, before=recorder.stream))
                hooks.record_output("mlp.reads", block.mlp_norm)
                hooks.after(block, lambda _, out: record_stream("mlp.stream", out[0], before=recorder.stream))
            hooks.after(block, lambda *_: setattr(recorder, "prefix", ""))
        if model.normalizer is not None:
            names = itertools.cycle(("attention.r", "mlp.r"))
            hooks.after(model.normalizer, lambda _, r: record(next(names), r.unsqueeze(-1), lambda: _spread("r", r)))
        if model.final_norm is not None:
            hooks.after(model.final_norm, lambda _, x: record_stream("final norm", x))
        stack.enter_context(_Functions(recorder))
        recorder.resume()
        yield


def _enter_block(recorder: Recorder, layer: int, x: Tensor) -> None:
    if x is not recorder.stream:  # a GPT normalizes the embedding
        recorder.record_stream("embedding normalised", x)
    recorder.prefix = f"{layer}."


class _Hooks:
    """Registers hooks, which `stack` removes: `before` hooks get the first argument, `after` hooks also the output."""

    def __init__(self, recorder: Recorder, stack: ExitStack) -> None:
        self.recorder, self.stack = recorder, stack

    def before(self, module: nn.Module, callback: Callable[[Tensor], None]) -> None:
        self.stack.callback(module.register_forward_pre_hook(lambda _, args: callback(args[0])).remove)

    def after(self, module: nn.Module, callback: Callable[[Tensor, Any], None]) -> None:
        self.stack.callback(module.register_forward_hook(lambda _, args, output: callback(args[0], output)).remove)

    def record_output(self, name: str, module: nn.Module) -> None:
        self.after(module, lambda _, output: self.recorder.record(name, output))

    def record_attention(self, attention: Attention) -> None:
        """Records the heads before and after their rotation, the mixed values, and the output of an attention."""

        def record_heads(letter: str, _: Tensor, output: Tensor) -> None:
            width = attention.query.in_features // attention.n_head
            self.recorder.record(f"attention.{letter}", output.unflatten(-1, (-1, width)), of=output)

        for letter, linear in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            self.after(linear, functools.partial(record_heads, letter))
        rotate, letters = attention.rotate, itertools.cycle("qk")

        def rotate_and_record(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            rotated = rotate(x, cos, sin)
            self.recorder.record(f"attention.{next(letters)} rotated", rotated)
            return rotated

        attention.rotate = rotate_and_record
        self.stack.callback(setattr, attention, "rotate", rotate)
        self.before(attention.out, lambda x: self.recorder.record("attention.mixed", x))
        self.record_output("attention.answer", attention)

    def record_residual(self, name: str, residual: Residual) -> None:
        def alpha() -> Facts:
            return {"alpha": float(residual.sign(residual.alpha()).mean())}

        self.after(residual, lambda x, output: self.recorder.record_stream(name, output, alpha, before=x))


class _Functions(TorchFunctionMode):
    """Records functions that are not modules: attention, activations and matrices scaled by s_uv."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        record = self._recorder.record
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            record("attention.q used", q)
            record("attention.k used", k, lambda: score_facts(q, k, kwargs["scale"]))
        elif func in (F.silu, F.relu):
            record(f"mlp.into {func.__name__}", args[0], lambda: amplitude(args[0]))
        output = func(*args, **kwargs)
        if func is F.linear and not isinstance(args[1], nn.Parameter) and self._recorder.prefix:  # scaled by s_uv
            record("mlp.up", output)
        return output
