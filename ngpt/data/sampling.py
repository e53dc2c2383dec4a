"""In which order training reads the windows of a corpus, as pure functions of (seed, step).

Each entry of `ORDERS` says which windows make up the batch of a step. Nothing is read here and no position is kept:
what an epoch looks like follows from its number, is worked out over window numbers, and is cached. A run that resumes
at step 100,000 finds its place in the time that one shuffle of an epoch takes.

In `shards` and `reservoir` an epoch has every window exactly once. Windows adjoin: a shard of L tokens has
(L - 1) // block_size of them, and the last target of one is the first input of the next.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

Lengths = tuple[int, ...]  # tokens of each shard
Places = tuple[np.ndarray, np.ndarray]  # of each window of a batch, (B,): its shard, and its first token there
Order = Callable[..., Places]


def windows(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Places:
    """Every start is equally likely, at any token; some are drawn twice before others are drawn at all."""
    # (shards,): how many windows start in this shard or an earlier one
    ends = np.cumsum([max(0, length - block_size) for length in lengths])
    drawn = np.random.default_rng([seed, step]).integers(ends[-1], size=batch_size)
    which = np.searchsorted(ends, drawn, side="right")
    return which, drawn - np.concatenate([[0], ends])[which]


def shards(lengths: Lengths, *, seed: int, step: int, batch_size: int, block_size: int, reservoir: int) -> Places:
    """Epochs: in each one the shards come in an order of their own, and in each shard its windows do."""
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
    """Epochs: all windows in the order of the corpus stream through a buffer of `reservoir` windows.

    The buffer starts with the first windows. Each draw takes one of it, all equally likely, and the next window of the
    stream fills its place; at the end the rest leaves in random order. So a window comes at most `reservoir` draws
    before its place in the corpus, and mostly not long after it.
    """
    ends = _window_ends(lengths, block_size)
    rows = [
        _streamed((seed, epoch), int(ends[-1]), reservoir)[first:stop]
        for epoch, first, stop in _rows(step * batch_size, batch_size, total=int(ends[-1]))
    ]
    drawn = np.concatenate(rows).astype(np.int64)
    which = np.searchsorted(ends, drawn, side="right")
    return which, (drawn - np.concatenate([[0], ends])[which]) * block_size


ORDERS: dict[str, Order] = {
    "windows": windows,
    "shards": shards,
    "reservoir": reservoir,
}


def _window_ends(lengths: Lengths, block_size: int) -> np.ndarray:
    """(shards,): how many adjoining windows this shard and the earlier ones hold."""
    return np.cumsum([max(0, length - 1) // block_size for length in lengths])


def _rows(first: int, count: int, *, total: int) -> list[tuple[int, int, int]]:
    """`count` rows from `first` on, as (epoch, first, stop) within epochs of `total` rows."""
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
    """The order (total,) in which the numbers 0 to total - 1 leave a buffer of `size`, without the buffer.

    What is drawn from a slot is what was put there last, so each draw needs only the draw before it from the same
    slot. A stable sort by slot has them side by side.
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
