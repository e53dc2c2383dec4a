"""The language model, in reading order: config, attention, MLP, blocks, the model.

One class covers two families. With `residual: add` it is a pre-norm GPT as nanochat builds it (RMSNorm without gain,
QK norm, relu^2, softcap, untied head). With any other rule it is nGPT (arXiv 2410.01131; NVIDIA/ngpt): the residual
stream and the rows of all matrices live on the unit sphere; learned scales s_qk, s_uv, s_z take over from the norms.

Shapes: B batch, T time, D width (n_embd), H heads, G heads of keys and values (n_kv_head), K head width (D / H),
F hidden width of the MLP, V vocabulary.
"""

from collections.abc import Iterator
from typing import Annotated, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Discriminator, Field, Strict, Tag, model_validator
from torch import Tensor, nn

from ngpt.config.base import Config, invalid, one_of, renamed
from ngpt.kernels.compile import compile_for
from ngpt.kernels.cpu_attention import MAX_TOKENS, causal_attention, has_cpu_attention
from ngpt.kernels.linear_cross_entropy import linear_cross_entropy
from ngpt.model.norm import NORM_MODES, DotProdNormalizer, l2_normalize, rms_norm
from ngpt.model.residual import (
    ALPHA_KINDS,
    ALPHA_SIGNS,
    RESIDUAL_ALIASES,
    RESIDUAL_RULES,
    Residual,
    Scale,
    spread_over_depth,
)
from ngpt.model.rope import ROPE_KINDS, ROPE_SCALINGS, attention_temperature, rope_tables

MLP_KINDS = ("swiglu", "relu2")
SCALE_KINDS = ("vector", "scalar")
SHORT = 256  # tokens up to which torch's attention on a CPU takes longer in bfloat16 than in float32, up to 3 times
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
OnePerLayer = Annotated[tuple[Positive, ...], Field(min_length=1), Strict(False)]
# Told apart by hand, so that a bad number is one complaint and not one per branch.
Alpha = Annotated[
    Annotated[Positive, Tag("one-number")] | Annotated[OnePerLayer, Tag("one-per-layer")],
    Discriminator(lambda given: "one-per-layer" if isinstance(given, list | tuple) else "one-number"),
]


