"""Whole training steps: ours beside the machine's ceiling, and beside public implementations."""

import contextlib
import functools
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from ngpt.bench.peers import load_peer, peer_step
from ngpt.config.base import override
from ngpt.data.dataset import Dataset, open_dataset
from ngpt.model.flops import flops_per_token
from ngpt.system.device import DTYPES, pick_device
from ngpt.system.memory import peak_memory, reset_peak_memory
from ngpt.system.timing import gemm_flops, ratio, take_turns, timed, where
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.run import Run, set_up

ENOUGH = 100_000  # steps that no benchmark makes, so that no schedule comes to its end
MODES = ("eager", "compiled")
Value = TypeVar("Value")


def step(config: TrainConfig, *, dataset: Dataset | None = None, warmup: int = 5, steps: int = 20) -> dict[str, Any]:
    """Times whole training steps: data, forward, backward, optimizer, projection.

    Returns tokens_per_second and step_ms (medians), gemm_tflops (see `gemm_flops`), mfu (the model's FLOPs over what
    the matrix product would have done in that time), peak_memory_bytes, device, dtype, compiled and threads.
    """
    config = resolved(config)
    run = prepared(config, dataset=dataset)
    times = [timed(lambda: train_step(run), run.device) for _ in range(warmup + steps)][warmup:]
    return _figures(config, run.device, statistics.median(times)) | {"peak_memory_bytes": peak_memory(run.device)}


def against_peer(
    config: TrainConfig, peer: Path, *, modes: Sequence[str] = MODES, seconds: float = 30.0
) -> dict[str, Any]:
    """The step beside that of a public implementation: the same shape and data, taking turns, each in its own process.

    Of the peer a model.py is used as it is, with its own optimizer; see ngpt/bench/peers.py. Returns what `step` does,
    for the last of the modes, and besides: ratio_eager and ratio_compiled (how many times as many tokens per second as
    the peer, the median over the rounds), memory_ratio_eager and memory_ratio_compiled (our peak memory over the
    peer's, Python and torch included), and under contestants for each of ours_eager, peer_eager, ours_compiled,
    peer_compiled: tokens_per_second, step_ms, best_ms, n_params, peak_memory_bytes and start_memory_bytes (the same
    process before there was a model).
    """
    config = resolved(config)
    device = pick_device(config.device)
    open_dataset(config.data)  # made here if need be, not by four processes at once
    load_peer(peer)  # a wrong path is told at once
    contestants: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        pools = {
            f"{who}_{mode}": stack.enter_context(
                ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            )
            for mode in modes
            for who in ("ours", "peer")
        }
        for name, pool in pools.items():
            who, mode = name.split("_")
            begun = pool.submit(_begin, config, peer if who == "peer" else None, mode, torch.get_num_threads())
            contestants[name] = begun.result()
        steps = {name: functools.partial(_result, pool, _step) for name, pool in pools.items()}
        times = take_turns(steps, seconds=seconds, warmup=3)
        for name, pool in pools.items():
            contestants[name]["peak_memory_bytes"] = _result(pool, _peak)
    for name, taken in times.items():
        median = statistics.median(taken)
        speed = {"tokens_per_second": config.tokens_per_step / median, "step_ms": median * 1000}
        contestants[name] |= speed | {"best_ms": min(taken) * 1000}
    figures = _figures(config, device, statistics.median(times[f"ours_{modes[-1]}"]))
    figures |= {"compiled": modes[-1] == "compiled", "peer": str(peer)}
    for mode in modes:
        figures[f"ratio_{mode}"] = ratio(times[f"ours_{mode}"], times[f"peer_{mode}"])
        ours, theirs = (contestants[f"{who}_{mode}"]["peak_memory_bytes"] for who in ("ours", "peer"))
        figures[f"memory_ratio_{mode}"] = ours / theirs
    figures["peak_memory_bytes"] = contestants[f"ours_{modes[-1]}"]["peak_memory_bytes"]
    return figures | {"contestants": contestants}


def prepared(config: TrainConfig, *, dataset: Dataset | None = None, **changes: Any) -> Run:
    """A run of a resolved config that writes nothing and whose schedule never ends; settings may be changed."""
    with tempfile.TemporaryDirectory() as folder:
        return set_up(override(config, {"steps": ENOUGH} | changes), Path(folder), resume=None, dataset=dataset)


def _figures(config: TrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    rate, ceiling = config.tokens_per_step / seconds, gemm_flops(device, DTYPES[config.dtype])
    return {
        "tokens_per_second": rate,
        "step_ms": seconds * 1000,
        "gemm_tflops": ceiling / 1e12,
        "mfu": rate * flops_per_token(config.model) / ceiling,
        "compiled": config.compile,
        **where(device, config.dtype),
    }


# ---- in a contestant's own process ---------------------------------------------------------------------------------

_entrant: list[tuple[Callable[[], object], torch.device]] = []  # the one that this process is about


def _begin(config: TrainConfig, peer: Path | None, mode: str, threads: int) -> dict[str, int]:
    """Sets up a training step of ours, or of the peer if there is one, and takes the first, which may compile."""
    torch.set_num_threads(threads)
    device, dataset = pick_device(config.device), open_dataset(config.data)
    reset_peak_memory(device)
    start = peak_memory(device)
    if peer is None:
        run = prepared(config, dataset=dataset, compile=mode == "compiled")
        n_params = sum(parameter.numel() for parameter in run.model.parameters())
        step: Callable[[], object] = functools.partial(train_step, run)
    else:
        step, n_params = peer_step(peer, config, dataset, compiled=mode == "compiled")
    step()
    _entrant.append((step, device))
    return {"n_params": n_params, "start_memory_bytes": start}


def _step() -> float:
    """Seconds of one step."""
    return timed(*_entrant[0])


def _peak() -> int:
    """Peak memory of three steps."""
    step, device = _entrant[0]
    reset_peak_memory(device)
    for _ in range(3):
        step()
    return peak_memory(device)


def _result(pool: ProcessPoolExecutor, function: Callable[[], Value]) -> Value:
    return pool.submit(function).result()
