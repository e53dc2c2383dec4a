"""Times the parts of a training step and a checkpoint, each against the plain torch formulation that it replaces."""

import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import open_dataset
from ngpt.generate import generate_tokens
from ngpt.kernels.compile import compile_for
from ngpt.kernels.fused_lerp import should_fuse
from ngpt.kernels.linear_cross_entropy import linear_cross_entropy
from ngpt.model.flops import matrix_params
from ngpt.model.gpt import GPT
from ngpt.model.residual import lerp
from ngpt.optim.optimizers import ON_SPHERE, OptimConfig, build_optimizers, parameters_by_kind
from ngpt.optim.projection import project_weights
from ngpt.system.device import DTYPES, mixed_precision, pick_device
from ngpt.system.timing import compare_times, copy_bandwidth, gemm_flops, interleave, machine_info, timers
from ngpt.training.checkpoint import checkpoint_folders
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import read_batch, train_step
from ngpt.training.saving import save
from ngpt.training.throughput import benchmark_run
from ngpt.training.tracker import Tracker

BenchMetrics = dict[str, Any]
FLOAT_BYTES = 4  # weights, gradients and moments are float32
FIRST_BATCH = 10**6  # for the loader benchmark: far beyond the batches that its training run reads


def loss(config: TrainConfig, *, seconds: float = 10.0) -> BenchMetrics:
    """Fused head and loss, forward and backward, against F.linear, the logit scale and F.cross_entropy.

    Returns ms, best_ms, reference_ms, ratio; difference (of the two losses, in nats); gemm_tflops; gemm_share (the
    share of that rate that the three matrix products of forward and backward reach).
    """
    config = resolved(config)
    device, model = pick_device(config.device), config.model
    assert model.vocab_size is not None
    rows, vocabulary = (config.micro_batch_size or config.batch_size) * model.block_size, model.vocab_size
    generator = torch.Generator().manual_seed(config.seed)
    x, weight = (
        F.normalize(torch.randn(count, model.n_embd, generator=generator)).to(device).requires_grad_()
        for count in (rows, vocabulary)
    )
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    scale = torch.full((vocabulary,), 10.0, device=device, requires_grad=True) if model.on_sphere else None
    leaves = [leaf for leaf in (x, weight, scale) if leaf is not None]

    def ours() -> Tensor:
        return linear_cross_entropy(x, weight, targets, scale=scale, softcap=model.softcap, compiled=config.compile)

    def plain() -> Tensor:
        logits = F.linear(x, weight)
        logits = logits if scale is None else scale * logits
        logits = logits if model.softcap is None else model.softcap * torch.tanh(logits / model.softcap)
        return F.cross_entropy(logits.float(), targets)

    def forward_backward(formulation: Callable[[], Tensor]) -> Tensor:
        with mixed_precision(device, config.dtype):
            value = formulation()
        torch.autograd.grad(value, leaves)
        return value.detach()

    difference = float((forward_backward(ours) - forward_backward(plain)).abs())
    variants = {"ours": lambda: forward_backward(ours), "plain": lambda: forward_backward(plain)}
    times = interleave(timers(variants, device), seconds=seconds)
    metrics, ceiling = compare_times(times["ours"], times["plain"]), gemm_flops(device, DTYPES[config.dtype])
    share = 6 * rows * model.n_embd * vocabulary / (metrics["ms"] / 1000) / ceiling
    sizes = {"rows": rows, "vocab_size": vocabulary, "n_embd": model.n_embd, "compiled": config.compile}
    rates = {"difference": difference, "gemm_tflops": ceiling / 1e12, "gemm_share": share}
    return metrics | rates | sizes | machine_info(device, config.dtype)


