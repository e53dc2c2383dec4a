"""The language model, in reading order: config, attention, MLP, blocks, the model.

One class covers two families. With `residual: add` it is a pre-norm GPT as nanochat builds it (RMSNorm without gain,
QK norm, relu^2, softcap, untied head). With any other rule it is nGPT (arXiv 2410.01131; NVIDIA/ngpt): the residual
stream and the rows of all matrices live on the unit sphere; learned scales s_qk, s_uv, s_z take over from the norms.

Shapes: B batch, T time, D width (n_embd), H heads, K head width (D / H), F hidden width of the MLP, V vocabulary.
"""

from collections.abc import Iterator
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ngpt.config import Config, invalid, one_of
from ngpt.norm import l2_normalize, rms_norm
from ngpt.residual import ALPHA_KINDS, RESIDUAL_RULES, Residual, Scale
from ngpt.rope import rope_tables, rotate

MLP_KINDS = ("swiglu", "relu2")
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class ModelConfig(Config):
    n_layer: Count = 4
    n_head: Count = 4
    n_embd: Count = 128
    block_size: Count = 128  # tokens of context, and of a training window
    vocab_size: Annotated[int, Field(ge=2)] | None = None  # null: the tokenizer's
    residual: Annotated[str, one_of(RESIDUAL_RULES, "residual rule")] = "lerp"
    alpha: Positive = 0.05  # initial step length of each residual; not used by `add`
    alpha_kind: Annotated[str, one_of(ALPHA_KINDS, "alpha kind")] = "vector"
    mlp: Annotated[str, one_of(MLP_KINDS, "MLP kind")] = "swiglu"
    mlp_ratio: Positive = 4.0  # hidden width of the MLP over n_embd
    qk_norm: bool = True
    s_uv: bool = True  # nGPT's learned scaling of the MLP's hidden units; not used by `add`
    logit_scale: Positive = 1.0  # initial s_z; not used by `add`
    logit_scale_kind: Annotated[str, one_of(ALPHA_KINDS, "logit scale kind")] = "vector"
    softcap: Positive | None = None  # logits become softcap * tanh(logits / softcap)
    rope_base: Positive = 10_000.0

    @property
    def on_sphere(self) -> bool:
        """Whether the residual stream and the matrices are kept at unit length: every rule but `add`."""
        return self.residual != "add"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden(self) -> int:
        """Hidden width F of the MLP."""
        return round(self.mlp_ratio * self.n_embd)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.n_embd % self.n_head:
            raise invalid(f"n_embd {self.n_embd} cannot be divided into n_head {self.n_head} heads", "n_head", "n_embd")
        if self.head_dim % 2:
            text = f"n_embd {self.n_embd} / n_head {self.n_head} gives heads of odd width {self.head_dim}"
            raise invalid(f"{text}; rotary embedding needs an even one", "n_head", "n_embd")
        return self


class Attention(nn.Module):
    """Causal self-attention with rotary positions, (B, T, D) -> (B, T, D).

    nGPT normalises q and k per head after the rotation, scales them by s_qk and multiplies the scores by sqrt(K); the
    GPT baseline normalises them by their root mean square and divides by sqrt(K), as both do without QK norm.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.qk_norm, self.on_sphere = cfg.n_head, cfg.qk_norm, cfg.on_sphere
        self.query = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.key = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.value = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.s_qk = Scale(cfg.n_embd, init=1.0, scale=cfg.n_embd**-0.5) if cfg.on_sphere and cfg.qk_norm else None
        self.softmax_scale = cfg.head_dim**0.5 if self.s_qk is not None else cfg.head_dim**-0.5

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))  # (B, H, T, K)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.s_qk is not None:
            s_qk = self.s_qk().view(self.n_head, 1, -1)
            q, k = s_qk * l2_normalize(q), s_qk * l2_normalize(k)
        elif self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        mixed = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, scale=self.softmax_scale
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


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
        hidden = self.up(x)  # (B, T, F), or (B, T, 2F) with the gate in the second half
        if self.s_uv is not None:
            hidden = hidden * (self.s_uv() * self.gain)
        if self.gated:
            u, gate = hidden.chunk(2, dim=-1)
            return self.down(u * F.silu(gate))
        return self.down(F.relu(hidden).square())


class SphereBlock(nn.Module):
    """An nGPT block: attention and MLP read the stream as it is, and each moves it along the sphere."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(cfg), MLP(cfg)
        step = {"n_embd": cfg.n_embd, "alpha": cfg.alpha, "alpha_kind": cfg.alpha_kind}
        self.attention_residual = Residual(cfg.residual, **step)
        self.mlp_residual = Residual(cfg.residual, **step)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.attention_residual(x, self.attention(x, cos, sin))
        return self.mlp_residual(x, self.mlp(x))


class PreNormBlock(nn.Module):
    """A GPT block: attention and MLP read the normalised stream and add to it."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(cfg), MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(rms_norm(x), cos, sin)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The language model. `seed` decides every initial weight, the same on every device."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("model.vocab_size is not set: it is the tokenizer's, see ngpt.train.resolved")
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        block = SphereBlock if cfg.on_sphere else PreNormBlock
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.n_layer))
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        size = cfg.vocab_size if cfg.logit_scale_kind == "vector" else 1
        self.s_z = Scale(size, init=cfg.logit_scale, scale=cfg.n_embd**-0.5) if cfg.on_sphere else None
        cos, sin = rope_tables(cfg.block_size, cfg.head_dim, base=cfg.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for token ids `idx` (B, T), or with `targets` (B, T) their mean cross-entropy in nats."""
        *_, x = self.stream(idx)
        if self.s_z is None:
            x = rms_norm(x)
        weight = self.lm_head.weight
        if self.s_z is not None:
            # s_z * (x @ W^T), with the scaling on the (V, D) weight: far smaller than the (B, T, V) logits.
            weight = weight * self.s_z()[:, None]
        logits = F.linear(x, weight).float()
        if self.cfg.softcap is not None:
            logits = self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def stream(self, idx: Tensor) -> Iterator[Tensor]:
        """The residual stream (B, T, D) before the first block and after each."""
        time = idx.shape[1]
        if time > self.cfg.block_size:
            raise ValueError(f"{time} tokens do not fit the model's block_size of {self.cfg.block_size}")
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.wte(idx)
        if not self.cfg.on_sphere:
            x = rms_norm(x)
        yield x
        for block in self.blocks:
            x = block(x, cos, sin)
            yield x

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
        yield self.lm_head.weight, 1

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """nGPT: N(0, 1/D) everywhere, then onto the sphere. GPT: nanochat's scheme (gpt.py, init_weights)."""
        if self.cfg.on_sphere:
            for weight, dim in self.sphere_weights():
                weight.normal_(std=self.cfg.n_embd**-0.5, generator=generator)
                weight.copy_(l2_normalize(weight, dim))
            return
        self.wte.weight.normal_(generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                std = min(1.0, (rows / columns) ** 0.5) / columns**0.5
                module.weight.normal_(std=std, generator=generator)
                if name.endswith(("out", "down", "lm_head")):  # each block starts as the identity
                    module.weight.zero_()
