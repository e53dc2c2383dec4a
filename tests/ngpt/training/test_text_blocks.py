"""The loss per block of the evaluation text, as a run keeps it beside its validation loss."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.data.loader import eval_set
from ngpt.ensemble.train import train_together
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import evaluate
from ngpt.training.run import RunResult, set_up
from ngpt.training.text_blocks import block_numbers, sum_over_blocks
from tests.helpers.tiny_run import run


def starts(*lengths: int) -> np.ndarray:
    """Marks the first token of documents of these lengths."""
    marks = np.zeros(sum(lengths), bool)
    marks[np.cumsum([0, *lengths[:-1]])] = True
    return marks


def test_a_block_is_a_document_if_enough_are_marked() -> None:
    kind, block = block_numbers(60, starts(*[1, 2, 3] * 10))
    assert kind == "documents"
    assert np.bincount(block).tolist() == [1, 2, 3] * 10


def test_a_text_that_starts_within_a_document_has_that_part_as_its_first_block() -> None:
    _, block = block_numbers(60, starts(*[3] * 20) & (np.arange(60) > 0))
    assert np.bincount(block).tolist() == [3] * 20


def test_neighboring_documents_are_joined_beyond_a_hundred() -> None:
    kind, block = block_numbers(1000, starts(*[4] * 250))
    assert (kind, block.max() + 1) == ("documents", 100)
    assert all(b - a in (0, 1) for a, b in pairwise(block.tolist()))
    assert set(np.bincount(block)) == {8, 12}


@pytest.mark.parametrize(
    ("n_tokens", "blocks"), [(10, 10), (128, 22), (5120, 20), (16_384, 64), (65_536, 100), (2**20, 100)]
)
def test_without_marks_a_block_is_a_run_of_tokens(n_tokens: int, blocks: int) -> None:
    for marks in (None, starts(n_tokens)):
        kind, block = block_numbers(n_tokens, marks)
        assert (kind, block.max() + 1) == ("tokens", blocks)
        assert len(set(np.bincount(block)[:-1])) == 1


def test_sums_are_those_of_the_tokens() -> None:
    losses = np.random.default_rng(0).uniform(1, 9, 16_384)
    blocks = sum_over_blocks(losses, None)
    assert blocks is not None and blocks["tokens"] == [256] * 64
    np.testing.assert_allclose(blocks["nats"], losses.reshape(64, 256).sum(1), atol=1e-4)
    assert sum_over_blocks(np.array([1.0, np.nan]), None) is None


def test_the_loss_of_each_token_is_torchs(tiny: TrainConfig, tmp_path: Path) -> None:
    run_ = set_up(resolved(tiny), tmp_path, resume=None, dataset=None)
    idx, targets = run_.validation.batches[0]
    with torch.no_grad():
        losses = run_.model.token_losses(run_.model.features(idx), targets)
        expected = F.cross_entropy(run_.model(idx).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(losses, expected)


def test_keeping_the_blocks_changes_no_bit_of_the_loss(tiny: TrainConfig, tmp_path: Path) -> None:
    run_ = set_up(resolved(tiny), tmp_path, resume=None, dataset=None)
    plain = evaluate(run_.model, run_.validation, autocast=run_.autocast)
    assert evaluate(run_.model, run_.validation, autocast=run_.autocast, by_token=[]) == plain


def check(result: RunResult) -> None:
    blocks = result.eval_blocks
    assert blocks is not None and len(blocks["nats"]) == len(blocks["tokens"]) >= 20
    assert sum(blocks["nats"]) / sum(blocks["tokens"]) == pytest.approx(result.metrics["val_loss"], abs=1e-4)


def test_a_run_keeps_its_blocks_and_so_does_one_resumed_after_its_last_step(tiny: TrainConfig, tmp_path: Path) -> None:
    whole = run(override(tiny, {"checkpoint.every": 4}), tmp_path)
    check(whole)
    assert run(override(tiny, {"checkpoint.every": 4}), tmp_path, resume="latest").eval_blocks == whole.eval_blocks


def test_runs_trained_together_keep_theirs(tiny: TrainConfig, tmp_path: Path) -> None:
    configs = [tiny, override(tiny, {"seed": 7})]
    events = [event for each in train_together(configs, [tmp_path / "a", tmp_path / "b"]) for event in each.values()]
    results = [event for event in events if isinstance(event, RunResult)]
    assert len(results) == 2
    for result in results:
        check(result)


def test_tokens_without_text_start_documents() -> None:
    tokens = (np.arange(200) % 10).astype(np.uint16)
    sizes = np.where(np.arange(10) == 3, 0, 2)
    data = Dataset((tokens,), (tokens,), 10, sizes, manifest={}, folder=Path())
    marks = eval_set(data, tokens=64, batch_size=4, block_size=16).starts
    assert marks is not None
    assert marks.nonzero()[0].tolist() == [2, 12, 22, 32, 42, 52, 62]  # targets begin at the second token
