"""Training batches as a pure function of (seed, step), and the fixed validation tokens of all trials.

So a resumed run reads the same tokens as an uninterrupted one without saving a position, and paired arms see the same
data in the same order. sampling.py computes the order of the windows.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ngpt.config.base import ConfigError
from ngpt.data.dataset import Dataset
from ngpt.data.sampling import ORDERS
from ngpt.data.tokens.formats import token_dtype

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class EvalSet:
    """The validation tokens: `batches` of (idx, targets), int64 (B, T); the last batch may be smaller.

    `n_tokens` counts the targets and `n_bytes` their UTF-8 bytes (None without the tokenizer). `sha256` identifies the
    tokens independently of the batch size. `starts` (n_tokens,) marks the targets that start a document, which are the
    tokens without text (None without the tokenizer).
    """

    batches: list[Batch]
    n_tokens: int
    n_bytes: int | None
    sha256: str
    starts: np.ndarray | None = None

    def cut(self, rows: int) -> "EvalSet":
        """Returns the same tokens in batches of at most `rows` windows."""
        parts = [zip(idx.split(rows), targets.split(rows), strict=True) for idx, targets in self.batches]
        return replace(self, batches=[part for batch in parts for part in batch])


def train_batch(
    dataset: Dataset,
    *,
    seed: int,
    step: int,
    batch_size: int,
    block_size: int,
    order: str = "windows",
    reservoir: int = 4096,
) -> Batch:
    """Returns the batch of a step as (idx, targets), int64 (B, T): windows of the train split in one of `ORDERS`.

    A window never crosses the end of a shard. Targets are idx shifted by one. `reservoir` is the buffer size, in
    windows, of the order with that name. Raises ConfigError if no shard holds a window of `block_size + 1` tokens.
    """
    _require(dataset.train, "train", block_size)
    lengths = tuple(map(len, dataset.train))
    shape = {"batch_size": batch_size, "block_size": block_size}
    which, first = ORDERS[order](lengths, seed=seed, step=step, **shape, reservoir=reservoir)
    tokens = np.empty((batch_size, block_size + 1), np.int64)
    span = np.arange(block_size + 1)
    for index in np.unique(which):
        rows = which == index
        tokens[rows] = dataset.train[index][first[rows][:, None] + span]
    return _batch(tokens)


def eval_set(dataset: Dataset, *, tokens: int, batch_size: int, block_size: int, split: str = "val") -> EvalSet:
    """Returns the first `tokens` tokens of a split as adjacent windows; ConfigError if a split has no whole window."""
    shards = {"train": dataset.train, "val": dataset.val, "test": dataset.test}[split]
    if not shards:
        raise ConfigError(f"{dataset.folder} has no {split} split; it has {' and '.join(dataset.manifest['splits'])}")
    _require(dataset.train, "train", block_size)
    _require(shards, "validation" if split == "val" else split, block_size)
    windows = _first_windows(shards, max(1, tokens // block_size), block_size)
    targets = windows[:, 1:]
    sizes = dataset.token_bytes
    return EvalSet(
        batches=[_batch(windows[row : row + batch_size]) for row in range(0, len(windows), batch_size)],
        n_tokens=targets.size,
        n_bytes=None if sizes is None else int(sizes[targets].sum()),
        sha256=hashlib.sha256(windows.astype(token_dtype(dataset.vocab_size)).tobytes()).hexdigest(),
        starts=None if sizes is None else (sizes[targets] <= 0).ravel(),
    )


def _first_windows(shards: tuple[np.ndarray, ...], count: int, block_size: int) -> np.ndarray:
    """Returns (N, block_size + 1) int64, N <= `count`; each window starts at the last token of the previous one."""
    parts = []
    for shard in shards:
        starts = np.arange(min(count, (len(shard) - 1) // block_size)) * block_size
        parts.append(shard[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
        count -= len(starts)
    return np.concatenate(parts)


def _batch(windows: np.ndarray) -> Batch:
    """Splits (B, T + 1) tokens into inputs and targets."""
    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _require(shards: tuple[np.ndarray, ...], split: str, block_size: int) -> None:
    longest = max((len(shard) for shard in shards), default=0)
    if longest <= block_size:
        needed = f"block_size {block_size} needs {block_size + 1} consecutive tokens, the {split} split has {longest}"
        raise ConfigError(f"{needed}; use a larger corpus or a smaller block_size")
