"""Text in and out: prompts become tokens, and tokens the continuations of texts."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ngpt.config.base import ConfigError
from ngpt.data.tokens.end_tokens import end_tokens
from ngpt.data.tokens.tokenizer import Tokenizer
from ngpt.generation.batch import BatchDecoder
from ngpt.generation.plain import generate_tokens
from ngpt.generation.sampling import Sampling
from ngpt.model.gpt import GPT
from ngpt.system.device import DTYPES, mixed_precision

REPLACEMENT = "\ufffd"  # decoded from bytes that are not, or not yet, valid UTF-8
CACHE_BYTES = 2**30  # at most, of the cache for several continuations
MOST_SLOTS = 64  # more rows hardly make a step more efficient


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a prompt. An empty one becomes the document separator token, or a newline if the tokenizer has none."""
    try:
        text.encode()
    except UnicodeEncodeError:  # the command line held bytes that are not UTF-8
        raise ConfigError(f"the prompt {text!r} is not UTF-8 text") from None
    if not text and tokenizer.document_separator is not None:
        return [tokenizer.document_separator]
    ids = np.asarray(tokenizer.encode(text or "\n")).tolist()
    if not ids:
        raise ConfigError(f"{tokenizer.name} has no tokens for the prompt {text!r}: give another")
    return ids


class Continuation:
    """One continuation of a prompt, decoded while it is generated.

    A character that spans several tokens is added to the text with its last token. Some tokenizers decode the start of
    a text differently, so new tokens are decoded together with those decoded last.
    """

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, title: str = "") -> None:
        self.prompt, self.unprinted, self.ended = prompt, title, False
        self._decode, self._ends = tokenizer.decode, end_tokens(tokenizer)
        self._decoded, self._pending = prompt[-1:], list[int]()  # tokens

    def add(self, token: int) -> None:
        """Adds a token. One that ends a text ends this one, too; later tokens are ignored."""
        if token in self._ends:
            self.end()
        elif not self.ended:
            self._pending.append(token)
            self._decode_pending(allow_incomplete=False)

    def end(self) -> None:
        """Ends the text. Bytes of an incomplete character become U+FFFD."""
        if not self.ended:
            self._decode_pending(allow_incomplete=True)
            self.ended = True

    def _decode_pending(self, *, allow_incomplete: bool) -> None:
        text = self._decode([*self._decoded, *self._pending])
        if allow_incomplete or not text.endswith(REPLACEMENT):
            self.unprinted += text[len(self._decode(self._decoded)) :]
            self._decoded, self._pending = self._pending, []


def continue_all(
    model: GPT,
    tokenizer: Tokenizer,
    continuations: Sequence[Continuation],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int | None,
    dtype: str,
    cache: bool = True,
    decoder: BatchDecoder | None = None,
) -> Iterator[int]:
    """Generates all continuations; after each step, yields the number of tokens that it has added to them.

    Prompts of any lengths are decoded together, as many as the cache has slots for; when a text ends, the next one
    takes its place. The continuation at index i draws its tokens with `seed_of(seed, i)`, so it does not depend on the
    others. Without a `cache` they are generated one by one. A `decoder` of the model can be given; `dtype` is then its.
    """
    if not cache:
        yield from _continue_without_cache(model, tokenizer, continuations, max_tokens, sampling, seed, dtype)
        return
    if not continuations:
        return
    if decoder is None:
        slots = min(len(continuations), slots_for(model, dtype))
        decoder = BatchDecoder(model, slots=slots, dtype=dtype, vocab_size=tokenizer.vocab_size)
    waiting = list(enumerate(continuations))[::-1]
    running: dict[int, Continuation] = {}
    left: dict[int, int] = {}  # tokens that each slot may still generate
    while waiting or running:
        while waiting and decoder.free_slots:
            index, continuation = waiting.pop()
            slot = decoder.add(continuation.prompt, sampling, seed_of(seed, index))
            running[slot], left[slot] = continuation, max_tokens
        added = 0
        for result in decoder.step():
            if result.slot not in running:  # a decoder may return tokens beyond the end of a text
                continue
            running[result.slot].add(result.token)
            left[result.slot] -= 1
            added += 1
            if running[result.slot].ended or not left[result.slot]:
                running.pop(result.slot).end()
                decoder.free(result.slot)
        yield added


def _continue_without_cache(
    model: GPT,
    tokenizer: Tokenizer,
    continuations: Sequence[Continuation],
    max_tokens: int,
    sampling: Sampling,
    seed: int | None,
    dtype: str,
) -> Iterator[int]:
    device = next(model.parameters()).device
    for index, continuation in enumerate(continuations):
        generator, own_seed = torch.Generator(), seed_of(seed, index)
        if own_seed is None:
            generator.seed()
        else:
            generator.manual_seed(own_seed)
        how = {"generator": generator, "cache": False, "vocab_size": tokenizer.vocab_size}
        prompt = torch.tensor([continuation.prompt], device=device)
        with mixed_precision(device, dtype):
            for token in generate_tokens(model, prompt, max_tokens, **dict(sampling), **how):
                continuation.add(int(token))
                yield 1
                if continuation.ended:
                    break
        continuation.end()
        yield 0


def seed_of(seed: int | None, index: int) -> int | None:
    """Returns the seed of the continuation at `index`: the first one has `seed` itself, the others hashes of both."""
    if seed is None or index == 0:
        return seed
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def slots_for(model: GPT, dtype: str) -> int:
    """Returns how many sequences are worth decoding together, within `CACHE_BYTES`."""
    cfg = model.cfg
    per_slot = 2 * cfg.n_layer * cfg.block_size * cfg.kv_heads * cfg.head_dim * DTYPES[dtype].itemsize
    return max(1, min(MOST_SLOTS, CACHE_BYTES // per_slot))
