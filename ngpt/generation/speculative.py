"""Speculative decoding: a small model drafts several tokens, and one pass of the large one accepts or corrects them.

Source: Leviathan, Kalman, Matias, arXiv 2211.17192, algorithm 1. The tokens have the distribution of the large model
alone, and greedy ones are the same tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ngpt.generation.batch import BatchDecoder, StepResult, distributions, results_of
from ngpt.generation.contexts import Contexts
from ngpt.generation.sampling import draw, uniform_numbers
from ngpt.model.gpt import GPT


class SpeculativeDecoder(BatchDecoder):
    """A `BatchDecoder` whose `step` returns one token or more of each request, those of one request in order.

    Attributes:
        proposed, accepted: how many tokens the draft has proposed so far, and how many of them were accepted.
    """

    def __init__(
        self,
        model: GPT,
        draft: GPT,
        *,
        slots: int,
        draft_tokens: int = 4,
        dtype: str = "float32",
        vocab_size: int | None = None,
    ) -> None:
        """Allocates the caches of both models.

        Args:
            draft: a cheaper model with the same tokenizer; its block_size may differ.
            draft_tokens: proposed per step, at least 1.
            slots, dtype, vocab_size: as in `BatchDecoder`.
        """
        sizes = [len(each.wte.weight) for each in (model, draft)]
        if vocab_size is None and sizes[0] != sizes[1]:
            raise ValueError(f"the draft has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}")
        if draft_tokens < 1:
            raise ValueError(f"draft_tokens must be at least 1, got {draft_tokens}")
        super().__init__(model, slots=slots, dtype=dtype, vocab_size=vocab_size, spare=draft_tokens)
        self._draft = Contexts(draft, slots, dtype=dtype, spare=draft_tokens)
        self.draft_tokens, self.proposed, self.accepted = draft_tokens, 0, 0

    @property
    def acceptance_rate(self) -> float | None:
        """The share of proposed tokens that were accepted; None before the first."""
        return self.accepted / self.proposed if self.proposed else None

    @torch.no_grad()
    def step(self) -> list[StepResult]:
        """Returns the next tokens of every request, at least one each; an empty list without requests."""
        if not self._requests:
            return []
        # As many numbers for each request in each step, so that its tokens do not depend on the others.
        numbers = torch.stack([uniform_numbers(2 * self.draft_tokens + 1, each.generator) for each in self._requests])
        drawing, accepting = numbers[:, : self.draft_tokens + 1], numbers[:, self.draft_tokens + 1 :]
        proposed, q = self._propose(drawing)
        logits = self._contexts.logits(proposed, read=self.draft_tokens + 1)[..., : self.vocab_size]
        p = torch.stack([distributions(each, self._requests) for each in logits.unbind(1)], dim=1)
        ids = torch.tensor(proposed, device=p.device)
        ratio = _of_tokens(p[:, :-1], ids) / _of_tokens(q, ids)
        limits = torch.tensor(self._limits(), device=p.device)
        counts = torch.minimum((accepting.to(p.device) < ratio).long().cumprod(1).sum(1), limits)
        last = last_tokens(p, q, counts, counts < limits, drawing[:, -1])
        self.proposed += int(limits.sum())
        self.accepted += int(counts.sum())
        return self._results(proposed, counts.tolist(), last.tolist(), logits)

    def _all_contexts(self) -> Sequence[Contexts]:
        return [self._contexts, self._draft]

    def _limits(self) -> list[int]:
        """How many proposed tokens count in each row: those that both models saw within their block_size."""
        rows = zip(self._contexts.tokens, self._draft.tokens, strict=True)
        target, draft = self._contexts.block_size, self._draft.block_size
        limits = [min(target - len(own), draft - len(drafted) + 1) for own, drafted in rows]
        return [min(self.draft_tokens, limit) for limit in limits]

    def _propose(self, numbers: Tensor) -> tuple[list[list[int]], Tensor]:
        """Returns the draft's tokens for each row, and the distributions (rows, draft_tokens, V) they come from."""
        proposed: list[list[int]] = [[] for _ in self._requests]
        found = []
        for index in range(self.draft_tokens):
            # At first the cache of the draft may lack two tokens: its own last one, if it was accepted, and the next.
            logits = self._draft.logits(proposed, read=1 if index else 2)[:, -1, : self.vocab_size]
            found.append(distributions(logits, self._requests))
            for row, token in zip(proposed, draw(found[-1], numbers[:, index]).tolist(), strict=True):
                row.append(token)
        return proposed, torch.stack(found, dim=1)

    def _results(
        self, proposed: list[list[int]], counts: list[int], last: list[int], logits: Tensor
    ) -> list[StepResult]:
        """Adds the accepted and the last tokens to the contexts, and returns them as results."""
        results: list[StepResult] = []
        for row, request in enumerate(self._requests):
            tokens = [*proposed[row][: counts[row]], last[row]]
            ids = torch.tensor(tokens, device=logits.device)
            results += results_of(ids, logits[row, : len(ids)], [request] * len(ids))
            self._contexts.extend(row, tokens, cached=counts[row])
            self._draft.extend(row, tokens, cached=min(counts[row], self.draft_tokens - 1))  # it never reads its last
        return results


def last_tokens(p: Tensor, q: Tensor, counts: Tensor, refused: Tensor, numbers: Tensor) -> Tensor:
    """Draws the token after the `counts` (B,) accepted ones: from max(0, p - q) where one was `refused`, else from p.

    p is (B, T + 1, V), q (B, T, V), `refused` (B,) bool, and `numbers` (B,) are uniform.
    """
    rows = torch.arange(len(p), device=p.device)
    wanted = p[rows, counts]
    rest = (wanted - q[rows, counts.clamp(max=q.shape[1] - 1)]).clamp(min=0)
    refused = refused & (rest.sum(-1) > 0)  # 0 if p equals q up to rounding
    return draw(torch.where(refused[:, None], rest, wanted), numbers)


def _of_tokens(p: Tensor, ids: Tensor) -> Tensor:
    """Returns the probabilities (B, T) of the tokens `ids` (B, T) in distributions p (B, T, V)."""
    return p.gather(-1, ids[..., None])[..., 0]