def residual(config: TrainConfig, *, seconds: float = 10.0) -> BenchMetrics:
    """One step of the residual rule lerp, forward and backward, against uncompiled F.normalize and additions.

    Returns ms, best_ms, reference_ms, ratio; kernel (inductor with --compile, else triton on a GPU that has it, else
    torch, which equals the reference); difference (of the two results); moved_bytes (forward reads stream and branch
    and writes the stream; backward reads both and a gradient and writes two gradients); copy_gb_per_second, floor_ms
    and floor_share as for `projection`.
    """
    config = resolved(config)
    device, width = pick_device(config.device), config.model.n_embd
    rows, length = config.micro_batch_size or config.batch_size, config.model.block_size
    generator = torch.Generator().manual_seed(config.seed)
    shapes = [(rows, length, width)] * 3 + [(width,)]
    random = (torch.randn(shape, generator=generator) for shape in shapes)
    x, f, grad_output, alpha = (F.normalize(tensor, dim=-1).to(device) for tensor in random)
    f = f.to(DTYPES[config.dtype])  # the dtype of a matrix product's output
    leaves = [leaf.requires_grad_() for leaf in (x, f, alpha)]
    kernel = "inductor" if config.compile else "triton" if should_fuse(x, f, alpha) else "torch"
    step = compile_for("lerp", lerp) if config.compile else lerp

    def plain(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
        x, f = F.normalize(x, dim=-1), F.normalize(f.float(), dim=-1)
        return F.normalize(x + alpha * (f - x), dim=-1)

    def forward_backward(formulation: Callable[..., Tensor]) -> Tensor:
        y = formulation(x, f, alpha)
        torch.autograd.grad(y, leaves, grad_output)
        return y.detach()

    difference = float((forward_backward(step) - forward_backward(plain)).abs().max())
    variants = {"ours": lambda: forward_backward(step), "plain": lambda: forward_backward(plain)}
    times = interleave(timers(variants, device), seconds=seconds)
    metrics = compare_times(times["ours"], times["plain"])
    metrics |= {"kernel": kernel, "difference": difference, "rows": rows * length, "n_embd": width}
    moved_bytes = x.numel() * (5 * FLOAT_BYTES + 3 * f.element_size())
    return metrics | _floor(config, device, moved_bytes, 0, times["ours"])


def optimizer(config: TrainConfig, *, seconds: float = 10.0) -> BenchMetrics:
    """The optimizer `optim.name`, against torch.optim's, one tensor at a time.

    The reference is torch.optim.AdamW, with torch.optim.Muon for the matrices if the name contains muon. For optimizers
    that move weights along the sphere, the reference also projects the weights, one at a time. Returns ms, best_ms,
    reference_ms, ratio; moved_bytes (parameters, gradients and moments, each once); copy_gb_per_second and gemm_tflops
    (of this machine); floor_ms (time for the bytes at the first rate plus the Newton-Schulz products at the second);
    floor_share (floor_ms over ms; 1 is the limit).
    """
    config = resolved(config)
    device = pick_device(config.device)
    model = GPT(config.model, seed=config.seed).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator).to(device)
    other = copy.deepcopy(model)
    for own, copied in zip(model.parameters(), other.parameters(), strict=True):
        copied.grad = None if own.grad is None else own.grad.clone()
    optimizers, plain = build_optimizers(model, config.optim), _reference_optimizers(other, config.optim)

    def step(optimizers: list[torch.optim.Optimizer], *, project: bool) -> None:
        with mixed_precision(device, config.dtype):
            for optimizer in optimizers:
                optimizer.step()
        if project:
            _project_individually(other)

    on_sphere = config.optim.name in ON_SPHERE
    variants = {"ours": lambda: step(optimizers, project=False), "plain": lambda: step(plain, project=on_sphere)}
    times = interleave(timers(variants, device), seconds=seconds)
    moved_bytes, flops = _optimizer_work(model, config.optim)
    return compare_times(times["ours"], times["plain"]) | _floor(config, device, moved_bytes, flops, times["ours"])


