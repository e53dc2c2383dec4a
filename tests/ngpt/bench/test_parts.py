"""Each part computes the same as its reference, and its figures agree with each other."""

import copy

import pytest
import torch

from ngpt.bench import parts
from ngpt.config.base import ConfigError, build, override
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.optim.optimizers import OPTIMIZERS, OptimConfig, build_optimizers
from ngpt.training.config import TrainConfig

MODEL = build(ModelConfig, {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 31, "mlp": "relu2"})


def check_floor(figures: parts.BenchMetrics) -> None:
    assert figures["floor_share"] == pytest.approx(figures["floor_ms"] / figures["ms"])
    assert figures["floor_ms"] >= figures["moved_bytes"] / figures["copy_gb_per_second"] / 1e6 * 0.999


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.residual": "add", "model.softcap": 15.0},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),  # many processors emulate it
    ],
)
def test_the_fused_loss_equals_the_plain_one(changes: dict[str, object], tiny: TrainConfig) -> None:
    figures = parts.loss(override(tiny, changes), seconds=0)
    assert figures["difference"] < (2e-2 if "dtype" in changes else 1e-5)
    assert (figures["rows"], figures["n_embd"], figures["vocab_size"]) == (64, 16, 400)
    flops = 6 * 64 * 16 * 400
    assert figures["gemm_share"] == pytest.approx(flops / figures["ms"] / figures["gemm_tflops"] / 1e9)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_residual_step_equals_its_formula(dtype: str, tiny: TrainConfig) -> None:
    figures = parts.residual(override(tiny, {"dtype": dtype}), seconds=0)
    assert figures["kernel"] == "torch"
    assert figures["difference"] < 1e-6
    answer = {"float32": 4, "bfloat16": 2}[dtype]
    assert figures["moved_bytes"] == 4 * 16 * 16 * (4 + answer + 4 + 4 + answer + 4 + 4 + answer)
    check_floor(figures)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised while torch's compiler loads
def test_a_compiled_residual_step_equals_its_formula(tiny: TrainConfig) -> None:
    figures = parts.residual(override(tiny, {"compile": True}), seconds=0)
    assert figures["kernel"] == "inductor"
    assert figures["difference"] < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_reference(name: str, tiny: TrainConfig) -> None:
    figures = parts.optimizer(override(tiny, {"optim.name": name}), seconds=0)
    assert figures["ratio"] > 0
    check_floor(figures)


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-5), ("muon", 0.03)])  # torch's Muon computes in bfloat16
def test_the_reference_optimizer_takes_the_same_steps(name: str, tolerance: float) -> None:
    model = GPT(MODEL)
    other, start = copy.deepcopy(model), copy.deepcopy(model)
    cfg = OptimConfig(name=name, lr=0.01)
    optimizers = [build_optimizers(model, cfg), parts._reference_optimizers(other, cfg)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        for members in optimizers:
            for member in members:
                member.step()
    for one, two, three in zip(model.parameters(), other.parameters(), start.parameters(), strict=True):
        assert (one - two).norm() < tolerance * (one - three).norm()


def test_the_work_of_an_optimizer_equals_a_count_by_hand() -> None:
    model = GPT(MODEL)
    blocks, other = 4 * 16 * 16 + 2 * 16 * 64, 2 * 31 * 16
    scales = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert parts._optimizer_work(model, OptimConfig()) == (28 * (blocks + other + scales), 0)
    # Per iteration: x x^T, its square, and that times x, with 2 FLOPs per product.
    square, wide = 3 * 2 * 16**3, 2 * 16 * 16 * 64 + 2 * 16**3 + 2 * 16 * 16 * 64
    expected = (20 * blocks + 28 * (other + scales), 5 * (4 * square + 2 * wide))
    assert parts._optimizer_work(model, OptimConfig(name="muon")) == expected


def test_a_projection_is_compared_with_a_step(tiny: TrainConfig) -> None:
    figures = parts.projection(tiny, seconds=0)
    assert figures["share"] == pytest.approx(figures["ms"] / figures["step_ms"])
    model = GPT(override(tiny, {"model.vocab_size": 400}).model)
    assert figures["moved_bytes"] == 8 * sum(p.numel() for p in model.parameters() if p.ndim == 2)
    check_floor(figures)
    with pytest.raises(ConfigError, match="nothing to project"):
        parts.projection(override(tiny, {"model.residual": "add"}), seconds=0)


def test_the_loader_is_compared_with_a_step(tiny: TrainConfig) -> None:
    figures = parts.loader(tiny, seconds=0)
    assert figures["steps_ratio"] == pytest.approx(figures["step_ms"] / figures["ms"])
    assert figures["tokens_per_second"] == pytest.approx(4 * 16 / figures["ms"] * 1000)
    check_floor(figures)


def test_generation_is_measured_in_tokens(tiny: TrainConfig) -> None:
    figures = parts.generate(tiny, seconds=0)
    assert figures["tokens"] == 8
    assert figures["tokens_per_second"] == pytest.approx(8000 / figures["ms"])
    assert figures["reference_tokens_per_second"] == pytest.approx(8000 / figures["reference_ms"])
    check_floor(figures)


def test_a_checkpoint_is_compared_with_a_plain_save_and_with_the_steps_between_two(tiny: TrainConfig) -> None:
    figures = parts.checkpoint(override(tiny, {"checkpoint.every": 50}), seconds=0)
    assert figures["share"] == pytest.approx(figures["ms"] / (50 * figures["step_ms"]))
    assert figures["best_ms"] <= figures["ms"] and figures["ratio"] > 0
    weights = 4 * 2 * 400 * 16  # embedding and head alone, float32
    assert figures["saved_bytes"] > 3 * weights  # with Adam's two moments
