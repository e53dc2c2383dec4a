"""Timing on a shared machine: variants are timed alternately, and compared with the limits of the hardware."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ngpt.system import gpus

MIB = 2**20
MIN_ROUNDS, MAX_ROUNDS = 3, 200


def interleave(
    variants: Mapping[str, Callable[[], float]], *, seconds: float, warmup: int = 2
) -> dict[str, list[float]]:
    """Calls each variant once per round and collects the seconds that it returns, so that noise affects all alike.

    Runs `warmup` untimed rounds, then between `MIN_ROUNDS` and `MAX_ROUNDS` rounds in about `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for round_number in range(-warmup, MAX_ROUNDS):
        if round_number >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, variant in variants.items():
            taken = variant()
            if round_number >= 0:
                times[name].append(taken)
    return times


def timers(functions: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], float]]:
    """Returns variants for `interleave` that time the functions in this process."""
    return {name: functools.partial(time_call, function, device) for name, function in functions.items()}


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that one call takes, including its kernels on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def compare_times(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Returns the medians `ms` and `reference_ms`, the minimum `best_ms`, and `ratio`, which is `speed_ratio`."""
    seconds = {"ms": statistics.median(times), "best_ms": min(times), "reference_ms": statistics.median(reference)}
    return {name: value * 1000 for name, value in seconds.items()} | {"ratio": speed_ratio(times, reference)}


def speed_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the speedup over the reference: the median over rounds of reference time / time."""
    return statistics.median(base / own for own, base in zip(times, reference, strict=True))


def gemm_flops(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """Measures the FLOP/s of a square matrix product, best of six: an upper limit for a training step."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(time_call(lambda: torch.mm(a, b), device) for _ in range(6))


def copy_bandwidth(device: torch.device, *, size: int | None = None) -> float:
    """Measures memory bandwidth in bytes/s, read plus written: the best of six copies of a large tensor."""
    n = size or (1024 * MIB if device.type == "cuda" else 128 * MIB)
    source = torch.ones(n // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(time_call(lambda: target.copy_(source), device) for _ in range(6))


def machine_info(device: torch.device, dtype: str) -> dict[str, Any]:
    """Returns the fields that all benchmarks report: device, dtype, threads."""
    return {"device": str(device), "dtype": dtype, "threads": torch.get_num_threads()}


def synchronize(device: torch.device) -> None:
    """Waits for the kernels of a GPU to finish; on a CPU there is nothing to wait for."""
    if gpus.is_gpu(device):
        gpus.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def print_metrics(metrics: dict[str, Any], *, as_json: bool, width: int = 34, digits: int = 4) -> None:
    """Prints one JSON object, or one line per metric, with names of `width` columns."""
    if as_json:
        print(json.dumps(metrics, allow_nan=False))
        return
    for name, value in _flatten(metrics).items():
        print(f"{name:{width}} {value:.{digits}g}" if isinstance(value, float) else f"{name:{width}} {value}")


def _flatten(metrics: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in _flatten(value).items()}
        else:
            flat[name] = value
    return flat