def projection(config: TrainConfig, *, seconds: float = 10.0) -> BenchMetrics:
    """Projection onto the sphere between real training steps, against F.normalize of one weight at a time.

    Returns ms, best_ms, reference_ms, ratio; step_ms (without projection) and share (ms over step_ms, the overhead of
    `project_every: 1`); moved_bytes (each weight read and written once), copy_gb_per_second, floor_ms (time for the
    bytes at that rate) and floor_share (floor_ms over ms; 1 is the limit).
    """
    config = resolved(config)
    if not config.model.on_sphere:
        raise ConfigError(f"a model of residual rule {config.model.residual} has nothing to project")
    run = benchmark_run(config, project_every=10**9)
    variants = {  # a step before each projection, so that both project weights that were just updated
        "step": lambda: train_step(run),
        "ours": lambda: project_weights(run.model),
        "second_step": lambda: train_step(run),
        "plain": lambda: _project_individually(run.model),
    }
    times = interleave(timers(variants, run.device), seconds=seconds)
    metrics = compare_times(times["ours"], times["plain"])
    step_ms = float(np.median(times["step"] + times["second_step"])) * 1000
    metrics |= {"step_ms": step_ms, "share": metrics["ms"] / step_ms}
    moved_bytes = 2 * sum(weight.nbytes for weight, _ in run.model.sphere_weights())
    return metrics | _floor(config, run.device, moved_bytes, 0, times["ours"])


