"""A model prepared for decoding: products of weights and learned scales are computed once, sequences differ in length.

Everything but attention is the model's own code, so a new residual rule needs nothing here.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.generation.cache import SlotCache
from ngpt.model.gpt import GPT, PreNormBlock, SphereBlock
from ngpt.model.layers import FLOAT32_TOKENS, MLP, Attention, ValueResidual
from ngpt.model.norm import l2_normalize, rms_norm
from ngpt.system.device import DTYPES, mixed_precision


@dataclass(frozen=True)
class Span:
    """The new tokens of one forward pass, and what they attend to."""

    cache: SlotCache
    index: Tensor  # (rows * T,) int64, where the keys and values of the new tokens go
    rows: int
    length: int  # cached tokens that are read; 0: the new tokens attend to each other only
    mask: Tensor | None = None  # (rows, 1, T, length) float, added to the scores; None: all entries are attended to


class DecodingAttention(nn.Module):
    """`Attention` over a `SlotCache`, with one product for queries, keys and values."""

    def __init__(self, source: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = source.layer, source.n_head, source.n_kv_head
        self.rotate, self.norm_eps, self.qk_norm = source.rotate, source.norm_eps, source.qk_norm
        self.softmax_scale, self.out = source.softmax_scale, source.out
        parts = (source.query, source.key, source.value)
        weights: list[Tensor] = [part.weight for part in parts]
        self.weight = torch.cat(weights).to(dtype)
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        self.bias = torch.cat(biases).to(dtype) if biases else None
        self.q_scale = None if source.s_qk is None else source.s_qk().square().view(self.n_head, -1)
        self.head_dim = source.query.in_features // self.n_head

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        head_weights: Tensor | None = None,
        cache: Span | None = None,
        values: ValueResidual | None = None,
    ) -> Tensor:
        """Attends from x (rows, T, D) as the span `cache` says; `cos` and `sin` are (rows, T, 1, K / 2)."""
        assert cache is not None
        heads = F.linear(x, self.weight, self.bias).unflatten(-1, (-1, self.head_dim))  # (rows, T, H + 2 G, K)
        qk, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        if values is not None:
            v = values.mix(self.layer, v)
        qk = self.rotate(qk, cos, sin)
        if self.q_scale is not None:
            qk = l2_normalize(qk)
        elif self.qk_norm:
            qk = rms_norm(qk, self.norm_eps)
        q, k = qk.split([self.n_head, self.n_kv_head], dim=2)
        if self.q_scale is not None:
            q = q * self.q_scale
        k, v = k.to(cache.cache.dtype), v.to(cache.cache.dtype)
        cache.cache.write(self.layer, cache.index, k.flatten(0, 1), v.flatten(0, 1))
        with torch.autocast(q.device.type, enabled=False):
            mixed = self._attend(q, k, v, cache)
        if head_weights is not None:
            mixed = mixed * head_weights.view(-1, 1).to(mixed.dtype)
        return self.out(mixed.flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        """Returns the mixed values, (rows, T, H, K)."""
        if span.length:
            k, v = span.cache.read(self.layer, span.rows, span.length)
        on_cpu = q.device.type == "cpu" and v.dtype == torch.bfloat16 and k.shape[1] <= FLOAT32_TOKENS
        dtype = torch.float32 if on_cpu else v.dtype
        q, k, v = q.to(dtype), k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
        new, mask = q.shape[1], None if span.mask is None else span.mask.to(dtype)
        if span.length and new == 1:  # the heads that share keys are like several queries
            q = q.unflatten(2, (self.n_kv_head, -1)).squeeze(1)  # (rows, G, H / G, K)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)
            return mixed.flatten(1, 2)[:, None]
        how = {"is_causal": not span.length, "scale": self.softmax_scale, "enable_gqa": self.n_head != self.n_kv_head}
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, **how).transpose(1, 2)


class DecodingModel(nn.Module):
    """The forward passes of a decoder: `encode` fills the cache with prompts, `logits` continues sequences.

    It has its own copy of the weights that learned scales multiply, and shares the others with the `model` if the dtype
    is float32. Later training of the model needs a new one.
    """

    def __init__(self, model: GPT, dtype: str) -> None:
        super().__init__()
        self.cfg, self.dtype, self._name = model.cfg, DTYPES[dtype], dtype
        # The memo of `deepcopy`: what is in it counts as copied, so the copy of the blocks shares the weights.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.vocab_size = len(model.wte.weight)
        self.blocks = copy.deepcopy(model.blocks, shared)
        self.wte, self.normalizer, self.final_norm = model.wte, model.normalizer, model.final_norm
        self.cos, self.sin = model.cos[:, None], model.sin[:, None]  # (block_size, 1, K / 2)
        self.last_position = model.cfg.block_size - 1
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, SphereBlock | PreNormBlock)
                attention = DecodingAttention(block.attention, self.dtype)
                attention.out.weight = self._converted(attention.out.weight)
                block.register_module("attention", attention)
                self._fold(block.mlp)
            head = model.head_weight if model.s_z is None else model.head_weight * model.s_z()[:, None]
            self.head = self._converted(head)
        self.blocks.eval().requires_grad_(False)

    def _fold(self, mlp: MLP) -> None:
        scale = None if mlp.s_uv is None else mlp.s_uv() * mlp.gain
        mlp.up.weight = self._converted(mlp.up.weight if scale is None else mlp.up.weight * scale[:, None])
        mlp.down.weight = self._converted(mlp.down.weight)
        mlp.s_uv = None

    def _converted(self, weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.detach().to(self.dtype), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def stream(self, idx: Tensor, positions: Tensor, span: Span) -> Tensor:
        """Returns the residual stream (rows, T, D) after the last block, for tokens and positions (rows, T).

        Results at positions from block_size on are meaningless; a decoder ignores them.
        """
        x = self.wte(idx)
        r = None if self.normalizer is None else self.normalizer.start(x)
        if self.cfg.embedding_norm and not self.cfg.on_sphere:
            x = rms_norm(x, self.cfg.norm_eps)
        values = ValueResidual(self.cfg.value_residual) if self.cfg.value_residual else None
        places = positions.clamp(max=self.last_position)
        cos, sin = self.cos[places], self.sin[places]
        for block in self.blocks:
            x, r = block(x, cos, sin, normalizer=self.normalizer, r=r, cache=span, values=values)
        return x

    def encode(self, idx: Tensor, rows: Tensor, cache: SlotCache) -> None:
        """Fills rows (B,) of the cache with the tokens (B, T), from position 0 on.

        Shorter sequences may be padded at the end: causal attention never looks there, and their next tokens overwrite
        the entries.
        """
        positions = torch.arange(idx.shape[1], device=idx.device).expand(idx.shape)
        index = (rows[:, None] * cache.size + positions).flatten()
        with mixed_precision(idx.device, self._name):
            self.stream(idx, positions, Span(cache, index, len(rows), 0))

    def logits(self, idx: Tensor, positions: Tensor, span: Span) -> Tensor:
        """Returns the float32 logits (rows, T, V) of tokens (rows, T) at these positions of the first rows."""
        with mixed_precision(idx.device, self._name):
            x = self.stream(idx, positions, span)
            x = x if self.final_norm is None else self.final_norm(x)
            logits = F.linear(x, self.head).float()
        return logits if self.cfg.softcap is None else self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)
