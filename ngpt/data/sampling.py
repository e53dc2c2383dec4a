"""The order in which training reads the windows of a corpus, as pure functions of (seed, step).

Each function in `ORDERS` returns the windows of a batch. It stores no position: the order of an epoch is computed from
its number and cached, so resuming at step 100,000 takes one shuffle.

In `shards` and `reservoir` an epoch contains every window exactly once. Windows are adjacent: a shard of L tokens has
(L - 1) // block_size, and the last target of one is the first input of the next.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

Lengths = tuple[int, ...]  # tokens of each shard
Windows = tuple[np.ndarray, np.ndarray]  # (B,) each: the shard of a window, and the index of its first token there
Order = Callable[..., Windows]


def windows(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Windows:
    """Samples windows with replacement; all start positions are equally likely."""
    # (shards,): number of windows that start in this shard or an earlier one
    ends = np.cumsum([max(0, length - block_size) for length in lengths])
    drawn = np.random.default_rng([seed, step]).integers(ends[-1], size=batch_size)
    which = np.searchsorted(ends, drawn, side="right")
    return which, drawn - np.concatenate([[0], ends])[which]


def shards(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Windows:
    """Reads one shard after another in random order, and the windows of each shard in random order."""
    ends = _window_ends(lengths, block_size)
    shard_indices, window_indices = [], []
    for epoch, first, stop in _rows(step * batch_size, batch_size, total=int(ends[-1])):
        shard_order = _shuffled((seed, epoch), len(lengths))
        # (shards + 1,): the row at which the shard at each position of the order begins
        starts = np.concatenate([[0], np.cumsum(np.diff(ends, prepend=0)[shard_order])])
        while first < stop:
            position = int(np.searchsorted(starts, first, side="right")) - 1
            shard, shard_stop = int(shard_order[position]), min(stop, int(starts[position + 1]))
            window_order = _shuffled((seed, epoch, shard), int(starts[position + 1] - starts[position]))
            shard_indices.append(np.full(shard_stop - first, shard))
            window_indices.append(window_order[first - starts[position] : shard_stop - starts[position]])
            first = shard_stop
    return np.concatenate(shard_indices), np.concatenate(window_indices).astype(np.int64) * block_size


def reservoir(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Windows:
    """Streams the windows in corpus order through a shuffle buffer of `reservoir` windows.

    The buffer starts with the first windows. Each draw removes a random window and puts the next one of the stream in
    its slot; at the end the buffer is emptied in random order. So a window is read at most `reservoir` draws earlier
    than in corpus order, and usually not much later.
    """
    ends = _window_ends(lengths, block_size)
    rows = [
        _shuffle_stream((seed, epoch), int(ends[-1]), reservoir)[first:stop]
        for epoch, first, stop in _rows(step * batch_size, batch_size, total=int(ends[-1]))
    ]
    drawn = np.concatenate(rows).astype(np.int64)
    which = np.searchsorted(ends, drawn, side="right")
    return which, (drawn - np.concatenate([[0], ends])[which]) * block_size


ORDERS: dict[str, Order] = {"windows": windows, "shards": shards, "reservoir": reservoir}


def _window_ends(lengths: Lengths, block_size: int) -> np.ndarray:
    """Returns (shards,): the number of adjacent windows in each shard and all earlier ones."""
    return np.cumsum([max(0, length - 1) // block_size for length in lengths])


def _rows(first: int, count: int, *, total: int) -> list[tuple[int, int, int]]:
    """Splits `count` rows from row `first` by epochs of `total` rows; returns (epoch, first, stop) for each."""
    ranges = []
    end = first + count
    while first < end:
        epoch, row = divmod(first, total)
        stop = min(total, row + end - first)
        ranges.append((epoch, row, stop))
        first += stop - row
    return ranges


@lru_cache(maxsize=16)
def _shuffled(key: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


@lru_cache(maxsize=2)  # 40 MB for an epoch of 10 billion tokens in windows of 1024
def _shuffle_stream(key: tuple[int, ...], total: int, size: int) -> np.ndarray:
    """Returns the order (total,) in which the numbers 0 to total - 1 leave a shuffle buffer of `size`.

    A draw gets the number that the previous draw from the same slot put there. To find it without a loop, a stable sort
    by slot makes these two draws adjacent.
    """
    size = min(size, total)
    rng = np.random.default_rng(key)
    slots = rng.integers(size, size=total - size)
    put = np.arange(size, total)  # the number that draw i puts into its slot
    by_slot = np.argsort(slots.astype(np.uint16) if size <= 1 << 16 else slots, kind="stable")  # 16 bits: radix sort
    repeated = np.diff(slots[by_slot], prepend=-1) == 0  # not the first draw from this slot
    drawn = slots.copy()  # the first draw gets the initial number of the slot
    drawn[by_slot[repeated]] = put[by_slot[np.flatnonzero(repeated) - 1]]
    remaining = np.arange(size)
    remaining[slots] = put  # for repeated slots the last assignment wins
    return np.concatenate([drawn, remaining[rng.permutation(size)]]).astype(np.int32 if total < 2**31 else np.int64)