def loader(config: TrainConfig, *, seconds: float = 10.0) -> BenchMetrics:
    """Loading a training batch, against nanoGPT's get_batch, and against the duration of a training step.

    Returns ms, best_ms, reference_ms, ratio; tokens_per_second; step_ms and steps_ratio (step_ms over ms: how many
    times faster than needed); moved_bytes (tokens read, inputs and targets written), copy_gb_per_second, floor_ms and
    floor_share as for `projection`.
    """
    config = resolved(config)
    dataset = open_dataset(config.data)
    run = benchmark_run(config, dataset=dataset)
    rows, width = config.batch_size, config.model.block_size
    numbers = itertools.count(FIRST_BATCH)
    shard, random = max(dataset.train, key=len), np.random.default_rng(config.seed)

    def plain() -> object:  # karpathy/nanoGPT, train.py, get_batch
        starts = random.integers(len(shard) - width, size=rows)
        x = torch.stack([torch.from_numpy(shard[i : i + width].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(shard[i + 1 : i + 1 + width].astype(np.int64)) for i in starts])
        return x, y

    ours = {"ours": lambda: read_batch(config, dataset, next(numbers))}
    variants = ours | {"plain": plain, "step": lambda: train_step(run)}
    times = interleave(timers(variants, run.device), seconds=seconds)
    metrics = compare_times(times["ours"], times["plain"])
    step_ms = float(np.median(times["step"])) * 1000
    tokens, ms = rows * width, metrics["ms"]
    metrics |= {"tokens_per_second": tokens / ms * 1000, "step_ms": step_ms, "steps_ratio": step_ms / ms}
    moved_bytes = tokens * (shard.dtype.itemsize + 2 * np.dtype(np.int64).itemsize)
    return metrics | _floor(config, torch.device("cpu"), moved_bytes, 0, times["ours"])


def generate(config: TrainConfig, *, seconds: float = 10.0) -> BenchMetrics:
    """Generation with cached keys and values, against recomputing the context for each token.

    Returns ms, best_ms, reference_ms (each for `tokens` tokens), ratio; tokens_per_second and
    reference_tokens_per_second; moved_bytes (every matrix read once per token), copy_gb_per_second, floor_ms and
    floor_share as for `projection`.
    """
    config = resolved(config)
    device, tokens = pick_device(config.device), min(64, config.model.block_size // 2)
    model = GPT(config.model, seed=config.seed).to(device).eval()
    prompt = torch.zeros(1, max(1, config.model.block_size - tokens - 1), dtype=torch.int64, device=device)

    def generate(*, cache: bool) -> None:
        with mixed_precision(device, config.dtype):
            for _ in generate_tokens(model, prompt, tokens, generator=torch.Generator().manual_seed(0), cache=cache):
                pass

    variants = {"ours": lambda: generate(cache=True), "plain": lambda: generate(cache=False)}
    times = interleave(timers(variants, device), seconds=seconds, warmup=1)
    metrics = compare_times(times["ours"], times["plain"])
    metrics |= {"tokens": tokens, "tokens_per_second": tokens / metrics["ms"] * 1000}
    metrics |= {"reference_tokens_per_second": tokens / metrics["reference_ms"] * 1000}
    moved_bytes = FLOAT_BYTES * tokens * matrix_params(config.model)
    return metrics | _floor(config, device, moved_bytes, 0, times["ours"])


def checkpoint(config: TrainConfig, *, seconds: float = 10.0) -> BenchMetrics:
    """Compares a checkpoint (with digests, syncs and the removal of old ones) with torch.save of the same state.

    Returns ms, best_ms, reference_ms, ratio; saved_bytes; step_ms (of a training step) and share (checkpoint time over
    training time, with one checkpoint every `checkpoint.every` steps).
    """
    config = override(resolved(config), {"tracker.wandb": "disabled"})
    run = benchmark_run(config)
    with tempfile.TemporaryDirectory() as folder:
        run.out_dir = Path(folder)

        def plain_save() -> None:
            optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
            torch.save({"model": run.model.state_dict(), "optimizers": optimizers}, run.out_dir / "plain.pt")

        with Tracker(config.tracker, run.out_dir, settings={}) as tracker:
            variants = {"step": lambda: train_step(run), "ours": lambda: save(run, tracker), "plain": plain_save}
            times = interleave(timers(variants, run.device), seconds=seconds)
        newest = checkpoint_folders(run.out_dir / "checkpoints")[-1]
        size = sum(path.stat().st_size for path in newest.iterdir())
    metrics = compare_times(times["ours"], times["plain"])
    step_ms = float(np.median(times["step"])) * 1000
    share = metrics["ms"] / (config.checkpoint.every * step_ms)
    return metrics | {"saved_bytes": size, "step_ms": step_ms, "share": share} | machine_info(run.device, config.dtype)


def _floor(config: TrainConfig, device: torch.device, moved_bytes: int, flops: int, times: list[float]) -> BenchMetrics:
    """Returns the minimum time for this traffic and these FLOPs on the machine, and its share of the median time."""
    bandwidth, flops_per_second = copy_bandwidth(device), gemm_flops(device, DTYPES[config.dtype])
    floor = moved_bytes / bandwidth + flops / flops_per_second
    rates = {"copy_gb_per_second": bandwidth / 1e9, "gemm_tflops": flops_per_second / 1e12}
    shares = {"floor_ms": floor * 1000, "floor_share": floor / float(np.median(times))}
    return {"moved_bytes": moved_bytes} | rates | shares | machine_info(device, config.dtype)


@torch.no_grad()
def _project_individually(model: GPT) -> None:
    for weight, dim in model.sphere_weights():
        weight.copy_(F.normalize(weight.float(), dim=dim))


def _reference_optimizers(model: GPT, cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    """Builds torch.optim's own optimizers, which update one tensor at a time."""
    by_kind = parameters_by_kind(model)
    adam = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "weight_decay": cfg.weight_decay}
    if "muon" not in cfg.name:
        return [torch.optim.AdamW(model.parameters(), foreach=False, **adam)]
    rest = [parameter for kind, group in by_kind.items() if kind != "matrices" for parameter in group]
    options = {"momentum": cfg.momentum, "nesterov": cfg.nesterov, "ns_steps": cfg.ns_steps, "adjust_lr_fn": "original"}
    muon = torch.optim.Muon(by_kind["matrices"], lr=cfg.lr, weight_decay=cfg.weight_decay, **options)
    return [muon, torch.optim.AdamW(rest, foreach=False, **adam)]


def _optimizer_work(model: GPT, cfg: OptimConfig) -> tuple[int, int]:
    """Returns the bytes that a step reads and writes, with two moments or one for Muon, and its matrix FLOPs."""
    moved_bytes = flops = 0
    for kind, parameters in parameters_by_kind(model).items():
        is_muon = kind == "matrices" and "muon" in cfg.name
        moved_bytes += sum(parameter.numel() for parameter in parameters) * FLOAT_BYTES * (5 if is_muon else 7)
        if is_muon:
            for parameter in parameters:
                short, long = sorted(parameter.shape)
                flops += cfg.ns_steps * (4 * short**2 * long + 2 * short**3)
    return moved_bytes, flops