class ModelConfig(Config, frozen=True):
    n_layer: Count = 4
    n_head: Count = 4
    n_kv_head: Count | None = None  # heads of keys and values; null: n_head, 1: multi-query, between: grouped-query
    n_embd: Count = 128
    block_size: Count = 128  # tokens of context, and of a training window
    vocab_size: Annotated[int, Field(ge=2)] | None = None  # null: the tokenizer's
    tied: bool = False  # whether the head's matrix is the embedding's
    mlp: Annotated[str, one_of(MLP_KINDS, "MLP kind")] = "swiglu"
    mlp_ratio: Positive = 4.0  # hidden width of the MLP over n_embd
    qk_norm: bool = True
    softmax_scale: Positive | None = None  # of attention scores; null: the one that fits, see Attention
    softcap: Positive | None = None  # logits become softcap * tanh(logits / softcap)
    rope: Annotated[str, one_of(ROPE_KINDS, "rope")] = "rotary"
    rope_base: Positive = 10_000.0
    rope_scaling: Annotated[str, one_of(ROPE_SCALINGS, "rope scaling")] = "none"
    rope_factor: Annotated[float, Field(ge=1)] = 1.0  # block_size over the context that the model was trained with
    residual: Annotated[str, one_of(RESIDUAL_RULES, "residual rule", aliases=RESIDUAL_ALIASES)] = renamed(
        "lerp", RESIDUAL_ALIASES
    )

    # nGPT only, and without meaning under `residual: add`:
    alpha: Alpha = 0.05  # initial step length of each residual, or several spread over the depth
    alpha_final: Positive | None = None  # where a schedule takes alpha over the run, in a straight line; null: nowhere
    alpha_kind: Annotated[str, one_of(ALPHA_KINDS, "alpha kind")] = "vector"
    alpha_learned: bool = True
    alpha_sign: Annotated[str, one_of(ALPHA_SIGNS, "alpha sign")] = "abs"
    logit_scale: Positive = 1.0  # initial s_z
    logit_scale_kind: Annotated[str, one_of(SCALE_KINDS, "logit scale kind")] = "vector"
    s_uv: bool = True  # the MLP's hidden units times sqrt(n_embd) and a learned scaling; false: as they are
    scale_trick: bool = True  # alpha, s_qk and s_z are stored as 1/sqrt(n_embd); false: as they act
    norm_mode: Annotated[str, one_of(NORM_MODES, "norm mode")] = "baseline"  # what divides the residual's step
    norm_decay: Annotated[float, Field(ge=0, le=1)] = 0.9  # of norm mode `ema`
    norm_every: Count = 1  # ghost norms: sublayers until the stream is brought back to the sphere; the last always does
    norm_probability: Annotated[float, Field(gt=0, le=1)] = 1.0  # stochastic residual norm: of doing so, in training

    # GPT only, and without meaning under the other rules:
    embedding_norm: bool = True  # whether the stream starts normalised
    norm_gain: bool = False  # a learned gain on every RMSNorm of the stream

    @property
    def on_sphere(self) -> bool:
        """Whether the residual stream and the matrices are kept at unit length: every rule but `add`."""
        return self.residual != "add"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden(self) -> int:
        """Hidden width F of the MLP."""
        return round(self.mlp_ratio * self.n_embd)

    @property
    def stored_scale(self) -> float | None:
        """How alpha, s_qk and s_z are stored; None: as they act."""
        return self.n_embd**-0.5 if self.scale_trick else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.n_embd % self.n_head:
            raise invalid(f"n_embd {self.n_embd} cannot be divided into n_head {self.n_head} heads", "n_head", "n_embd")
        if self.head_dim % 2:
            text = f"n_embd {self.n_embd} / n_head {self.n_head} gives heads of odd width {self.head_dim}"
            raise invalid(f"{text}; rotary embedding needs an even one", "n_head", "n_embd")
        if self.n_head % self.kv_heads:
            text = f"n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}"
            raise invalid(text, "n_kv_head", "n_head")
        if not self.hidden:
            text = f"mlp_ratio {self.mlp_ratio} of n_embd {self.n_embd} gives an MLP without hidden units"
            raise invalid(text, "mlp_ratio", "n_embd")
        if self.rope_factor != 1 and self.rope_scaling == "none":
            scalings = ", ".join(name for name in ROPE_SCALINGS if name != "none")
            raise invalid(f"rope_factor {self.rope_factor} needs a rope_scaling: {scalings}", "rope_factor")
        if self.alpha_final is not None and not isinstance(self.alpha, float):
            raise invalid("alpha_final needs one alpha to start from, not one per layer", "alpha_final")
        plain_values = {"norm_mode": "baseline", "norm_every": 1, "norm_probability": 1.0, "alpha_final": None}
        for name, plain in plain_values.items():
            if not self.on_sphere and getattr(self, name) != plain:
                raise invalid(f"{name} needs a residual rule on the sphere, `add` is not", name, "residual")
        return self


