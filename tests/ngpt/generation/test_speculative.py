"""Speculative decoding: greedy tokens are those of the large model, and sampled ones have its distribution."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from ngpt.config.base import build
from ngpt.generation.batch import BatchDecoder
from ngpt.generation.sampling import Sampling
from ngpt.generation.speculative import SpeculativeDecoder
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT

VOCAB = 6
GREEDY = Sampling(temperature=0.0)


def model_of(*, seed: int, noise: float = 0.0, **changes: Any) -> GPT:
    """A model of random weights; those of one seed and different `noise` are similar."""
    size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": VOCAB, "logit_scale": 3.0}
    model = GPT(build(ModelConfig, size | changes), seed=seed).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=draw)
    return model


def generated(decoder: BatchDecoder, prompts: list[list[int]], count: int, sampling: Sampling) -> list[list[int]]:
    """At least `count` tokens for each prompt, cut to `count`; the request at index i has the seed i."""
    slots = {decoder.add(prompt, sampling, seed): seed for seed, prompt in enumerate(prompts)}
    found: list[list[int]] = [[] for _ in prompts]
    while min(map(len, found)) < count:
        for result in decoder.step():
            found[slots[result.slot]].append(result.token)
    for slot in slots:
        decoder.free(slot)
    return [tokens[:count] for tokens in found]


PROMPTS = [[1, 2, 3], [4], [0, 1] * 6, [5, 5]]


@pytest.mark.parametrize(
    ("draft", "draft_tokens"),
    [
        ({"seed": 1, "noise": 0.1}, 4),
        ({"seed": 2, "n_layer": 1}, 1),
        ({"seed": 1, "noise": 0.05, "block_size": 5}, 4),
        ({"seed": 1, "noise": 0.05, "block_size": 40}, 3),
    ],
)
def test_greedy_tokens_are_those_of_the_large_model(draft: dict[str, Any], draft_tokens: int) -> None:
    model = model_of(seed=1)
    decoder = SpeculativeDecoder(model, model_of(**draft), slots=4, draft_tokens=draft_tokens)
    expected = generated(BatchDecoder(model, slots=4), PROMPTS, 30, GREEDY)
    assert generated(decoder, PROMPTS, 30, GREEDY) == expected
    assert 0 < decoder.accepted < decoder.proposed


def test_a_draft_equal_to_the_model_is_always_accepted() -> None:
    model = model_of(seed=1)
    for sampling in (GREEDY, Sampling(temperature=0.9)):
        decoder = SpeculativeDecoder(model, model, slots=4, draft_tokens=3)
        assert decoder.acceptance_rate is None
        generated(decoder, PROMPTS, 40, sampling)
        assert decoder.acceptance_rate == 1 and decoder.proposed > 100


def test_a_request_draws_the_same_tokens_whoever_else_is_in_the_batch() -> None:
    model, draft, sampling = model_of(seed=1), model_of(seed=1, noise=0.1), Sampling(top_p=0.95)
    together = generated(SpeculativeDecoder(model, draft, slots=4), PROMPTS, 40, sampling)
    assert generated(SpeculativeDecoder(model, draft, slots=1), PROMPTS[:1], 40, sampling) == together[:1]
    assert len(set(map(tuple, together))) == 4


def exact(model: GPT, prompt: list[int], count: int, temperature: float) -> np.ndarray:
    """The probability of each sequence of `count` tokens after the prompt, in lexicographic order."""
    tails = list(itertools.product(range(VOCAB), repeat=count))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tail] for tail in tails]))[:, -count - 1 : -1].double()
    p = (logits / temperature).softmax(-1).numpy()
    picked = [[p[row, place, token] for place, token in enumerate(tail)] for row, tail in enumerate(tails)]
    return np.prod(picked, axis=1)


@pytest.mark.parametrize("draft", [{"seed": 1, "noise": 0.1}, pytest.param({"seed": 2}, marks=pytest.mark.slow)])
def test_sampled_tokens_have_the_distribution_of_the_large_model(draft: dict[str, Any]) -> None:
    """Sequences of three tokens, so that every place of a step with two proposed tokens counts."""
    model, other, n, temperature = model_of(seed=1), model_of(**draft), 4_000, 1.3
    decoder = SpeculativeDecoder(model, other, slots=n, draft_tokens=2)
    drawn = np.array(generated(decoder, [[3, 1]] * n, 3, Sampling(temperature=temperature)))
    counts = np.bincount(drawn @ [VOCAB**2, VOCAB, 1], minlength=VOCAB**3)
    expected, wrong = (exact(each, [3, 1], 3, temperature) * n for each in (model, other))
    assert decoder.acceptance_rate is not None and 0.3 < decoder.acceptance_rate < 0.97
    assert pvalue(counts, expected) > 0.001
    assert pvalue(counts, wrong) < 1e-9  # the draft alone is far from it
    assert np.abs(counts - expected).sum() / (2 * n) < 0.1  # total variation; the noise of VOCAB^3 cells is about 0.07


def pvalue(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square test; cells with fewer than five expected counts are one."""
    rare = expected < 5
    merged = [np.append(values[~rare], values[rare].sum()) for values in (counts, expected)]
    return float(scipy.stats.chisquare(merged[0], merged[1]).pvalue)


def test_log_probabilities_of_accepted_tokens_are_those_of_the_model() -> None:
    model = model_of(seed=1)
    decoder = SpeculativeDecoder(model, model_of(seed=1, noise=0.05), slots=1, draft_tokens=3)
    decoder.add([1, 2], GREEDY, logprobs=2)
    context = [1, 2]
    for result in [*decoder.step(), *decoder.step()]:
        with torch.no_grad():
            scores = model(torch.tensor([context]))[0, -1].log_softmax(-1)
        assert result.logprob == pytest.approx(float(scores.max()), abs=1e-5)
        assert [token for token, _ in result.top_logprobs] == scores.topk(2).indices.tolist()
        context.append(result.token)


def test_a_draft_with_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the draft has a vocabulary of 7 tokens, the model one of 6"):
        SpeculativeDecoder(model_of(seed=1), model_of(seed=1, vocab_size=7), slots=1)
    with pytest.raises(ValueError, match="draft_tokens must be at least 1, got 0"):
        SpeculativeDecoder(model_of(seed=1), model_of(seed=1), slots=1, draft_tokens=0)
