"""The plain loop of generation: one batch of prompts of equal length, one token after another."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ngpt.config.base import build
from ngpt.generation.sampling import Sampling, draw, probabilities, uniform_numbers
from ngpt.model.gpt import GPT
from ngpt.model.layers import KVCache


@torch.no_grad()
def generate_tokens(
    model: GPT,
    idx: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cache: bool = True,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,) int64, `max_tokens` times.

    A prompt longer than `block_size` is truncated to its last tokens. When the context is full, its older half is
    dropped and the newer half is encoded again, with or without a cache. Dropping tokens from the cache is not enough,
    because the keys and values of later tokens depend on them.

    Args:
        model: in evaluation mode.
        idx: the prompts, (B, T) int64 with T >= 1, on the model's device.
        temperature, top_k, top_p: see `probabilities`; ConfigError if one is out of range.
        generator: a CPU generator samples the same tokens on every device.
        cache: whether to cache keys and values. Otherwise each token recomputes the whole context.
        vocab_size: ids at or above it are never sampled, for a tokenizer smaller than the model's vocabulary.
    """
    sampling = build(Sampling, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
    size = model.cfg.block_size
    context, new, kv_cache = idx[:, -size:], idx, None
    for _ in range(max_tokens):
        if context.shape[1] > size:
            context, kv_cache = context[:, -max(1, size // 2) :], None
        if kv_cache is None:
            kv_cache, new = KVCache(model.cfg, len(idx), device=idx.device) if cache else None, context
        x = model.features(new, kv_cache)[:, -1:]  # only the last position goes through the head
        logits = model.logits(x)[:, -1, :vocab_size]
        if sampling.is_greedy:
            sampled = logits.argmax(-1)
        else:
            sampled = draw(probabilities(logits, sampling), uniform_numbers(len(idx), generator)).to(idx.device)
        new = sampled[:, None]
        yield sampled
        context = torch.cat([context, new], dim=1)
