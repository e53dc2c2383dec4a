"""Scores do not depend on the batch, and requests that share their inputs share a forward pass."""

from typing import Any

import numpy as np
import pytest
import torch

from ngpt.config.base import build
from ngpt.downstream import scoring
from ngpt.downstream.scoring import Scored, score
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from tests.helpers import numpy_gpt

VOCAB = 40
REQUESTS = [Scored(list(range(3, 3 + length)), n) for length, n in ((2, 1), (9, 4), (5, 4), (17, 16), (9, 1))]
REQUESTS += [Scored([1, 2, 3, last], 2) for last in (7, 8, 9)]  # answers to one question


@pytest.fixture(scope="module")
def model() -> GPT:
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": VOCAB, "logit_scale": 6.0}
    return GPT(build(ModelConfig, size)).eval()


def scores_of(model: GPT, **options: Any) -> list[tuple[float, bool]]:
    return [tuple(each) for each in score(model, REQUESTS, autocast=torch.autocast("cpu", enabled=False), **options)]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_each_score_is_that_of_a_float64_reference(model: GPT, batch_size: int | None) -> None:
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    for (tokens, n), (found, is_greedy) in zip(REQUESTS, scores_of(model, batch_size=batch_size), strict=True):
        logits = numpy_gpt.logits(model.cfg, weights, np.array([tokens[:-1]]))[0][-n:]
        chosen = logits[np.arange(n), tokens[-n:]]
        assert found == pytest.approx(float((chosen - np.log(np.exp(logits).sum(-1))).sum()), abs=1e-4)
        assert is_greedy == bool((logits.argmax(-1) == tokens[-n:]).all())


def test_answers_of_one_token_take_one_forward_pass_and_memory_decides_the_batch(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, shapes = scores_of(model), list[tuple[int, ...]]()
    features = GPT.features

    def short_of_memory(self: GPT, idx: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(idx.shape))
        if len(idx) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features(self, idx)

    monkeypatch.setattr(GPT, "features", short_of_memory)
    monkeypatch.setattr(scoring, "MOST_TOKENS", 96)
    done = list[int]()
    assert scores_of(model, after_batch=done.append) == [
        (pytest.approx(value, abs=1e-5), greedy) for value, greedy in expected
    ]
    fitting = [shape for shape in shapes if shape[0] <= 2]
    assert (
        sum(rows for rows, _ in fitting) == 5
    )  # of 8 requests: three differ in their last token, two in how many tokens are scored
    assert fitting[0][1] == 16 and fitting != shapes
    assert sum(done) == 8


@pytest.mark.parametrize("request_", [Scored([1], 1), Scored([1, 2], 2), Scored([1, 2], 0), Scored([1] * 18, 1)])
def test_what_cannot_be_scored_is_an_error(model: GPT, request_: Scored) -> None:
    with pytest.raises(ValueError, match="cannot score"):
        score(model, [request_], autocast=torch.autocast("cpu", enabled=False))
