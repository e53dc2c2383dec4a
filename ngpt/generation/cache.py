"""The KV cache of a decoder: static, one row per sequence, filled to a different length in each row."""

import torch
from torch import Tensor

from ngpt.model.config import ModelConfig


class SlotCache:
    """Keys and values of every layer for `rows` sequences of up to `size` tokens each.

    Memory is allocated once: 2 * n_layer * rows * size * n_kv_head * head_dim elements of `dtype`. A row is filled in
    place, and its entries beyond the length of its sequence have no effect.
    """

    def __init__(self, cfg: ModelConfig, rows: int, size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.rows, self.size, self.dtype = rows, size, dtype
        shape = (rows * size, cfg.kv_heads, cfg.head_dim)
        # Zeros, since an attention weight of 0 times NaN in memory that was never written would be NaN. One tensor for
        # each, since views of a common one would be copied by compiled code that writes to them.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(cfg.n_layer)] for _ in range(2)
        )

    def write(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes `k` and `v` (N, G, K) at the places `index` (N,), each row * size + position."""
        self.keys[layer].index_copy_(0, index, k)
        self.values[layer].index_copy_(0, index, v)

    def read(self, layer: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Returns views of keys and values of the first rows and positions, (rows, length, G, K)."""
        k, v = self.keys[layer].unflatten(0, (-1, self.size)), self.values[layer].unflatten(0, (-1, self.size))
        return k[:rows, :length], v[:rows, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` entries of the row `source` to the row `target`."""
        old, new = source * self.size, target * self.size
        for entries in (*self.keys, *self.values):
            entries[new : new + length] = entries[old : old + length]
