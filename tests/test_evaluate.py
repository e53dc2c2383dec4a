"""Validation loss and bits per byte against a float64 computation from the logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ngpt.config import build
from ngpt.data.corpora import Dataset
from ngpt.data.loader import EvalSet, eval_set
from ngpt.evaluate import evaluate
from ngpt.model import GPT, ModelConfig


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


@pytest.fixture
def model(dataset: Dataset) -> GPT:
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": dataset.vocab_size}
    return GPT(build(ModelConfig, size | {"logit_scale": 8.0}))


def test_it_is_the_mean_over_tokens_also_when_the_last_batch_is_smaller(model: GPT, dataset: Dataset) -> None:
    data = eval_set(dataset, tokens=16 * 11, batch_size=4, block_size=16)
    assert [len(idx) for idx, _ in data.batches] == [4, 4, 3]
    nats = []
    for idx, targets in data.batches:
        logits = model(idx).detach().double().numpy()
        log_total = np.log(np.exp(logits).sum(-1))
        nats.append(log_total - np.take_along_axis(logits, targets.numpy()[..., None], -1)[..., 0])
    assert dataset.token_bytes is not None
    n_bytes = sum(int(dataset.token_bytes[targets.numpy()].sum()) for _, targets in data.batches)
    total = sum(float(part.sum()) for part in nats)
    scores = evaluate(model, data, autocast=no_autocast())
    assert scores == {
        "val_loss": pytest.approx(total / (16 * 11), rel=1e-6),
        "val_bpb": pytest.approx(total / n_bytes / math.log(2), rel=1e-6),
    }


class Fixed(nn.Module):
    """Returns a given loss for each batch."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.losses = iter(losses)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return torch.tensor(next(self.losses))


def fixed(*losses: float) -> Any:
    return Fixed(*losses)


def batches(*rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(n, 5, dtype=torch.long), torch.zeros(n, 5, dtype=torch.long)) for n in rows]


def test_a_count_by_hand() -> None:
    data = EvalSet(batches=batches(3, 1), n_tokens=20, n_bytes=60, sha256="")
    scores = evaluate(fixed(2.0, 4.0), data, autocast=no_autocast())
    assert scores["val_loss"] == (15 * 2.0 + 5 * 4.0) / 20
    assert scores["val_bpb"] == pytest.approx(50 / math.log(2) / 60)


def test_without_a_tokenizer_there_are_no_bits_per_byte() -> None:
    data = EvalSet(batches=batches(1), n_tokens=5, n_bytes=None, sha256="")
    scores = evaluate(fixed(2.0), data, autocast=no_autocast())
    assert scores == {"val_loss": 2.0, "val_bpb": None}


def test_a_loss_that_is_not_a_number_makes_the_mean_not_a_number() -> None:
    data = EvalSet(batches=batches(1, 1), n_tokens=10, n_bytes=10, sha256="")
    scores = evaluate(fixed(2.0, math.nan), data, autocast=no_autocast())
    assert all(math.isnan(score) for score in scores.values() if score is not None)


def test_uniform_guessing_costs_the_logarithm_of_the_vocabulary(dataset: Dataset) -> None:
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": dataset.vocab_size}
    model = GPT(build(ModelConfig, size | {"residual": "add"}))  # its head starts at zero
    data = eval_set(dataset, tokens=160, batch_size=4, block_size=16)
    assert evaluate(model, data, autocast=no_autocast())["val_loss"] == pytest.approx(math.log(dataset.vocab_size))


def test_bfloat16_is_close_to_float32(model: GPT, dataset: Dataset) -> None:
    data = eval_set(dataset, tokens=160, batch_size=4, block_size=16)
    full = evaluate(model, data, autocast=no_autocast())["val_loss"]
    low = evaluate(model, data, autocast=torch.autocast("cpu", dtype=torch.bfloat16))["val_loss"]
    assert low != full and low == pytest.approx(full, abs=0.02)
