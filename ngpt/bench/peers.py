"""Public implementations as contestants: the `model.py` of nanoGPT, and of anything that is built like it, as it is.

Such a file defines `GPTConfig`, a dataclass, and `GPT` with `forward(idx, targets) -> (logits, loss)` and
`configure_optimizers(weight_decay, learning_rate, betas, device_type)`. karpathy/nanoGPT and NVIDIA/ngpt do. What the
official nGPT does outside of its model.py, in train.py, is done here: the projection after each step.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
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

from ngpt.config.base import ConfigError
from ngpt.data.dataset import Dataset, open_dataset
from ngpt.system.device import mixed_precision, pick_device
from ngpt.system.memory import peak_memory, reset_peak_memory
from ngpt.system.timing import ratio, take_turns, timed
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.throughput import prepared, step_figures

MODES = ("eager", "compiled")
Value = TypeVar("Value")
from ngpt.training.loop import read_batch


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
    figures = step_figures(config, device, statistics.median(times[f"ours_{modes[-1]}"]))
    figures |= {"compiled": modes[-1] == "compiled", "peer": str(peer)}
    for mode in modes:
        figures[f"ratio_{mode}"] = ratio(times[f"ours_{mode}"], times[f"peer_{mode}"])
        ours, theirs = (contestants[f"{who}_{mode}"]["peak_memory_bytes"] for who in ("ours", "peer"))
        figures[f"memory_ratio_{mode}"] = ours / theirs
    figures["peak_memory_bytes"] = contestants[f"ours_{modes[-1]}"]["peak_memory_bytes"]
    return figures | {"contestants": contestants}


def load_peer(path: Path) -> ModuleType:
    """The module at `path`; where flash_attn is not installed, its attention is torch's.

    Raises:
        ConfigError: there is no such file, or it does not define GPT and GPTConfig.
    """
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    name = f"ngpt_peer_{hashlib.sha256(path.read_bytes()).hexdigest()[:10]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses and the compiler look
    with _flash_attention():
        spec.loader.exec_module(module)
    missing = [wanted for wanted in ("GPT", "GPTConfig") if not hasattr(module, wanted)]
    if missing:
        raise ConfigError(f"{path} does not define {' and '.join(missing)}, as nanoGPT's model.py does")
    return module


def peer_step(path: Path, config: TrainConfig, dataset: Dataset, *, compiled: bool) -> tuple[Callable[[], Tensor], int]:
    """One training step of the implementation at `path`, as its own train.py makes it, and its parameters' number.

    The shape, the data, the learning rate, weight decay, clipping and autocast are those of `config`; the optimizer is
    its own. Calling the step gives the loss, which is not waited for.

    Raises:
        ConfigError: the file is none of this kind, or keeps weights in bfloat16 where the config computes in float32.
    """
    device, module = pick_device(config.device), load_peer(path)
    torch.manual_seed(config.seed)
    with contextlib.redirect_stdout(sys.stderr):  # they say how large they are
        model: Any = module.GPT(peer_config(module, config)).to(device)
        optim = config.optim
        optimizer = model.configure_optimizers(optim.weight_decay, optim.lr, optim.betas, device.type)
    rounded = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if rounded and config.dtype != "bfloat16":
        raise ConfigError(
            f"{path} keeps weights in bfloat16, so it cannot be compared in {config.dtype}: dtype=bfloat16"
        )
    on_sphere = getattr(model.config, "use_nGPT", 0) == 1
    forward = torch.compile(model) if compiled else model
    if on_sphere:
        normalize_matrices(model)
    step = 0

    def train() -> Tensor:
        """A step as nanoGPT's and nGPT's train.py take it, one micro-batch large."""
        nonlocal step
        idx, targets = (part.to(device) for part in read_batch(config, dataset, step))
        with mixed_precision(device, config.dtype):
            _, loss = forward(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_sphere:
            normalize_matrices(model)
        step += 1
        return loss.detach()

    return train, sum(parameter.numel() for parameter in model.parameters())


def peer_config(module: ModuleType, config: TrainConfig) -> Any:
    """The peer's GPTConfig for the shape of `config`, without biases and dropout; NVIDIA's as an nGPT."""
    shape = {name: getattr(config.model, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    own = {"bias": False, "dropout": 0.0, "use_nGPT": 1, "base_scale": config.model.n_embd**-0.5}
    known = {field.name for field in dataclasses.fields(module.GPTConfig)}
    return module.GPTConfig(**shape, **{name: value for name, value in own.items() if name in known})


@torch.no_grad()
def normalize_matrices(model: Any) -> None:
    """The projection of NVIDIA/ngpt, train.py (normalize_matrices and justnorm), on its own model, weight by weight."""

    def put(linear: nn.Linear | nn.Embedding, dim: int) -> None:
        exact = linear.weight.data.float()
        linear.weight.data.copy_((exact / exact.norm(p=2, dim=dim, keepdim=True)).to(linear.weight.dtype))

    put(model.transformer.wte, 1)
    put(model.lm_head, 1)
    for block in model.transformer["h"]:
        for linear in (block.query, block.key, block.value, block.c_fc):
            put(linear, 1)
        for linear in (block.att_c_proj, block.mlp_c_proj):
            put(linear, 0)


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
    """flash_attn's function of this name by torch's attention; q, k, v and the result are (B, T, H, K).

    Raises:
        NotImplementedError: a window or alibi slopes, which torch's does not have.
    """
    if tuple(window_size) != (-1, -1) or alibi_slopes is not None:
        raise NotImplementedError("torch's attention has neither windows nor alibi slopes")
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mixed = F.scaled_dot_product_attention(*heads_first, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale)
    return mixed.transpose(1, 2)


def flash_attn_qkvpacked_func(qkv: Tensor, **options: Any) -> Tensor:
    """The same for q, k and v in one tensor (B, T, 3, H, K)."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, **options)


@contextlib.contextmanager
def _flash_attention() -> Iterator[None]:
    """While this is on, `import flash_attn` finds the two functions above, unless it is installed."""
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
