"""Sums the loss over blocks of the evaluation text, from which the uncertainty of that text is estimated.

A block is a document, or a run of consecutive tokens where documents are not marked, since the losses of neighboring
tokens are correlated. Differences between two models on the same text can be resampled over its blocks.
"""

from typing import Any

import numpy as np

MIN_DOCUMENTS = 20  # with fewer, blocks are runs of tokens
MIN_BLOCKS, MAX_BLOCKS = 20, 100  # runs of tokens; documents beyond MAX_BLOCKS are joined with their neighbors
RUN_LENGTH = 256  # tokens of a run, unless the text is so short or long that the limits above change it

EvalBlocks = dict[str, Any]  # `kind` (documents or tokens), and lists of the `tokens` and `nats` of each block


def block_numbers(n_tokens: int, starts: np.ndarray | None) -> tuple[str, np.ndarray]:
    """Returns the kind of blocks and the block of each token, (n_tokens,), counted from 0.

    `starts` (n_tokens,) marks the tokens that start a document; None if this is not known.
    """
    documents = None if starts is None else np.cumsum(starts) - int(starts[0])
    if documents is not None and (count := int(documents[-1]) + 1) >= MIN_DOCUMENTS:
        return "documents", documents * min(count, MAX_BLOCKS) // count
    length = min(RUN_LENGTH, n_tokens // MIN_BLOCKS)
    length = max(1, length, -(-n_tokens // MAX_BLOCKS))
    return "tokens", np.arange(n_tokens) // length


def sum_over_blocks(losses: np.ndarray, starts: np.ndarray | None) -> EvalBlocks | None:
    """Sums the losses of consecutive tokens, (n_tokens,) in nats, over blocks; None if one is not finite."""
    if not np.isfinite(losses).all():
        return None
    kind, block = block_numbers(len(losses), starts)
    nats = np.bincount(block, weights=losses)
    return {"kind": kind, "tokens": np.bincount(block).tolist(), "nats": [round(x, 4) for x in nats.tolist()]}