class KVCache:
    """Keys and values of the tokens so far, per layer (B, G, T, K): what generation does not compute again."""

    def __init__(self, cfg: ModelConfig, batch: int, *, device: torch.device) -> None:
        shape = (cfg.n_layer, 2, batch, cfg.kv_heads, cfg.block_size, cfg.head_dim)
        self._entries = torch.zeros(shape, device=device)
        self.length = 0  # tokens in it; the model adds those of a forward pass once all its layers are done

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds `k` and `v` (B, G, new, K) of one layer and returns those of all tokens."""
        stop = self.length + k.shape[2]
        keys, values = self._entries[layer]
        keys[:, :, self.length : stop], values[:, :, self.length : stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]


class Attention(nn.Module):
    """Causal self-attention with rotary positions, (B, T, D) -> (B, T, D).

    nGPT normalises q and k per head after the rotation and scales them by s_qk; scores are multiplied by sqrt(K). Its
    matrices have unit rows, so without QK norm a head's q and k have length sqrt(K / D): then D / sqrt(K) gives scores
    of the same spread. The GPT baseline normalises q and k by their root mean square; it divides by sqrt(K) either way.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.qk_norm = cfg.n_head, cfg.kv_heads, cfg.qk_norm
        self.rotate = ROPE_KINDS[cfg.rope]
        kv_width = cfg.kv_heads * cfg.head_dim
        self.query = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.key = nn.Linear(cfg.n_embd, kv_width, bias=False)
        self.value = nn.Linear(cfg.n_embd, kv_width, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        scaled = cfg.on_sphere and cfg.qk_norm
        self.s_qk = Scale(cfg.n_embd, init=1.0, scale=cfg.stored_scale or 1.0) if scaled else None
        fitting = cfg.head_dim**0.5 if scaled else cfg.head_dim**-0.5 * (cfg.n_embd if cfg.on_sphere else 1)
        temperature = attention_temperature(cfg.rope_scaling, cfg.rope_factor)
        self.softmax_scale = (cfg.softmax_scale or fitting) * temperature
        self.native = False  # whether attention is ours in C++, see `GPT.compile_parts`

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, head_weights: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """`cos` and `sin` (T, K / 2) are those of the positions of x; `head_weights` (H,) scale what the heads answer.

        A cache gives the keys and values of earlier tokens, and gets those of x.
        """
        q, k, v = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))  # (B, H or G, T, K)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if self.s_qk is not None:
            # The paper scales q and k by s_qk each; only their product matters, and a key may belong to several heads.
            q, k = self.s_qk().square().view(self.n_head, 1, -1) * l2_normalize(q), l2_normalize(k)
        elif self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = (entries.to(v.dtype) for entries in cache.extend(self.layer, k, v))
        with torch.autocast(q.device.type, enabled=False):
            mixed = self._mix(q, k, v, past)
        if head_weights is not None:
            mixed = mixed * head_weights.view(-1, 1, 1).to(mixed.dtype)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """softmax(scale * q k^T) v of tokens that follow `past` others, (B, H, T, K)."""
        if self.native and not past and q.shape[2] <= MAX_TOKENS:
            by_token = (part.transpose(1, 2).float() for part in (q, k, v))  # as the products have made them
            return causal_attention(*by_token, self.softmax_scale)[0].transpose(1, 2)
        slow = q.device.type == "cpu" and v.dtype == torch.bfloat16 and k.shape[2] <= SHORT
        dtype = torch.float32 if slow else v.dtype
        return F.scaled_dot_product_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            attn_mask=_causal_mask(past, q.shape[2], q.device) if past else None,
            is_causal=not past,
            scale=self.softmax_scale,
            enable_gqa=self.n_kv_head != self.n_head,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.query.in_features // self.n_head)).transpose(1, 2)


def _causal_mask(past: int, new: int, device: torch.device) -> Tensor:
    """Which of the `past + new` keys each of the new queries may see, (new, past + new)."""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(diagonal=past)


class MLP(nn.Module):
    """SwiGLU, `u * silu(v)`, or `relu(u)^2`, between two matrices: (B, T, D) -> (B, T, D).

    nGPT scales the hidden units by s_uv * sqrt(D): unit rows times a unit vector give values of about 1/sqrt(D), where
    silu would be almost linear.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        width = cfg.hidden * 2 if self.gated else cfg.hidden
        self.up = nn.Linear(cfg.n_embd, width, bias=False)
        self.down = nn.Linear(cfg.hidden, cfg.n_embd, bias=False)
        self.s_uv = Scale(width, init=1.0, scale=1.0) if cfg.on_sphere and cfg.s_uv else None
        self.gain = cfg.n_embd**0.5

    def forward(self, x: Tensor) -> Tensor:
        # s_uv acts on the weight, which is smaller than the hidden units of a batch.
        scaled = None if self.s_uv is None else self.up.weight * (self.s_uv() * self.gain)[:, None]
        hidden = (
            self.up(x) if scaled is None else F.linear(x, scaled)
        )  # (B, T, F), or 2F with the gate in the second half
        if self.gated:
            u, gate = hidden.chunk(2, dim=-1)
            return self.down(u * F.silu(gate))
        return self.down(F.relu(hidden).square())


class SphereBlock(nn.Module):
    """An nGPT block: attention and MLP read the stream as it is, and each moves it along the sphere."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.attention_residual = _residual(cfg, 2 * layer, n_head=cfg.n_head)
        self.mlp_residual = _residual(cfg, 2 * layer + 1, n_head=None)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        normalizer: DotProdNormalizer | None,
        r: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream (B, T, D) and, with a `normalizer`, the divisor r (B, T), both after the block."""
        if normalizer is not None and r is None:
            r = normalizer.start(x)
        answer = self.attention(x, cos, sin, self.attention_residual.head_weights(), cache)
        if normalizer is not None and r is not None:
            r = normalizer(r, x, self.attention_residual.normalized_branch(answer))
        x = self.attention_residual(x, answer, r)
        answer = self.mlp(x)
        if normalizer is not None and r is not None:
            r = normalizer(r, x, self.mlp_residual.normalized_branch(answer))
        return self.mlp_residual(x, answer, r), r


def _residual(cfg: ModelConfig, sublayer: int, *, n_head: int | None) -> Residual:
    """The residual of one of the 2 * n_layer sublayers; an MLP has no heads and takes one alpha in their place."""
    alpha = spread_over_depth(cfg.alpha, cfg.n_layer)[sublayer // 2]
    sizes = {"vector": cfg.n_embd, "scalar": 1, "head": n_head or 1}
    due = (sublayer + 1) % cfg.norm_every == 0 or sublayer == 2 * cfg.n_layer - 1
    return Residual(
        cfg.residual,
        size=sizes[cfg.alpha_kind],
        alpha=alpha,
        scale=cfg.stored_scale or alpha,
        learned=cfg.alpha_learned,
        sign=cfg.alpha_sign,
        per_head=cfg.alpha_kind == "head" and n_head is not None,
        renormalize=cfg.norm_probability if due else 0.0,
    )


class PreNormBlock(nn.Module):
    """A GPT block: attention and MLP read the normalised stream and add to it."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.attention_norm, self.mlp_norm = _rms_norm(cfg), _rms_norm(cfg)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, *, normalizer: None, r: None, cache: KVCache | None
    ) -> tuple[Tensor, None]:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache=cache)
        return x + self.mlp(self.mlp_norm(x)), None


