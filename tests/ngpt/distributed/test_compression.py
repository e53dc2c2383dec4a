"""What gradients lose in fewer bits. The group has one rank, so the average is the gradient itself."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ngpt.distributed.compression import COMPRESSIONS


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(minutes=5)
    )
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


class Bucket:
    """The two methods of a bucket of gradients that a hook calls."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self.gradient = gradient

    def buffer(self) -> torch.Tensor:
        return self.gradient

    def index(self) -> int:
        return 0


def averages(name: str, group: dist.ProcessGroup, gradients: np.ndarray) -> np.ndarray:
    """What the hook makes of one gradient after another."""
    compress = COMPRESSIONS[name]
    assert compress is not None
    hook: Any = compress(group)
    return np.stack([hook(None, Bucket(torch.from_numpy(row.copy()))).wait().numpy() for row in gradients])


@pytest.mark.parametrize(("name", "mantissa"), [("bfloat16", 7), ("float8", 3)])
def test_a_gradient_keeps_the_bits_of_its_format(name: str, mantissa: int, group: dist.ProcessGroup) -> None:
    gradients = np.random.default_rng(3).normal(size=(1, 1000)).astype(np.float32)
    error = np.abs(averages(name, group, gradients) - gradients)
    spacing = np.maximum(np.abs(gradients), np.abs(gradients).max() / 448 * 2**-6) * 2.0**-mantissa
    assert (error <= spacing / 2 * 1.01).all() and error.max() > 0


def test_what_float8_rounds_off_is_added_to_the_next_gradient(group: dist.ProcessGroup) -> None:
    """So the sum over many steps is off by one rounding, not by the sum of all of them."""
    gradients = np.repeat(np.random.default_rng(4).normal(size=(1, 1000)).astype(np.float32), 64, axis=0)
    found = averages("float8", group, gradients)
    one = np.abs(found[0] - gradients[0])
    total = np.abs(found.sum(0, dtype=np.float64) - gradients.sum(0, dtype=np.float64))
    assert total.max() < 3 * one.max() and (64 * one).mean() > 10 * total.mean()


def test_a_gradient_of_zeros_stays_zero(group: dist.ProcessGroup) -> None:
    assert (averages("float8", group, np.zeros((2, 8), np.float32)) == 0).all()
