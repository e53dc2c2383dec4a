"""Cuts tokens into overlapping windows in which each token is scored once: a sliding window, as for perplexities.

A window has `block_size` inputs, and starts `stride` tokens after the one before, so that each token but those of the
first window is predicted from at least `block_size - stride` tokens before it. With a stride of `block_size` windows do
not overlap (see "Perplexity of fixed-length models" in the documentation of Hugging Face's transformers).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 20  # tokens in memory at once


class Passage(NamedTuple):
    """Consecutive tokens, (N,) integers. Where one `starts`, nothing before it is context, and it ends what was before.

    The first token of a passage that starts is context only, since nothing predicts it.
    """

    tokens: np.ndarray
    starts: bool


class Window(NamedTuple):
    """Up to `block_size + 1` tokens, (T + 1,) int64, of which the last `n_scored` are scored.

    `starts` marks a window at the start of a passage that starts.
    """

    tokens: np.ndarray
    n_scored: int
    starts: bool


def windows(passages: Iterable[Passage], *, block_size: int, stride: int) -> Iterator[Window]:
    """Yields the windows of some text in order, in which each token is scored once if it has a token before it.

    The last window of a text is shorter unless it fits.
    """
    tokens, known, starts = np.empty(0, np.int64), 1, True  # of which the first `known` are not scored any more
    for passage in passages:
        if passage.starts:
            yield from _rest(tokens, known, starts)
            tokens, known, starts = np.empty(0, np.int64), 1, True
        for first in range(0, len(passage.tokens), CHUNK):
            tokens = np.concatenate([tokens, passage.tokens[first : first + CHUNK].astype(np.int64)])
            at = 0
            while at + block_size < len(tokens):
                yield Window(tokens[at : at + block_size + 1], block_size + 1 - known, starts)
                at, known, starts = at + stride, block_size + 1 - stride, False
            tokens = tokens[at:]
    yield from _rest(tokens, known, starts)


def _rest(tokens: np.ndarray, known: int, starts: bool) -> Iterator[Window]:
    """What is left at the end of a text, in a shorter window."""
    if len(tokens) > known:
        yield Window(tokens, len(tokens) - known, starts)


def take(passages: Iterable[Passage], count: int) -> Iterator[Passage]:
    """Yields passages until `count` tokens have been scored, and cuts the last one."""
    is_first = True
    for passage in passages:
        is_first = is_first or passage.starts
        tokens = passage.tokens[: count + is_first]
        yield Passage(tokens, passage.starts)
        if len(tokens):
            count -= len(tokens) - is_first
            is_first = False
        if count <= 0:
            return
