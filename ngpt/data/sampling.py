"""The order in which training reads the windows of a corpus, as pure functions of (seed, step).

Each function of `ORDERS` returns the windows of a batch. It keeps no position: the order of an epoch is computed from
its number and cached, so resuming at step 100,000 takes one shuffle.

In `shards` and `reservoir` an epoch has every window exactly once. Windows are adjacent: a shard of L tokens has
(L - 1) // block_size, and the last target of one is the first input of the next.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

Lengths = tuple[int, ...]  # tokens of each shard
Places = tuple[np.ndarray, np.ndarray]  # of each window of a batch, (B,): its shard, and its first token there
Order = Callable[..., Places]


def windows(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Places:
    """Windows drawn with replacement; every token is equally likely to be the first."""
    # (shards,): number of windows that start in this shard or an earlier one
    ends = np.cumsum([max(0, length - block_size) for length in lengths])
    drawn = np.random.default_rng([seed, step]).integers(ends[-1], size=batch_size)
    which = np.searchsorted(ends, drawn, side="right")
    return which, drawn - np.concatenate([[0], ends])[which]


def shards(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Places:
    """Epochs: the shards in random order, and the windows of each shard in random order."""
    ends = _window_ends(lengths, block_size)
    found_which, found_window = [], []
    for epoch, first, stop in _rows(step * batch_size, batch_size, total=int(ends[-1])):
        turns = _shuffled((seed, epoch), len(lengths))
        starts = np.concatenate([[0], np.cumsum(np.diff(ends, prepend=0)[turns])])  # rows at which a turn begins
        while first < stop:
            turn = int(np.searchsorted(starts, first, side="right")) - 1
            shard, upto = int(turns[turn]), min(stop, int(starts[turn + 1]))
            inside = _shuffled((seed, epoch, shard), int(starts[turn + 1] - starts[turn]))
            found_which.append(np.full(upto - first, shard))
            found_window.append(inside[first - starts[turn] : upto - starts[turn]])
            first = upto
    return np.concatenate(found_which), np.concatenate(found_window).astype(np.int64) * block_size


def reservoir(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Places:
    """Epochs: the windows stream in corpus order through a shuffle buffer of `reservoir` windows.

    The buffer starts with the first windows. Each draw removes a random window, and the next one of the stream takes
    its place; at the end the rest leaves in random order. So a window comes at most `reservoir` draws before its place
    in the corpus, and mostly not long after it.
    """
    ends = _window_ends(lengths, block_size)
    rows = [
        _streamed((seed, epoch), int(ends[-1]), reservoir)[first:stop]
        for epoch, first, stop in _rows(step * batch_size, batch_size, total=int(ends[-1]))
    ]
    drawn = np.concatenate(rows).astype(np.int64)
    which = np.searchsorted(ends, drawn, side="right")
    return which, (drawn - np.concatenate([[0], ends])[which]) * block_size


ORDERS: dict[str, Order] = {"windows": windows, "shards": shards, "reservoir": reservoir}


def _window_ends(lengths: Lengths, block_size: int) -> np.ndarray:
    """(shards,): number of adjacent windows in this shard and the earlier ones."""
    return np.cumsum([max(0, length - 1) // block_size for length in lengths])


def _rows(first: int, count: int, *, total: int) -> list[tuple[int, int, int]]:
    """`count` rows from `first`, as (epoch, first, stop) within epochs of `total` rows."""
    found = []
    while count:
        epoch, place = divmod(first, total)
        stop = min(total, place + count)
        found.append((epoch, place, stop))
        first, count = first + stop - place, count - (stop - place)
    return found


@lru_cache(maxsize=16)
def _shuffled(key: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)


@lru_cache(maxsize=2)  # 40 MB for an epoch of 10 billion tokens in windows of 1024
def _streamed(key: tuple[int, ...], total: int, size: int) -> np.ndarray:
    """The order (total,) in which the numbers 0 to total - 1 leave a shuffle buffer of `size`, computed vectorized.

    A draw takes what the previous draw from the same slot put there. A stable sort by slot makes them neighbours.
    """
    size = min(size, total)
    rng = np.random.default_rng(key)
    slots = rng.integers(size, size=total - size)
    put = np.arange(size, total)  # what draw i puts into its slot
    by_slot = np.argsort(slots.astype(np.uint16) if size <= 1 << 16 else slots, kind="stable")  # 16 bits: radix sort
    again = np.diff(slots[by_slot], prepend=-1) == 0  # not the first draw from this slot
    drawn = slots.copy()  # the first draw finds what the buffer started with
    drawn[by_slot[again]] = put[by_slot[np.flatnonzero(again) - 1]]
    left = np.arange(size)
    left[slots] = put  # of several, the last assignment stays
    return np.concatenate([drawn, left[rng.permutation(size)]]).astype(np.int32 if total < 2**31 else np.int64)
