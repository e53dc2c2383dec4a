"""Orders of windows: complete epochs, reproducible by seed and step, and a textbook shuffle buffer."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError, override
from ngpt.data import sampling as order
from ngpt.data.dataset import Dataset
from ngpt.data.sampling import ORDERS
from ngpt.training.config import TrainConfig
from ngpt.training.loop import train

lengths = st.lists(st.integers(0, 60), min_size=1, max_size=5).map(lambda parts: (*parts, 20))
block_sizes = st.integers(1, 12)
epochs = pytest.mark.parametrize("name", ["shards", "reservoir"])
Window = tuple[int, int]  # shard, first token


def rows(
    name: str, parts: tuple[int, ...], *, seed: int, steps: range, batch_size: int, block_size: int, reservoir: int = 7
) -> list[Window]:
    found: list[Window] = []
    for step in steps:
        which, first = ORDERS[name](
            parts, seed=seed, step=step, batch_size=batch_size, block_size=block_size, reservoir=reservoir
        )
        assert which.shape == first.shape == (batch_size,)
        found += zip(which.tolist(), first.tolist(), strict=True)
    return found


def all_windows(parts: tuple[int, ...], block_size: int) -> list[Window]:
    """An independent reference that counts instead of dividing."""
    return [
        (index, first)
        for index, length in enumerate(parts)
        for first in range(0, length, block_size)
        if first + block_size + 1 <= length
    ]


@epochs
@given(parts=lengths, block_size=block_sizes, seed=st.integers(0, 2**31), batch_size=st.integers(1, 30))
def test_each_epoch_has_every_window_exactly_once(
    name: str, parts: tuple[int, ...], block_size: int, seed: int, batch_size: int
) -> None:
    expected = Counter(all_windows(parts, block_size))
    size = sum(expected.values())
    steps = range(-(-3 * size // batch_size))
    drawn = rows(name, parts, seed=seed, steps=steps, batch_size=batch_size, block_size=block_size)
    for epoch in range(3):
        assert Counter(drawn[epoch * size : (epoch + 1) * size]) == expected


@pytest.mark.parametrize("name", ORDERS)
@given(parts=lengths, block_size=block_sizes, seed=st.integers(0, 2**31), step=st.integers(0, 500))
def test_a_step_does_not_need_the_steps_before_it(
    name: str, parts: tuple[int, ...], block_size: int, seed: int, step: int
) -> None:
    how = {"seed": seed, "batch_size": 3, "block_size": block_size}
    straight = rows(name, parts, steps=range(step, step + 4), **how)
    order._shuffled.cache_clear()
    order._shuffle_stream.cache_clear()
    assert rows(name, parts, steps=range(step + 2, step + 4), **how) == straight[6:]


@epochs
@given(parts=lengths, seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 9), min_size=2, max_size=2))
def test_the_batch_size_cuts_the_stream_and_does_not_change_it(
    name: str, parts: tuple[int, ...], seed: int, sizes: list[int]
) -> None:
    streams = [
        rows(name, parts, seed=seed, steps=range(90 // size), batch_size=size, block_size=4)[:40] for size in sizes
    ]
    assert streams[0] == streams[1]


@epochs
def test_each_seed_and_epoch_has_its_own_order(name: str) -> None:
    parts, size = (81, 41), 30
    one = rows(name, parts, seed=1, steps=range(2), batch_size=size, block_size=4)
    other = rows(name, parts, seed=2, steps=range(1), batch_size=size, block_size=4)
    assert one[:size] != one[size:] and one[:size] != other
    assert one[:size] != sorted(one[:size])


def test_shards_are_read_whole_and_in_every_order() -> None:
    parts = (9, 17, 13)  # 2, 4 and 3 windows of 4 tokens
    seen = set()
    for seed in range(60):
        which = [shard for shard, _ in rows("shards", parts, seed=seed, steps=range(9), batch_size=1, block_size=4)]
        turns = tuple(dict.fromkeys(which))
        assert which == [shard for shard in turns for _ in range((2, 4, 3)[shard])]
        seen.add(turns)
    assert len(seen) == 6


def test_the_windows_of_a_shard_are_shuffled_evenly() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(600):
        drawn = rows("shards", (25,), seed=3, steps=range(epoch, epoch + 1), batch_size=6, block_size=4)
        for place, (_, first) in enumerate(drawn):
            counts[place, first // 4] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 52.6  # chi-square, 25 degrees of freedom, p = 0.001


@given(total=st.integers(1, 80), size=st.integers(1, 100), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_the_reservoir_is_the_textbook_shuffle_buffer(total: int, size: int, seed: int, epoch: int) -> None:
    """The reference is a loop over the buffer with the same draws: fill it, emit and replace, empty it."""
    stream = iter(range(total))
    buffer = [next(stream) for _ in range(min(size, total))]
    rng = np.random.default_rng([seed, epoch])
    expected = []
    for slot in rng.integers(len(buffer), size=total - len(buffer)):
        expected.append(buffer[slot])
        buffer[slot] = next(stream)
    expected += [buffer[slot] for slot in rng.permutation(len(buffer))]
    drawn = rows(
        "reservoir",
        (total + 1,),
        seed=seed,
        steps=range(epoch * total, (epoch + 1) * total),
        batch_size=1,
        block_size=1,
        reservoir=size,
    )
    assert [first for _, first in drawn] == expected


def test_a_reservoir_of_one_keeps_the_order_and_a_large_one_shuffles_everything() -> None:
    parts, size = (41, 21), 15
    how = {"seed": 0, "steps": range(size), "batch_size": 1, "block_size": 4}
    assert rows("reservoir", parts, reservoir=1, **how) == all_windows(parts, 4)
    firsts = Counter(
        rows("reservoir", parts, seed=seed, steps=range(1), batch_size=1, block_size=4, reservoir=10**6)[0]
        for seed in range(1500)
    )
    assert len(firsts) == size
    assert sum((count - 100) ** 2 / 100 for count in firsts.values()) < 36.1  # 14 degrees of freedom, p = 0.001


def test_a_window_is_drawn_at_most_one_reservoir_early() -> None:
    drawn = rows("reservoir", (2001,), seed=5, steps=range(20), batch_size=100, block_size=1, reservoir=50)
    early = [window - place for place, (_, window) in enumerate(drawn)]
    assert max(early) < 50 and np.mean(np.abs(early)) < 100


def test_orders_do_not_change_between_versions() -> None:
    """Spells out the draws of NumPy's default generator."""
    rng = np.random.default_rng
    turns = rng((4, 0)).permutation(2)
    expected = [(shard, 2 * window) for shard in turns for window in rng((4, 0, shard)).permutation((3, 2)[shard])]
    assert rows("shards", (7, 5), seed=4, steps=range(1), batch_size=5, block_size=2) == expected


