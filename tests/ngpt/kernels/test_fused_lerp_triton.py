"""The Triton kernels against float64, on a GPU or in Triton's interpreter. Skipped without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngpt.kernels import fused_lerp as fused
from ngpt.kernels.fused_lerp import fused_lerp
from ngpt.model import residual
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from tests.helpers.numpy_gpt import RULES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
triton = pytest.importorskip("triton", minversion=None if DEVICE.type == "cuda" else "3.7")  # 3.6 needs NumPy < 2.4

from ngpt.kernels import fused_lerp_triton  # noqa: E402

FLOATS, HALVES = torch.float32, torch.bfloat16
FORWARD, BACKWARD = 1e-6, 1e-5  # relative to the largest entry of a row
ROUNDING = 2.0**-7  # as above, in bfloat16 (8 bits): a GPU rounds to nearest, the interpreter truncates


def random(*shape: int, number: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def exact(x: Tensor, f: Tensor, alpha: Tensor) -> Tensor:
    return F.normalize(torch.lerp(F.normalize(x, dim=-1), F.normalize(f, dim=-1), alpha), dim=-1)


def value_and_gradients(
    formulation: object, tensors: list[Tensor], towards: Tensor, dtype: torch.dtype | None
) -> list[Tensor]:
    """The value and the gradients of three leaves, converted to `dtype` unless it is None."""
    leaves = [tensor.detach().to(DEVICE, dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]
    y = formulation(*leaves)  # pyright: ignore[reportCallIssue]
    y.backward(towards.to(y))
    return [y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]


def check(tensors: list[Tensor], towards: Tensor) -> None:
    """Compares each row relative to its largest entry, since the gradient of a zero vector is 1e12 times larger."""
    x, f, alpha = tensors
    actual = value_and_gradients(fused_lerp, tensors, towards, None)
    expected = value_and_gradients(exact, [x, f, alpha.expand(x.shape[-1])], towards, torch.float64)
    sizes = [tensor.abs().amax(-1, keepdim=True) for tensor in expected]
    if alpha.numel() == 1:  # a sum over the channels, which may cancel
        sizes[3] = expected[3].abs().sum().expand(alpha.shape)
        expected[3] = expected[3].sum().expand(alpha.shape)
    for result, reference, size, operand in zip(actual, expected, sizes, [None, *tensors], strict=True):
        assert result.dtype == (FLOATS if operand is None else operand.dtype)
        assert result.shape == reference.shape
        tolerance = FORWARD if operand is None else BACKWARD if operand.dtype == FLOATS else ROUNDING
        wrong = (result.double() - reference).abs() / size.clamp(min=1e-30)
        assert wrong.max() < tolerance


@settings(max_examples=25)
@given(
    number=st.integers(0, 10_000),
    tokens=st.integers(1, 4),
    width=st.integers(8, 70),
    x_dtype=st.sampled_from([FLOATS, HALVES]),
    f_dtype=st.sampled_from([FLOATS, HALVES]),
    alpha=st.sampled_from(["vector", "scalar", "number"]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    zero=st.sampled_from(["none", "x", "f", "both"]),
)
@example(0, 3, 64, FLOATS, FLOATS, "vector", 1.0, "both")
@example(0, 2, 300, FLOATS, HALVES, "scalar", 1.0, "none")
def test_value_and_gradients_match_the_formula_in_float64(
    number: int,
    tokens: int,
    width: int,
    x_dtype: torch.dtype,
    f_dtype: torch.dtype,
    alpha: str,
    scale: float,
    zero: str,
) -> None:
    x, f = random(tokens, width, number=number), scale * random(tokens, width, number=number + 1)
    if zero in ("x", "both"):
        x[0] = 0
    if zero in ("f", "both"):
        f[0] = 0
    shape = {"vector": (width,), "scalar": (1,), "number": ()}[alpha]
    step = random(*shape, number=number + 2).abs().clamp(max=0.9)
    check([x.to(x_dtype), f.to(f_dtype), step], random(tokens, width, number=number + 3))


@pytest.mark.parametrize("width", [1024, 1500, 4096])
def test_wide_rows_match_the_formula(width: int) -> None:
    check(
        [random(2, width), random(2, width, number=1).bfloat16(), random(width, number=3).sigmoid()],
        random(2, width, number=2),
    )


def test_zero_vector_stays_zero() -> None:
    zero = torch.zeros(2, 12, device=DEVICE)
    assert torch.equal(fused_lerp(zero, zero, torch.full((12,), 0.3, device=DEVICE)), zero)


def test_vector_shorter_than_eps_is_divided_by_eps() -> None:
    x, f, towards = random(1, 12), random(1, 12, number=1), random(1, 12, number=2)
    check([1e-13 * x, f, torch.full((12,), 0.3)], towards)
    check([x, 1e-13 * f, torch.full((12,), 0.3)], towards)


def test_gradients_match_finite_differences_of_the_formula() -> None:
    """Central differences of the NumPy formula, for x on the sphere, as the formula assumes, and any f."""
    x, f, alpha, towards = (
        F.normalize(random(1, 9)),
        random(1, 9, number=1),
        random(9, number=3).sigmoid(),
        random(1, 9, number=2),
    )
    _, gx, *found = value_and_gradients(fused_lerp, [x, f, alpha], towards, None)
    arrays = [x.double().numpy(), f.double().numpy(), alpha.double().numpy()]

    def value(at: list[np.ndarray]) -> float:
        return float((RULES["lerp"](at[0] / np.linalg.norm(at[0]), *at[1:]) * towards.double().numpy()).sum())

    for position, gradient in enumerate([gx, *found]):
        for entry in np.ndindex(*gradient.shape):
            either = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[position][entry] += sign * 1e-6
                either.append(value(moved))
            assert float(gradient[entry]) == pytest.approx((either[0] - either[1]) / 2e-6, abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 6, 7, 20])
def test_gradients_of_alpha_are_summed_over_the_tokens_of_a_program(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, towards = (
        [random(tokens, 12), random(tokens, 12, number=1), random(12, number=3).sigmoid()],
        random(tokens, 12, number=2),
    )
    alone = value_and_gradients(fused_lerp, given, towards, None)
    monkeypatch.setattr(fused_lerp_triton, "BACKWARD_WARPS", 3)  # the last program has fewer tokens
    check(given, towards)
    together = value_and_gradients(fused_lerp, given, towards, None)
    for one, other in zip(alone[:3], together[:3], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(together[3], value_and_gradients(fused_lerp, given, towards, None)[3])


def test_noncontiguous_tensors_are_read_correctly() -> None:
    x, f, alpha = random(12, 3, 2).permute(2, 1, 0), random(2, 3, 24)[..., ::2], random(24, number=3).sigmoid()[::2]
    check([x.contiguous(), f.contiguous(), alpha.contiguous()], torch.ones(2, 3, 12))
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (x, f, alpha)]
    fused_lerp(*leaves).sum().backward()  # the gradient of a sum is an expanded number
    packed = value_and_gradients(
        fused_lerp, [x.contiguous(), f.contiguous(), alpha.contiguous()], torch.ones(2, 3, 12), None
    )
    for leaf, expected in zip(leaves, packed[1:], strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad.cpu(), expected)


def test_only_the_operands_are_saved_for_backward() -> None:
    given = [
        tensor.to(DEVICE).requires_grad_() for tensor in (random(2, 12), random(2, 12, number=1), random(12, number=3))
    ]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda t: t):
        fused_lerp(*given)
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in given)


def test_second_derivative_is_refused() -> None:
    x = random(2, 12).to(DEVICE).requires_grad_()
    y = fused_lerp(x, x, random(12, number=3).to(DEVICE))
    (gradient,) = torch.autograd.grad(y.square().sum() + y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtypes", [(FLOATS, FLOATS), (FLOATS, HALVES)])
def test_check_passes_and_leaves_the_random_state_alone(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHECKED_TOKENS", 8)  # the interpreter is slow
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
        assert fused.is_correct.__wrapped__(DEVICE, 48, *dtypes)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("result", range(3))
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_check_detects_a_wrong_gradient(result: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = fused_lerp_triton.backward

    def wrong(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient * (factor if n == result else 1) for n, gradient in enumerate(backward(*given)))

    monkeypatch.setattr(fused_lerp_triton, "backward", wrong)
    monkeypatch.setattr(fused, "CHECKED_TOKENS", 8)
    assert not fused.is_correct.__wrapped__(DEVICE, 16, FLOATS, FLOATS)


@pytest.mark.parametrize("alpha_kind", ["vector", "scalar", "head"])
def test_model_has_the_same_loss_and_gradients_with_the_kernels(
    alpha_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=6, vocab_size=31, alpha_kind=alpha_kind)
    idx = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outcomes = []
    for should_fuse in (lambda *_: False, fused.supports):
        monkeypatch.setattr(residual, "should_fuse", should_fuse)
        model = GPT(config).to(DEVICE)
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        outcomes.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, plain, atol=BACKWARD * float(plain.abs().max()), rtol=0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the other tests compile the kernels")
def test_kernels_compile_for_other_gpus(tmp_path: Path) -> None:
    code = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ngpt.kernels import fused_lerp_triton

for kernel in (fused_lerp_triton._forward, fused_lerp_triton._backward):
    types = {name: "i32" for name in kernel.arg_names} | {"BLOCK": "constexpr"}
    types |= {name: "*bf16" if name in ("f_start", "gf_start") else "*fp32" for name in types if "start" in name}
    for capability, width in ((80, 100), (90, 4096)):
        block, warps = fused_lerp_triton._sizes(width)
        source = ASTSource(fn=kernel, signature=types, constexprs={"BLOCK": block})
        made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert "sqrt.rn.f32" in made.asm["ptx"] and "div.rn.f32" in made.asm["ptx"] and "atom" not in made.asm["ptx"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
