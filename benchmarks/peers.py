"""Compares the speed of this library's training step with that of a public implementation.

python -m benchmarks.peers nanoGPT/model.py --set model=experiments/models/13.7M.yaml batch_size=16 --json

The peer is a `model.py` in the style of nanoGPT, used unchanged. It defines `GPTConfig`, a dataclass, and `GPT` with
`forward(idx, targets) -> (logits, loss)` and `configure_optimizers(weight_decay, learning_rate, betas, device_type)`.
karpathy/nanoGPT and NVIDIA/ngpt both do. The official nGPT projects its weights in train.py, after each step; here
`normalize_matrices` does the same.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.bench.options import add_config_arguments, config_of
from ngpt.config.base import ConfigError
from ngpt.data.dataset import Dataset, open_dataset
from ngpt.system.cli import ArgumentParser, run_command
from ngpt.system.device import mixed_precision, pick_device
from ngpt.system.memory import peak_memory, reset_peak_memory
from ngpt.system.timing import interleave, print_metrics, speed_ratio, time_call
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import read_batch, train_step
from ngpt.training.throughput import benchmark_run, step_speed

MODES = ("eager", "compiled")
Value = TypeVar("Value")


def compare_with_peer(
    config: TrainConfig, peer: Path, *, modes: Sequence[str] = MODES, seconds: float = 30.0
) -> dict[str, Any]:
    """Times both training steps on the same shape and data, in alternation, each variant in its own process.

    Returns the fields of the benchmark `step`, for the last of the modes, and ratio_eager and ratio_compiled (our
    tokens per second over the peer's, the median over the rounds), memory_ratio_eager and memory_ratio_compiled (our
    peak memory over the peer's, including Python and torch). The field contestants holds, for each of ours_eager,
    peer_eager, ours_compiled and peer_compiled: tokens_per_second, step_ms, best_ms, n_params, peak_memory_bytes and
    start_memory_bytes (of the process before it had a model).
    """
    config = resolved(config)
    device = pick_device(config.device)
    open_dataset(config.data)  # prepares the corpus once, rather than in all processes concurrently
    load_peer(peer)  # reports a wrong path before any process starts
    variants: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = {
            f"{side}_{mode}": stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
            for mode in modes
            for side in ("ours", "peer")
        }
        for name, pool in pools.items():
            side, mode = name.split("_")
            path = peer if side == "peer" else None
            variants[name] = pool.submit(_set_up, config, path, mode, torch.get_num_threads()).result()
        steps = {name: functools.partial(_result, pool, _timed_step) for name, pool in pools.items()}
        times = interleave(steps, seconds=seconds, warmup=3)
        for name, pool in pools.items():
            variants[name]["peak_memory_bytes"] = _result(pool, _peak_memory)
    for name, taken in times.items():
        median = statistics.median(taken)
        speed = {"tokens_per_second": config.tokens_per_step / median, "step_ms": median * 1000}
        variants[name] |= speed | {"best_ms": min(taken) * 1000}
    last = modes[-1]
    metrics = step_speed(config, device, statistics.median(times[f"ours_{last}"]))
    metrics |= {"compiled": last == "compiled", "peer": str(peer)}
    for mode in modes:
        metrics[f"ratio_{mode}"] = speed_ratio(times[f"ours_{mode}"], times[f"peer_{mode}"])
        ours, theirs = (variants[f"{side}_{mode}"]["peak_memory_bytes"] for side in ("ours", "peer"))
        metrics[f"memory_ratio_{mode}"] = ours / theirs
    metrics["peak_memory_bytes"] = variants[f"ours_{last}"]["peak_memory_bytes"]
    return metrics | {"contestants": variants}


def load_peer(path: Path) -> ModuleType:
    """Imports the module at `path`. If flash_attn is not installed, torch's attention replaces it.

    Raises:
        ConfigError: the file does not exist, or does not define GPT and GPTConfig.
    """
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    name = f"ngpt_peer_{hashlib.sha256(path.read_bytes()).hexdigest()[:10]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses and the compiler look it up there
    with _flash_attention():
        spec.loader.exec_module(module)
    missing = [name for name in ("GPT", "GPTConfig") if not hasattr(module, name)]
    if missing:
        raise ConfigError(f"{path} does not define {' and '.join(missing)}, as nanoGPT's model.py does")
    return module


def peer_step(path: Path, config: TrainConfig, dataset: Dataset, *, compiled: bool) -> tuple[Callable[[], Tensor], int]:
    """Returns a function that takes a training step as the peer's own train.py does, and the number of parameters.

    Shape, data, learning rate, weight decay, clipping and autocast follow `config`; the optimizer is the peer's own.
    The function returns the loss without waiting for the GPU.

    Raises:
        ConfigError: `load_peer` rejects the file, or the peer has bfloat16 weights and the config computes in float32.
    """
    device, module = pick_device(config.device), load_peer(path)
    torch.manual_seed(config.seed)
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT and nGPT print their size
        model: Any = module.GPT(peer_config(module, config)).to(device)
        optim = config.optim
        optimizer = model.configure_optimizers(optim.weight_decay, optim.lr, optim.betas, device.type)
    has_bfloat16_weights = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if has_bfloat16_weights and config.dtype != "bfloat16":
        raise ConfigError(
            f"{path} keeps weights in bfloat16, so it cannot be compared in {config.dtype}: use dtype=bfloat16"
        )
    is_ngpt = getattr(model.config, "use_nGPT", 0) == 1
    forward = torch.compile(model) if compiled else model
    if is_ngpt:
        normalize_matrices(model)
    step = 0

    def train() -> Tensor:
        """A step with one micro-batch, as in the train.py of nanoGPT and nGPT."""
        nonlocal step
        idx, targets = (part.to(device) for part in read_batch(config, dataset, step))
        with mixed_precision(device, config.dtype):
            _, loss = forward(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if is_ngpt:
            normalize_matrices(model)
        step += 1
        return loss.detach()

    return train, sum(parameter.numel() for parameter in model.parameters())


def peer_config(module: ModuleType, config: TrainConfig) -> Any:
    """Builds the peer's GPTConfig for the shape of `config`, without biases and dropout, and with nGPT if supported."""
    shape = {name: getattr(config.model, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    options = {"bias": False, "dropout": 0.0, "use_nGPT": 1, "base_scale": config.model.n_embd**-0.5}
    known = {field.name for field in dataclasses.fields(module.GPTConfig)}
    return module.GPTConfig(**shape, **{name: value for name, value in options.items() if name in known})


@torch.no_grad()
def normalize_matrices(model: Any) -> None:
    """Projects the peer's weights one by one, as NVIDIA/ngpt's train.py does (normalize_matrices and justnorm)."""

    def normalize(linear: nn.Linear | nn.Embedding, dim: int) -> None:
        exact = linear.weight.data.float()
        linear.weight.data.copy_((exact / exact.norm(p=2, dim=dim, keepdim=True)).to(linear.weight.dtype))

    normalize(model.transformer.wte, 1)
    normalize(model.lm_head, 1)
    for block in model.transformer["h"]:
        for linear in (block.query, block.key, block.value, block.c_fc):
            normalize(linear, 1)
        for linear in (block.att_c_proj, block.mlp_c_proj):
            normalize(linear, 0)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Implements flash_attn's function of this name with torch; q, k, v and the result are (B, T, H, K).

    Raises:
        NotImplementedError: a window or alibi slopes were requested.
    """
    if tuple(window_size) != (-1, -1) or alibi_slopes is not None:
        raise NotImplementedError("torch's attention has neither windows nor alibi slopes")
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    output = F.scaled_dot_product_attention(*heads_first, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale)
    return output.transpose(1, 2)


def flash_attn_qkvpacked_func(qkv: Tensor, **options: Any) -> Tensor:
    """`flash_attn_func` for q, k and v in one tensor (B, T, 3, H, K)."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, **options)


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """Makes `import flash_attn` return the two functions above, if the package is not installed."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    substitute: Any = ModuleType("flash_attn")
    substitute.flash_attn_func, substitute.flash_attn_qkvpacked_func = flash_attn_func, flash_attn_qkvpacked_func
    sys.modules["flash_attn"] = substitute
    try:
        yield
    finally:
        del sys.modules["flash_attn"]


# ---- in the process of one variant ----------------------------------------------------------------------------------

_variant: list[tuple[Callable[[], object], torch.device]] = []  # the step of this process, set by `_set_up`


def _set_up(config: TrainConfig, peer: Path | None, mode: str, threads: int) -> dict[str, int]:
    """Sets up our training step, or the peer's, and takes the first step, which may compile."""
    torch.set_num_threads(threads)
    device, dataset = pick_device(config.device), open_dataset(config.data)
    reset_peak_memory(device)
    start_memory = peak_memory(device)
    if peer is None:
        run = benchmark_run(config, dataset=dataset, compile=mode == "compiled")
        n_params = sum(parameter.numel() for parameter in run.model.parameters())
        step: Callable[[], object] = functools.partial(train_step, run)
    else:
        step, n_params = peer_step(peer, config, dataset, compiled=mode == "compiled")
    step()
    _variant.append((step, device))
    return {"n_params": n_params, "start_memory_bytes": start_memory}


def _timed_step() -> float:
    return time_call(*_variant[0])


def _peak_memory() -> int:
    """Returns the peak memory over three steps."""
    step, device = _variant[0]
    reset_peak_memory(device)
    for _ in range(3):
        step()
    return peak_memory(device)


def _result(pool: ProcessPoolExecutor, function: Callable[[], Value]) -> Value:
    return pool.submit(function).result()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m benchmarks.peers",
        description=f"{__doc__}\n{inspect.getdoc(compare_with_peer)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("peer", type=Path, metavar="MODEL.PY", help="the model.py of nanoGPT or of the official nGPT")
    add_config_arguments(parser)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure after the warm-up; default 30")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    options = parser.parse_args(arguments)
    return run_command(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    path = options.peer.expanduser().absolute()
    metrics = compare_with_peer(config_of(options), path, modes=options.modes, seconds=options.seconds)
    print_metrics(metrics, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
