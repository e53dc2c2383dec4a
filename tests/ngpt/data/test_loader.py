"""Batches against plain slices of the tokens, and the fixed evaluation set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError
from ngpt.data.dataset import Dataset
from ngpt.data.loader import eval_set, train_batch

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def dataset_of(train: list[int], val: list[int], *, sizes: bool = True) -> Dataset:
    """Shards of the given lengths in which all tokens differ, so that a value identifies its position."""

    def count_up(parts: list[int]) -> tuple[np.ndarray, ...]:
        ends = np.cumsum(parts)
        return tuple(np.arange(end - part, end, dtype=np.uint16) for part, end in zip(parts, ends, strict=True))

    token_bytes = np.arange(1000, dtype=np.int64) if sizes else None
    return Dataset(count_up(train), count_up(val), 1000, token_bytes, manifest={}, folder=Path())


def shard_of(dataset: Dataset, window: np.ndarray) -> int:
    """The shard that holds the window as a plain slice."""
    for index, shard in enumerate(dataset.train):
        first = int(window[0]) - int(shard[0])
        if first >= 0 and first + len(window) <= len(shard):
            np.testing.assert_array_equal(window, shard[first : first + len(window)])
            return index
    raise AssertionError(f"{window} is in no shard")


@given(lengths, st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 12))
def test_every_window_is_a_slice_of_one_shard_with_targets_shifted_by_one(
    parts: list[int], seed: int, step: int, batch_size: int, block_size: int
) -> None:
    dataset = dataset_of([*parts, 13], [13])
    idx, targets = train_batch(dataset, seed=seed, step=step, batch_size=batch_size, block_size=block_size)
    assert idx.shape == targets.shape == (batch_size, block_size)
    assert idx.dtype == targets.dtype == torch.int64 and idx.is_contiguous() and targets.is_contiguous()
    for row in range(batch_size):
        shard_of(dataset, np.append(idx[row].numpy(), targets[row, -1]))
    assert torch.equal(idx[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("order", ["shards", "reservoir"])
@given(parts=lengths, seed=st.integers(0, 2**31))
def test_the_batches_of_an_epoch_cover_the_text_once(order: str, parts: list[int], seed: int) -> None:
    dataset = dataset_of([*parts, 13], [13])
    first_tokens = [int(shard[at]) for shard in dataset.train for at in range(0, len(shard) - 4, 4)]
    rows = [
        train_batch(dataset, seed=seed, step=step, batch_size=1, block_size=4, order=order, reservoir=5)
        for step in range(len(first_tokens))
    ]
    assert sorted(int(idx[0, 0]) for idx, _ in rows) == first_tokens
    for idx, targets in rows:
        shard_of(dataset, np.append(idx[0].numpy(), targets[0, -1]))


def test_a_batch_depends_only_on_seed_and_step() -> None:
    dataset = dataset_of([500, 400], [50])

    def batch(seed: int, step: int) -> list[list[int]]:
        return train_batch(dataset, seed=seed, step=step, batch_size=8, block_size=16)[0].tolist()

    later = batch(1, 7)
    assert batch(1, 3) != batch(2, 3) != batch(1, 4)
    assert batch(1, 7) == later
    assert batch(0, 1) != batch(1, 0)


def test_batches_do_not_change_between_versions() -> None:
    idx, _ = train_batch(dataset_of([500, 400], [50]), seed=1, step=2, batch_size=4, block_size=8)
    expected = np.random.default_rng([1, 2]).integers(492 + 392, size=4)
    assert idx[:, 0].tolist() == [first if first < 492 else first + 8 for first in expected]


def test_all_windows_are_equally_likely() -> None:
    dataset = dataset_of([12, 5, 8], [50])
    drawn = [
        int(first)
        for step in range(200)
        for first in train_batch(dataset, seed=0, step=step, batch_size=60, block_size=4)[0][:, 0]
    ]
    possible = [*range(8), 12, *range(17, 21)]  # 12 - 4, 5 - 4 and 8 - 4 starts
    counts = np.bincount(drawn, minlength=25)[possible]
    assert counts.sum() == len(drawn) == 12000
    expected = 12000 / len(possible)
    assert ((counts - expected) ** 2 / expected).sum() < 32.9  # chi-square, 12 degrees of freedom, p = 0.001


@given(lengths, st.integers(0, 100), st.integers(1, 5), st.integers(1, 12))
def test_evaluation_takes_the_first_windows_of_each_shard_in_order(
    parts: list[int], tokens: int, batch_size: int, block_size: int
) -> None:
    dataset = dataset_of([13], [13, *parts])
    found = eval_set(dataset, tokens=tokens, batch_size=batch_size, block_size=block_size)
    windows = [
        shard[first : first + block_size + 1]
        for shard in dataset.val
        for first in range(0, len(shard) - block_size, block_size)
    ][: max(1, tokens // block_size)]
    idx = torch.cat([batch[0] for batch in found.batches]).numpy()
    targets = torch.cat([batch[1] for batch in found.batches]).numpy()
    np.testing.assert_array_equal(idx, [window[:-1] for window in windows])
    np.testing.assert_array_equal(targets, [window[1:] for window in windows])
    assert found.n_tokens == targets.size
    assert found.n_bytes == targets.sum()  # token n stands for n bytes here
    assert all(len(batch[0]) == batch_size for batch in found.batches[:-1])


def test_evaluation_tokens_do_not_depend_on_the_batch_size() -> None:
    dataset = dataset_of([50], [300])
    sets = [eval_set(dataset, tokens=200, batch_size=size, block_size=16) for size in (1, 5, 64)]
    assert len({found.sha256 for found in sets}) == 1
    assert {found.n_tokens for found in sets} == {192}
    assert eval_set(dataset, tokens=100, batch_size=1, block_size=16).sha256 != sets[0].sha256


def test_a_small_validation_split_is_used_completely() -> None:
    assert eval_set(dataset_of([50], [33]), tokens=10**6, batch_size=4, block_size=16).n_tokens == 32


def test_bytes_are_not_counted_without_a_tokenizer() -> None:
    assert eval_set(dataset_of([50], [50], sizes=False), tokens=32, batch_size=4, block_size=16).n_bytes is None


def test_the_bytes_of_a_real_corpus_are_those_of_its_text(dataset: Dataset) -> None:
    size = len(dataset.val[0]) - 1
    found = eval_set(dataset, tokens=size, batch_size=1, block_size=size)
    assert dataset.token_bytes is not None
    first = int(dataset.token_bytes[dataset.val[0][0]])
    assert found.n_bytes == dataset.manifest["splits"]["val"]["bytes"] - first


@pytest.mark.parametrize(("train", "val", "split"), [([16], [50], "train"), ([50], [16, 9], "validation")])
def test_less_than_one_window_is_an_error_that_names_the_number_of_tokens(
    train: list[int], val: list[int], split: str
) -> None:
    with pytest.raises(ConfigError, match=f"needs 17 consecutive tokens, the {split} split has 16"):
        eval_set(dataset_of(train, val), tokens=32, batch_size=2, block_size=16)


def test_training_on_less_than_one_window_is_an_error() -> None:
    with pytest.raises(ConfigError, match="needs 17 consecutive tokens"):
        train_batch(dataset_of([16, 4], [50]), seed=0, step=0, batch_size=2, block_size=16)
