"""The sublayers of a block, attention and MLP, and the KV cache for generation. gpt.py defines the shape letters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.kernels.cpu_attention import MAX_TOKENS, causal_attention
from ngpt.model.config import ModelConfig
from ngpt.model.norm import l2_normalize, rms_norm
from ngpt.model.residual import Scale
from ngpt.model.rope import ROPE_KINDS, attention_temperature

FLOAT32_TOKENS = 256  # below this length torch's CPU attention is up to 3 times slower in bfloat16 than float32


class KVCache:
    """Keys and values (B, G, T, K) of previous tokens in each layer, so that generation does not recompute them.

    They are kept in the dtype of the first step: bfloat16 under autocast, which is half the memory of float32.
    """

    def __init__(self, cfg: ModelConfig, batch: int, *, device: torch.device) -> None:
        self._shape = (cfg.n_layer, 2, batch, cfg.kv_heads, cfg.block_size, cfg.head_dim)
        self._device = device
        self._entries: Tensor | None = None
        self.length = 0  # cached tokens; the model increases it at the end of a forward pass

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends `k` and `v` (B, G, new, K) to a layer's cache; returns the keys and values of all tokens so far."""
        if self._entries is None:
            self._entries = torch.zeros(self._shape, dtype=v.dtype, device=self._device)
        stop = self.length + k.shape[2]
        keys, values = self._entries[layer]
        keys[:, :, self.length : stop], values[:, :, self.length : stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]


class ValueResidual:
    """Mixes the first layer's values into those of later layers, in one forward pass (ResFormer, arXiv 2410.17897)."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._first: Tensor | None = None

    def mix(self, layer: int, v: Tensor) -> Tensor:
        """Keeps the values `v` (B, G, T, K) of layer 0; returns those of another layer with their share of these."""
        if layer == 0 or self._first is None:
            self._first = v
            return v
        return torch.lerp(v, self._first, self._share)


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings, (B, T, D) -> (B, T, D).

    nGPT normalizes q and k per head after RoPE, scales them by s_qk and multiplies the scores by sqrt(K). Without QK
    norm, q and k of nGPT have length about sqrt(K / D), and a factor of D / sqrt(K) gives scores of the same spread.
    The GPT applies RMSNorm to q and k (with QK norm) and divides the scores by sqrt(K).
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.qk_norm = cfg.n_head, cfg.kv_heads, cfg.qk_norm
        self.rotate, self.norm_eps = ROPE_KINDS[cfg.rope], cfg.norm_eps
        kv_width = cfg.kv_heads * cfg.head_dim
        self.query = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.qkv_bias)
        self.key = nn.Linear(cfg.n_embd, kv_width, bias=cfg.qkv_bias)
        self.value = nn.Linear(cfg.n_embd, kv_width, bias=cfg.qkv_bias)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        scaled = cfg.on_sphere and cfg.qk_norm
        self.s_qk = Scale(cfg.n_embd, init=1.0, scale=cfg.stored_scale or 1.0) if scaled else None
        default = cfg.head_dim**0.5 if scaled else cfg.head_dim**-0.5 * (cfg.n_embd if cfg.on_sphere else 1)
        temperature = attention_temperature(cfg.rope_scaling, cfg.rope_factor)
        self.softmax_scale = (cfg.softmax_scale or default) * temperature
        self.use_cpu_kernel = False  # set by `GPT.compile_parts`

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        head_weights: Tensor | None = None,
        cache: KVCache | None = None,
        values: ValueResidual | None = None,
    ) -> Tensor:
        """Attends over the cached tokens and x, and appends x to the `cache`. `cos` and `sin` are (T, K / 2)."""
        q, k, v = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))  # (B, H or G, T, K)
        if values is not None:
            v = values.mix(self.layer, v)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if self.s_qk is not None:
            # The paper scales both q and k by s_qk. Scaling q by s_qk^2 is equivalent, also if heads share keys.
            q, k = self.s_qk().square().view(self.n_head, 1, -1) * l2_normalize(q), l2_normalize(k)
        elif self.qk_norm:
            q, k = rms_norm(q, self.norm_eps), rms_norm(k, self.norm_eps)
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
        """Returns causal softmax(scale * q k^T) v, (B, H, T, K), for queries that follow `past` cached tokens."""
        if self.use_cpu_kernel and not past and q.shape[2] <= MAX_TOKENS:
            inputs = (part.transpose(1, 2).float() for part in (q, k, v))  # (B, T, H or G, K), contiguous
            return causal_attention(*inputs, self.softmax_scale)[0].transpose(1, 2)
        bfloat16_is_slow = q.device.type == "cpu" and v.dtype == torch.bfloat16 and k.shape[2] <= FLOAT32_TOKENS
        dtype = torch.float32 if bfloat16_is_slow else v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        mask = None
        if past:  # which keys each new query may attend to
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(diagonal=past)
        scale, gqa = self.softmax_scale, self.n_kv_head != self.n_head
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past, scale=scale, enable_gqa=gqa)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.query.in_features // self.n_head)).transpose(1, 2)


class MLP(nn.Module):
    """MLP with SwiGLU, `u * silu(gate)`, or `relu(u)^2`, (B, T, D) -> (B, T, D).

    nGPT scales the hidden units by s_uv * sqrt(D), since silu is almost linear for a dot product of unit vectors.
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
        """Returns (B, T, D) for a stream x (B, T, D)."""
        scale = None if self.s_uv is None else self.s_uv() * self.gain
        # (B, T, F), or (B, T, 2F) with the gate in the second half. Scaling the weight is cheaper than the output.
        hidden = self.up(x) if scale is None else F.linear(x, self.up.weight * scale[:, None])
        if self.gated:
            u, gate = hidden.chunk(2, dim=-1)
            return self.down(u * F.silu(gate))
        return self.down(F.relu(hidden).square())
