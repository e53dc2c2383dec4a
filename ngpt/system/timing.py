"""Timing on a shared machine: variants are timed alternately, and compared with the limits of the hardware."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ngpt.config.visible import visible
from ngpt.system import gpus

MIB = 2**20
MIN_ROUNDS, MAX_ROUNDS = 3, 200
EMULATED = 2.0  # times slower than float32; a CPU that computes in bfloat16 is about as fast or faster


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


@functools.cache
def bfloat16_slowdown() -> float:
    """Measures how many times longer a product of bfloat16 matrices takes than of float32 matrices on this CPU.

    Below 1 with matrix units for bfloat16 (AMX, AVX512-BF16). It is measured, because a CPU's flags do not say what
    torch makes of them: in CPU time of one thread, which does not depend on the load, within a tenth of a second.
    """
    matrices = {dtype: torch.randn(256, 256).to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def seconds(x: torch.Tensor) -> float:
        start = time.thread_time()
        torch.mm(x, x)
        return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        variants = {str(dtype): functools.partial(seconds, x) for dtype, x in matrices.items()}
        times = interleave(variants, seconds=0.05, warmup=1)
    finally:
        torch.set_num_threads(threads)
    return min(times[str(torch.bfloat16)]) / min(times[str(torch.float32)])


def slow_dtype_note(device: torch.device, dtype: str, *, advice: str = "set dtype: float32") -> str | None:
    """Returns a line about a dtype that `device` only emulates, with `advice`; None if it is fast enough."""
    if device.type != "cpu" or dtype != "bfloat16" or (slowdown := bfloat16_slowdown()) < EMULATED:
        return None
    factor = f"{slowdown:.0f}" if slowdown >= 10 else f"{slowdown:.2g}"
    return f"bfloat16 is emulated on this CPU: {factor} x slower than float32; {advice}"


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
        shown = f"{value:.{digits}g}" if isinstance(value, float) else value
        print(visible(f"{name:{width}} {shown}"))


def _flatten(metrics: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in _flatten(value).items()}
        else:
            flat[name] = value
    return flat