def _rms_norm(cfg: ModelConfig) -> nn.RMSNorm:
    # With a gain as NVIDIA's GPT baseline has it, without as nanochat: torch's default eps, the one of float32.
    return nn.RMSNorm(cfg.n_embd, eps=1e-6 if cfg.norm_gain else None, elementwise_affine=cfg.norm_gain)


class GPT(nn.Module):
    """The language model. `seed` decides every initial weight, the same on every device."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("model.vocab_size is not set: it is the tokenizer's, see ngpt.training.config.resolved")
        self.cfg = cfg
        self.compiled, self._kind = False, ""  # what decides the graph besides the shape of a batch
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        block = SphereBlock if cfg.on_sphere else PreNormBlock
        self.blocks = nn.ModuleList(block(cfg, layer) for layer in range(cfg.n_layer))
        self.normalizer = (
            DotProdNormalizer(cfg.norm_mode, decay=cfg.norm_decay) if cfg.norm_mode != "baseline" else None
        )
        self.final_norm = None if cfg.on_sphere else _rms_norm(cfg)
        self.lm_head = None if cfg.tied else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        size = cfg.vocab_size if cfg.logit_scale_kind == "vector" else 1
        s_z = Scale(size, init=cfg.logit_scale, scale=cfg.stored_scale or cfg.logit_scale) if cfg.on_sphere else None
        self.s_z = s_z
        cos, sin = rope_tables(
            cfg.block_size, cfg.head_dim, base=cfg.rope_base, scaling=cfg.rope_scaling, factor=cfg.rope_factor
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def forward(self, idx: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for token ids `idx` (B, T), or with `targets` (B, T) their mean cross-entropy in nats.

        With a `cache`, `idx` continues the tokens that are in it, and is added to them.
        """
        x = self.features(idx, cache)
        if targets is None:
            return self.logits(x)
        s_z = None if self.s_z is None else self.s_z()
        return linear_cross_entropy(
            x, self.head_weight, targets, scale=s_z, softcap=self.cfg.softcap, compiled=self.compiled
        )

    def compile_parts(self) -> None:
        """From now on the blocks and the pass over the logits run compiled; it takes seconds at the first call."""
        # Without the settings that reach the graph as tensors only: trials of a sweep share what is compiled.
        free = ("alpha", "alpha_final", "logit_scale", "rope_base")
        self._kind = repr(self.cfg.model_copy(update=dict.fromkeys(free)))
        if self.wte.weight.device.type == "cpu" and has_cpu_attention():
            for module in self.modules():
                if isinstance(module, Attention):
                    module.native = True
        self.compiled = True

    def logits(self, x: Tensor) -> Tensor:
        """What the head makes of `features` x (B, T, D): float32 (B, T, V)."""
        s_z = self.s_z() if self.s_z is not None else None
        # s_z * (x @ W^T), with the scaling on the (V, D) weight: far smaller than the (B, T, V) logits.
        weight = self.head_weight if s_z is None else self.head_weight * s_z[:, None]
        logits = F.linear(x, weight).float()
        return logits if self.cfg.softcap is None else self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def features(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head reads, (B, T, D): the stream after the last block, in a GPT normalised."""
        if not self.compiled:
            return self.features_uncompiled(idx, cache)
        # By shape, too: a run that memory runs out in comes along with ever smaller batches, beyond torch's limit.
        return compile_for((self._kind, idx.shape), GPT.features_uncompiled)(self, idx, cache)

    def features_uncompiled(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """`features`, whether the model is compiled or not."""
        *_, x = self.stream(idx, cache)
        return x if self.final_norm is None else self.final_norm(x)

    def stream(self, idx: Tensor, cache: KVCache | None = None) -> Iterator[Tensor]:
        """The residual stream (B, T, D) before the first block and after each."""
        past, new = cache.length if cache else 0, idx.shape[1]
        if past + new > self.cfg.block_size:
            raise ValueError(f"{past + new} tokens do not fit the model's block_size of {self.cfg.block_size}")
        cos, sin = self.cos[past : past + new], self.sin[past : past + new]
        x, r = self.wte(idx), None
        if self.cfg.embedding_norm and not self.cfg.on_sphere:
            x = rms_norm(x)
        yield x
        for block in self.blocks:
            x, r = block(x, cos, sin, normalizer=self.normalizer, r=r, cache=cache)
            yield x
        if cache is not None:
            cache.length += new

    def prepare_step(self, step: int, total: int, *, seed: int) -> None:
        """Sets what changes from step to step without being learned: the alpha schedule, the stochastic norms' draws.

        It depends on its arguments only, so that a resumed run needs no state; `step` counts from 0 to total - 1.
        """
        residuals = [module for module in self.modules() if isinstance(module, Residual)]
        if self.cfg.alpha_final is not None:
            assert isinstance(self.cfg.alpha, float)
            progress = step / max(1, total - 1)
            for residual in residuals:
                residual.alpha.multiply(1 + (self.cfg.alpha_final / self.cfg.alpha - 1) * progress)
        if self.cfg.norm_probability < 1:
            draws = np.random.default_rng([seed, step, len(residuals)]).random(len(residuals))
            for residual, draw in zip(residuals, draws, strict=True):
                residual.renormalized.fill_(bool(draw < self.cfg.norm_probability))

    def sphere_weights(self) -> Iterator[tuple[Tensor, int]]:
        """Every matrix that lives on the sphere with the dimension along which its vectors have length 1.

        It is always the model's dimension D: rows of the embeddings and of what reads the stream, columns of what
        writes to it. Scales are not on the sphere; a GPT has no sphere weights.
        """
        if not self.cfg.on_sphere:
            return
        yield self.wte.weight, 1
        for block in self.blocks:
            assert isinstance(block, SphereBlock)
            for linear in (block.attention.query, block.attention.key, block.attention.value, block.mlp.up):
                yield linear.weight, 1
            for linear in (block.attention.out, block.mlp.down):
                yield linear.weight, 0
        if self.lm_head is not None:
            yield self.lm_head.weight, 1

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """nGPT: N(0, 1/D) everywhere, then onto the sphere. GPT: nanochat's scheme (gpt.py, init_weights).

        A tied GPT cannot have nanochat's zero head: N(0, 0.02^2) as in GPT-2.
        """
        if self.cfg.on_sphere:
            for weight, dim in self.sphere_weights():
                weight.normal_(std=self.cfg.n_embd**-0.5, generator=generator)
                weight.copy_(l2_normalize(weight, dim))
            return
        self.wte.weight.normal_(std=0.02 if self.cfg.tied else 1.0, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                std = min(1.0, (rows / columns) ** 0.5) / columns**0.5
                module.weight.normal_(std=std, generator=generator)
                if name.endswith(("out", "down", "lm_head")):  # each block starts as the identity
                    module.weight.zero_()
