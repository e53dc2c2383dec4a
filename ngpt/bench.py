"""How fast it is on this machine: `python -m ngpt.bench step --json`.

Every figure stands beside what a plain large matrix product reaches in the same run, so that it means something on
another machine and on a busy one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ngpt.config import ConfigError
from ngpt.data.corpora import Dataset
from ngpt.data.shards import CorruptShardError
from ngpt.flops import flops_per_token
from ngpt.memory import peak_memory
from ngpt.train import DTYPES, TrainConfig, pick_device, read_config, resolved, set_up, train_step


def step(config: TrainConfig, *, dataset: Dataset | None = None, warmup: int = 5, steps: int = 20) -> dict[str, Any]:
    """Times whole training steps: data, forward, backward, optimizer, projection.

    Returns tokens_per_second and step_ms (medians), gemm_tflops (see `gemm_flops`), mfu (the model's FLOPs over what
    the matrix product would have done in that time), peak_memory_bytes, device, dtype and compiled.
    """
    config = resolved(config)
    with tempfile.TemporaryDirectory() as folder:
        run = set_up(config, Path(folder), resume=None, dataset=dataset)
    times = []
    for i in range(warmup + steps):
        start = time.perf_counter()
        train_step(run)
        _synchronize(run.device)
        if i >= warmup:
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    rate = config.tokens_per_step / seconds
    ceiling = gemm_flops(run.device, DTYPES[config.dtype])
    return {
        "tokens_per_second": rate,
        "step_ms": seconds * 1000,
        "gemm_tflops": ceiling / 1e12,
        "mfu": rate * flops_per_token(config.model) / ceiling,
        "peak_memory_bytes": peak_memory(run.device),
        "device": str(run.device),
        "dtype": config.dtype,
        "compiled": False,
        "threads": torch.get_num_threads(),
    }


def gemm_flops(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP/s of a square matrix product, the best of several: the ceiling that a training step is measured against."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def print_figures(figures: dict[str, Any], *, as_json: bool) -> None:
    """One JSON object, or a line per figure, on stdout."""
    if as_json:
        print(json.dumps(figures, allow_nan=False))
        return
    for name, value in figures.items():
        print(f"{name:34} {value:.4g}" if isinstance(value, float) else f"{name:34} {value}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {"step": step}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    names = "\n".join(f"  {name}: {function.__doc__}" for name, function in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m ngpt.bench", description=f"{__doc__}\n{names}", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings")
    parser.add_argument("--threads", type=int, help="CPU threads; default is torch's")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, options.set)
        pick_device(config.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        figures = BENCHMARKS[options.name](config)
    except (ConfigError, CorruptShardError) as error:
        print(error, file=sys.stderr)
        return 2
    print_figures(figures, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
