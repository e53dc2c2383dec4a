"""The contexts of several sequences under one model: their tokens, and what a cache holds of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ngpt.generation.cache import SlotCache
from ngpt.generation.decoding_model import DecodingModel, Span
from ngpt.kernels.compile import check_compiler, compile_for
from ngpt.model.gpt import GPT

ENCODED_TOKENS = 8192  # at most, with padding, in one pass over several prompts
SHORTEST = 128  # entries that compiled code reads at least


class Contexts:
    """One context per row, in the first rows of a cache, and the passes of a model over their last tokens.

    Rows in use stay together, so that a pass reads the cache without gathering rows.
    """

    def __init__(self, model: GPT, rows: int, *, dtype: str, spare: int = 0, compiled: bool = False) -> None:
        """Allocates a cache.

        Args:
            spare: how many tokens a context may exceed block_size by for a moment.
            compiled: compile the pass over one new token, for all rows and a few lengths.
        """
        self.model, self.block_size = DecodingModel(model, dtype), model.cfg.block_size
        device = self.model.device
        size = self.block_size + spare + bool(spare)  # the last entry takes padding in front of a short context
        self.cache = SlotCache(model.cfg, rows, size, device=device, dtype=self.model.dtype)
        self.tokens: list[list[int]] = []
        self.cached: list[int] = []  # how many tokens of each context the cache holds
        self._first = torch.arange(rows, device=device)[:, None] * size  # entry of position 0 in each row
        self._columns = torch.arange(size, device=device)
        self._compiled = compiled
        if compiled:
            check_compiler(device)

    def append(self, tokens: Sequence[int]) -> None:
        """Adds a row with this context, of which only the last block_size tokens are used."""
        self.tokens.append(list(tokens[-self.block_size :]))
        self.cached.append(0)

    def remove(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        tokens, cached = self.tokens.pop(), self.cached.pop()
        if row < len(self.tokens):
            self.cache.move(len(self.tokens), row, cached)
            self.tokens[row], self.cached[row] = tokens, cached

    def extend(self, row: int, tokens: Sequence[int], *, cached: int = 0) -> None:
        """Adds tokens to a context. If it is full, its older half is dropped, as in `generate_tokens`.

        Args:
            cached: how many of the tokens the last pass has read, as proposed ones.
        """
        context = self.tokens[row]
        self.cached[row] += cached
        for token in tokens:
            context.append(token)
            if len(context) > self.block_size:
                del context[: len(context) - max(1, self.block_size // 2)]
                self.cached[row] = 0

    def logits(self, proposed: Sequence[Sequence[int]] | None = None, *, read: int = 1) -> Tensor:
        """Returns float32 logits (rows, T, V) after each of the last T = `read` tokens of every context.

        `proposed` tokens, as many for each row, follow the contexts without becoming part of them; results beyond
        block_size are meaningless. A context of which the cache holds too little is encoded first.
        """
        added, rows = len(proposed[0]) if proposed else 0, len(self.tokens)
        again = max(0, read - added)  # tokens of the contexts themselves that this pass reads
        self._encode([row for row, tokens in enumerate(self.tokens) if self.cached[row] < len(tokens) - again])
        tokens, positions = [], []
        for row, context in enumerate(self.tokens):
            known = context + list(proposed[row]) if proposed else context
            missing = max(0, read - len(known))
            tokens.append([0] * missing + known[-read:])
            places = range(max(0, len(known) - read), len(known))
            positions.append([self.cache.size - 1] * missing + list(places))
            self.cached[row] = len(context)
        if self._compiled and read == 1:
            return self._compiled_logits(tokens, positions)[:rows]
        device = self.model.device
        places = torch.tensor(positions, device=device)
        length = max(row[-1] for row in positions) + 1
        mask = None
        if read > 1 or any(row[-1] + 1 < length for row in positions):
            mask = mask_of(self._columns[:length], places)
        span = Span(self.cache, (self._first[:rows] + places).flatten(), rows, length, mask)
        return self.model.logits(torch.tensor(tokens, device=device), places, span)

    def _compiled_logits(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Returns logits of all rows of the cache; those without a context get arbitrary ones."""
        unused = self.cache.rows - len(tokens)
        length = bucket(max(row[0] for row in positions) + 1, self.block_size)
        device, cfg = self.model.device, self.model.cfg
        idx, places = (torch.tensor(part + [[0]] * unused, device=device) for part in (tokens, positions))
        key = ("generation", repr(cfg), self.cache.rows, self.cache.size, length, self.model.dtype, str(device))
        step = compile_for(key, masked_logits)
        return step(self.model, self.cache, idx, places, self._first, self._columns, length)

    def _encode(self, rows: list[int]) -> None:
        """Fills these rows of the cache with all tokens of their contexts but the last."""
        device = self.model.device
        for group in groups([(row, self.tokens[row][:-1]) for row in rows]):
            length = len(group[0][1])
            padded = torch.tensor([tokens + [0] * (length - len(tokens)) for _, tokens in group], device=device)
            numbers = torch.tensor([row for row, _ in group], device=device)
            self.model.encode(padded, numbers, self.cache)


def mask_of(columns: Tensor, positions: Tensor) -> Tensor:
    """Returns what is added to the scores, (rows, 1, T, length): -inf for entries after the position (rows, T)."""
    hidden = columns > positions[:, :, None]
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)[:, None]


def masked_logits(
    model: DecodingModel, cache: SlotCache, idx: Tensor, positions: Tensor, first: Tensor, columns: Tensor, length: int
) -> Tensor:
    """The pass over one token (rows, 1) of every row, with static shapes, for the compiler."""
    mask = mask_of(columns[:length], positions)
    return model.logits(idx, positions, Span(cache, (first + positions).flatten(), len(idx), length, mask))


def bucket(length: int, block_size: int) -> int:
    """Returns the number of entries that compiled code reads: a power of two, at least `SHORTEST`, or block_size."""
    return min(block_size, max(SHORTEST, 1 << (length - 1).bit_length()))


def groups(prompts: list[tuple[int, list[int]]]) -> list[list[tuple[int, list[int]]]]:
    """Groups prompts, given with their rows, for passes of limited size with little padding, each longest first."""
    found: list[list[tuple[int, list[int]]]] = []
    for prompt in sorted(prompts, key=lambda pair: -len(pair[1])):
        if not prompt[1]:  # a single token needs no cache
            break
        longest = len(found[-1][0][1]) if found else 0
        if not found or longest > 2 * len(prompt[1]) or longest * (len(found[-1]) + 1) > ENCODED_TOKENS:
            found.append([])
        found[-1].append(prompt)
    return found
