"""Timing on a machine that does other things too: contestants take turns, and stand beside what the machine can do."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

MIB = 2**20
FEWEST, MOST = 3, 200  # rounds


def take_turns(
    contestants: Mapping[str, Callable[[], float]], *, seconds: float, warmup: int = 2
) -> dict[str, list[float]]:
    """The seconds that each contestant says it took, one call of each per round: a disturbance falls on all alike.

    It goes on for about `seconds`, with at least `FEWEST` rounds and at most `MOST`, after `warmup` rounds untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    for turn in range(-warmup, MOST):
        if turn >= FEWEST and time.perf_counter() - start > seconds:
            break
        for name, contestant in contestants.items():
            taken = contestant()
            if turn >= 0:
                times[name].append(taken)
    return times


def stopwatches(works: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], float]]:
    """Contestants for `take_turns` that are calls in this process."""
    return {name: functools.partial(timed, work, device) for name, work in works.items()}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until `work` is done on the device, too."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def compared(ours: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """`ms` and `reference_ms` are medians, `best_ms` is a minimum; `ratio` is the median over the rounds of reference
    over ours: how many times as fast."""
    return {
        "ms": statistics.median(ours) * 1000,
        "best_ms": min(ours) * 1000,
        "reference_ms": statistics.median(reference) * 1000,
        "ratio": ratio(ours, reference),
    }


def ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """How many times as fast: the median over the rounds, in each of which both met the same machine."""
    return statistics.median(other / own for own, other in zip(ours, reference, strict=True))


def gemm_flops(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, the best of several: the ceiling that a training step is measured against."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(6))


def copy_rate(device: torch.device, *, size: int | None = None) -> float:
    """Bytes/s, read and written, of copying a tensor larger than any cache, the best of several: the ceiling of what
    only moves data."""
    n = size or (1024 * MIB if device.type == "cuda" else 128 * MIB)
    source = torch.ones(n // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(6))


def where(device: torch.device, dtype: str) -> dict[str, Any]:
    """What every benchmark says about the machine: device, dtype, threads."""
    return {"device": str(device), "dtype": dtype, "threads": torch.get_num_threads()}


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_figures(figures: dict[str, Any], *, as_json: bool) -> None:
    """One JSON object, or a line per figure, on stdout."""
    if as_json:
        print(json.dumps(figures, allow_nan=False))
        return
    for name, value in _flat(figures).items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}")


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in figures.items():
        inner = _flat(value) if isinstance(value, dict) else None
        found |= {name: value} if inner is None else {f"{name}.{key}": entry for key, entry in inner.items()}
    return found
