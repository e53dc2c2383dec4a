"""Scores the ends of token sequences in batches: their log-likelihood, and whether greedy decoding would produce them.

Sequences are sorted by length and padded at their end, which changes no score, because attention is causal.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ngpt.model.gpt import GPT
from ngpt.system.memory import retry_on_oom

MOST_TOKENS = 16_384  # of a batch whose size is not given, with its padding
MOST_LOGITS = 1 << 26  # numbers in memory at once


class Scored(NamedTuple):
    """Tokens of which the last `n_scored` are scored; each of these needs a token before it."""

    tokens: list[int]
    n_scored: int


class Score(NamedTuple):
    """The log-likelihood of the scored tokens in nats, and whether each of them is the most probable one."""

    loglikelihood: float
    is_greedy: bool


@torch.no_grad()
def score(
    model: GPT,
    requests: Sequence[Scored],
    *,
    autocast: torch.autocast,
    batch_size: int | None = None,
    after_batch: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Scores all requests and returns the scores in their order.

    Requests that differ in their last token only share one forward pass, such as the answers A, B, C of one question.

    Args:
        model: in evaluation mode; no request has more than `block_size + 1` tokens.
        batch_size: sequences at once; None: as many as have `MOST_TOKENS` tokens. Halved if memory runs out.
        after_batch: called after each batch with the number of requests that it scored.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        if not 0 < request.n_scored < len(request.tokens) <= model.cfg.block_size + 1:
            raise ValueError(f"cannot score {request.n_scored} of {len(request.tokens)} tokens")
        sharing.setdefault(tuple(request.tokens[:-1]), []).append(index)
    device, scores = next(model.parameters()).device, dict[int, Score]()
    # The longest come first, so that a lack of memory shows at once.
    inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
    limit = batch_size or max(1, MOST_TOKENS // len(inputs[0]) if inputs else 1)

    def halve() -> bool:
        nonlocal limit
        limit, can_shrink = max(1, limit // 2), limit > 1
        return can_shrink

    def score_next() -> tuple[int, list[int], list[Score]]:
        rows = inputs[at : at + (limit if batch_size else max(1, limit * len(inputs[0]) // len(inputs[at])))]
        members = [(row, index) for row, tokens in enumerate(rows) for index in sharing[tokens]]
        with autocast:
            found = _score_batch(model, rows, [(row, requests[index]) for row, index in members], device)
        return len(rows), [index for _, index in members], found

    at = 0
    while at < len(inputs):
        n_rows, indices, found = retry_on_oom(score_next, halve, device)
        scores |= dict(zip(indices, found, strict=True))
        at += n_rows
        after_batch(len(indices))
    return [scores[index] for index in range(len(requests))]


def _score_batch(
    model: GPT, rows: Sequence[tuple[int, ...]], requests: Sequence[tuple[int, Scored]], device: torch.device
) -> list[Score]:
    """Scores requests, each with the row of its inputs."""
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        idx[row, : len(tokens)] = torch.tensor(tokens)
    x = model.features(idx.to(device))
    places = [(row, len(each.tokens) - 1 - each.n_scored + i) for row, each in requests for i in range(each.n_scored)]
    targets = torch.tensor([token for _, each in requests for token in each.tokens[-each.n_scored :]], device=device)
    row_index, column = torch.tensor(places, device=device).T
    losses, is_greedy = [], []
    for part, goal in _chunks(x[row_index, column], targets, size=max(1, MOST_LOGITS // model.wte.num_embeddings)):
        logits = model.logits(part)
        losses.append(F.cross_entropy(logits, goal, reduction="none"))
        is_greedy.append(logits.argmax(-1) == goal)
    counts = [each.n_scored for _, each in requests]
    # Sums in float64 on the CPU, because MPS has no float64.
    nats = torch.cat(losses).cpu().double().split(counts)
    greedy = torch.cat(is_greedy).cpu().split(counts)
    return [Score(-float(loss.sum()), bool(right.all())) for loss, right in zip(nats, greedy, strict=True)]


def _chunks(x: Tensor, targets: Tensor, *, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(size), targets.split(size), strict=True)
