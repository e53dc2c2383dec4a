"""Continuous batching: requests join and leave a batch between two tokens.

decoder = BatchDecoder(model, slots=8)
slot = decoder.add(prompt_tokens, Sampling(temperature=0.8), seed=1)
for result in decoder.step():  # one token of each request
    ...
decoder.free(slot)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ngpt.generation.contexts import Contexts
from ngpt.generation.sampling import Sampling, draw, probabilities, uniform_numbers
from ngpt.model.gpt import GPT


class NoFreeSlotError(RuntimeError):
    """All slots of a decoder are taken."""


class StepResult(NamedTuple):
    """The next token of a request.

    `logprob` is its log-probability in nats under the model at temperature 1, None unless `logprobs` was asked for;
    `top_logprobs` holds the most probable tokens with theirs, best first.
    """

    slot: int
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """How the tokens of a slot are sampled and reported."""

    slot: int
    sampling: Sampling
    generator: torch.Generator
    logprobs: int | None


class BatchDecoder:
    """Decodes up to `slots` sequences together, each with its own length, sampling and random numbers.

    The tokens of a request do not depend on the other requests: it draws from its own generator, and attends to its own
    row of the cache. Only the rounding of matrix products depends on the shape of a batch, which matters where two
    tokens are equally probable up to rounding.

    A full context is treated as in `generate_tokens`: its older half is dropped, and the newer half encoded again.
    """

    def __init__(
        self,
        model: GPT,
        *,
        slots: int,
        dtype: str = "float32",
        vocab_size: int | None = None,
        compiled: bool = False,
        spare: int = 0,
    ) -> None:
        """Allocates the cache.

        Args:
            model: its weights are read now; later changes have no effect.
            slots: sequences at a time, at least 1.
            dtype: of matrix products and the cache: float32 or bfloat16.
            vocab_size: ids at or above it are never sampled; None: the model's.
            compiled: compile the step with torch.compile, at its first call and once more for each doubling of the
                length of contexts. It always computes all slots. ConfigError if there is no compiler.
            spare: for subclasses, see `Contexts`.
        """
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.slots, self.vocab_size = slots, vocab_size
        self._contexts = Contexts(model, slots, dtype=dtype, compiled=compiled, spare=spare)
        self._requests: list[Request] = []  # the request at index i has row i of the contexts
        self._free = list(range(slots))[::-1]

    @property
    def free_slots(self) -> int:
        """How many requests can be added now."""
        return len(self._free)

    def add(
        self, prompt_tokens: Sequence[int], sampling: Sampling, seed: int | None = None, *, logprobs: int | None = None
    ) -> int:
        """Adds a request and returns its slot. The next `step` encodes the prompt, together with other new ones.

        Args:
            prompt_tokens: at least one; only the last `block_size` are used.
            seed: of the request's random numbers; None draws one.
            logprobs: report the log-probability of each token, and of this many of the most probable ones.

        Raises:
            NoFreeSlotError: all slots are taken.
            ValueError: the prompt is empty, or has a token outside the model's vocabulary.
        """
        vocabulary = self._contexts.model.vocab_size
        if not prompt_tokens:
            raise ValueError("the prompt has no tokens")
        if wrong := [token for token in prompt_tokens if not 0 <= token < vocabulary]:
            raise ValueError(f"the prompt has the token {wrong[0]}; the model's vocabulary is 0 to {vocabulary - 1}")
        if not self._free:
            raise NoFreeSlotError(f"all {self.slots} slots are taken: free one, or give the decoder more")
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        slot = self._free.pop()
        self._requests.append(Request(slot, sampling, generator, logprobs))
        for contexts in self._all_contexts():
            contexts.append(prompt_tokens)
        return slot

    def free(self, slot: int) -> None:
        """Ends the request in a slot; ValueError if there is none."""
        row = next((row for row, request in enumerate(self._requests) if request.slot == slot), None)
        if row is None:
            raise ValueError(f"slot {slot} is not in use")
        last = self._requests.pop()
        if row < len(self._requests):
            self._requests[row] = last
        for contexts in self._all_contexts():
            contexts.remove(row)
        self._free.append(slot)

    @torch.no_grad()
    def step(self) -> list[StepResult]:
        """Returns the next token of every request; an empty list without requests."""
        if not self._requests:
            return []
        logits = self._contexts.logits()[:, -1, : self.vocab_size]
        tokens = sample(logits, self._requests)
        results = results_of(tokens, logits, self._requests)
        for row, result in enumerate(results):
            self._contexts.extend(row, [result.token])
        return results

    def _all_contexts(self) -> Sequence[Contexts]:
        """What the rows of requests are rows of."""
        return [self._contexts]


def distributions(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Returns the distribution (B, V) of the next token of each request, for logits (B, V)."""
    groups = _by_sampling(requests)
    if len(groups) == 1:
        return probabilities(logits, requests[0].sampling)
    p = torch.empty_like(logits)
    for sampling, rows in groups.items():
        p[rows] = probabilities(logits[rows], sampling)
    return p


def sample(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Returns the next token of each request, (B,) int64 on the device of the logits (B, V)."""
    if all(request.sampling.is_greedy for request in requests):
        return logits.argmax(-1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for sampling, rows in _by_sampling(requests).items():
        some = logits if len(rows) == len(logits) else logits[rows]
        if sampling.is_greedy:
            tokens[rows] = some.argmax(-1)
            continue
        numbers = torch.cat([uniform_numbers(1, requests[row].generator) for row in rows])
        tokens[rows] = draw(probabilities(some, sampling), numbers).to(tokens.device)
    return tokens


def _by_sampling(requests: Sequence[Request]) -> dict[Sampling, list[int]]:
    rows: dict[Sampling, list[int]] = {}
    for row, request in enumerate(requests):
        rows.setdefault(request.sampling, []).append(row)
    return rows


def results_of(tokens: Tensor, logits: Tensor, requests: Sequence[Request]) -> list[StepResult]:
    """Returns the results for the sampled tokens (B,), with log-probabilities where they were asked for."""
    found = [StepResult(request.slot, token) for request, token in zip(requests, tokens.tolist(), strict=True)]
    asked = [row for row, request in enumerate(requests) if request.logprobs is not None]
    if asked:
        scores = logits[asked].log_softmax(-1)
        best = scores.topk(min(max(requests[row].logprobs or 0 for row in asked), scores.shape[-1]))
        own = scores.gather(-1, tokens[asked, None])[:, 0].tolist()
        ids, values = best.indices.tolist(), best.values.tolist()
        for index, row in enumerate(asked):
            pairs = list(zip(ids[index], values[index], strict=True))[: requests[row].logprobs]
            found[row] = found[row]._replace(logprob=own[index], top_logprobs=tuple(pairs))
    return found