@epochs
def test_a_resumed_run_reads_the_same_windows_as_an_uninterrupted_one(
    name: str, tiny: TrainConfig, dataset: Dataset, tmp_path: Path
) -> None:
    config = override(tiny, {"data.order": name, "data.reservoir": 50, "checkpoint.every": 3, "eval_every": 3})
    straight = list(train(config, tmp_path / "straight", dataset=dataset))
    stopped = train(config, tmp_path / "stopped", dataset=dataset)
    assert [next(stopped)["step"], next(stopped)["step"], next(stopped)["step"]] == [0, 3, 6]
    stopped.close()
    resumed = list(train(config, tmp_path / "stopped", resume="latest", dataset=dataset))
    assert [row["val_loss"] for row in resumed] == [row["val_loss"] for row in straight if (row["step"] or 0) > 3]
    with pytest.raises(ConfigError, match=r"data\.order"):
        list(train(override(config, {"data.order": "windows"}), tmp_path / "stopped", resume="latest", dataset=dataset))


def test_an_epoch_of_realistic_size_is_a_permutation() -> None:
    parts = tuple(random.Random(0).choices(range(10_000, 100_000), k=20))
    size = sum((length - 1) // 16 for length in parts)
    for name in ("shards", "reservoir"):
        which, first = ORDERS[name](parts, seed=0, step=0, batch_size=size, block_size=16, reservoir=4096)
        assert len(set(zip(which.tolist(), first.tolist(), strict=True))) == size
        assert all(first + 17 <= np.array(parts)[which])
