"""The C++ cross-entropy against float64. Skipped on unsupported processors."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngpt.kernels import linear_cross_entropy as loss
from ngpt.kernels.build import load_native
from ngpt.kernels.cpu_cross_entropy import cpu_cross_entropy
from ngpt.kernels.linear_cross_entropy import linear_cross_entropy

WIDTH, VOCABULARY = 32, 113  # two full panels of 48 and a partial one
Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


@pytest.fixture(scope="module", autouse=True)
def require_kernel() -> None:
    if not hasattr(load_native("cpu_cross_entropy"), "cpu_cross_entropy"):
        pytest.skip("this processor has no AVX512_BF16, or has AMX")


def inputs(
    n: int, *, vocabulary: int = VOCABULARY, width: int = WIDTH, scales: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x in bfloat16, weight and scale in float32, targets (N, 1). Logits are a few units large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator).bfloat16()
    weight = torch.randn(vocabulary, width, generator=generator) / 4
    scale = 0.5 + torch.rand(scales, generator=generator) if scales else None
    return x, weight, scale, torch.randint(vocabulary, (n, 1), generator=generator)


def run_kernel(*given: Tensor | None, rows: int = 16) -> list[Tensor]:
    """Loss and gradients of the kernel, which must accept these inputs."""
    x, weight, scale, targets = given
    assert x is not None and weight is not None and targets is not None
    found = cpu_cross_entropy(x, weight, scale, targets, rows=rows, gradients=True)
    assert found is not None
    return [part for part in found if part is not None]


def exact(x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor) -> list[Tensor]:
    """Loss and gradients in float64, from the factors rounded to bfloat16 as in the kernel."""
    factor = (weight if scale is None else weight * scale[:, None]).bfloat16().double().requires_grad_()
    x = x.double().requires_grad_()
    value = F.cross_entropy(F.linear(x, factor), targets[:, 0])
    for_x, for_factor = torch.autograd.grad(value, (x, factor))
    if scale is None:
        return [value.detach(), for_x, for_factor]
    for_scale = (for_factor * weight).sum(1).sum_to_size(scale.shape)
    return [value.detach(), for_x, for_factor * scale[:, None], for_scale]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the error, relative to the norm of the expected value."""
    return float((found.double() - expected).norm() / expected.norm())


def bfloat16_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values in bfloat16, and their possible error where float32 sums may have crossed a rounding boundary."""
    upper, lower = ((values * (1 + side * 2**-15)).bfloat16().double() for side in (1, -1))
    return (upper + lower) / 2, (upper - lower).abs() / 2


def rounded_gradients(x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Gradients in float64 from exponentials and scaled x in bfloat16, each with its largest possible error."""
    factor = (weight if scale is None else weight * scale[:, None]).bfloat16().double()
    z = x.double() @ factor.T
    others = (z - z.gather(1, targets)).exp().scatter(1, targets, 0)
    total = others.sum(1, keepdim=True)
    share = 1 / ((1 + total) * len(x))
    slope, slack = bfloat16_bounds(others)
    for_x = (slope @ factor - total * factor[targets[:, 0]]) * share
    x_slack = ((slack + 2**-15 * slope) @ factor.abs() + 2**-15 * total * factor[targets[:, 0]].abs()) * share
    slope, slack = bfloat16_bounds(others.scatter(1, targets, -total))
    shares, shares_slack = bfloat16_bounds(x.double() * share)
    for_factor = slope.T @ shares
    size = slope.abs().T @ shares.abs()
    factor_slack = slack.T @ (shares.abs() + shares_slack) + slope.abs().T @ shares_slack + 2**-15 * size
    if scale is None:
        return [(for_x, x_slack), (for_factor, factor_slack)]
    for_scale, scale_slack = (for_factor * weight).sum(1), (factor_slack * weight.abs()).sum(1)
    return [
        (for_x, x_slack),
        (for_factor * scale[:, None], factor_slack * scale[:, None]),
        (for_scale.sum_to_size(scale.shape), scale_slack.sum_to_size(scale.shape)),
    ]


SCALES = ["no scale", "one scale", "a scale per entry"]


def scales(scaled: str, vocabulary: int) -> int:
    return {"no scale": 0, "one scale": 1, "a scale per entry": vocabulary}[scaled]


@given(
    n=st.integers(1, 70),
    vocabulary=st.integers(1, 200),
    width=st.sampled_from([32, 64, 96, 160]),
    rows=st.sampled_from([1, 8, 13, 16, 64, 512]),
    scaled=st.sampled_from(SCALES),
    seed=st.integers(0, 10),
)
def test_errors_stay_within_bfloat16_rounding(
    n: int, vocabulary: int, width: int, rows: int, scaled: str, seed: int
) -> None:
    given = inputs(n, vocabulary=vocabulary, width=width, scales=scales(scaled, vocabulary), seed=seed)
    value, *gradients = run_kernel(*given, rows=rows)
    torch.testing.assert_close(value.double(), exact(*given)[0], rtol=1e-5, atol=1e-6)
    for gradient, (reference, slack) in zip(gradients, rounded_gradients(*given), strict=True):
        assert gradient.shape == reference.shape
        assert ((gradient - reference).abs() <= slack).all()


@pytest.mark.parametrize("scaled", SCALES)
@pytest.mark.parametrize(("n", "vocabulary", "width", "rows"), [(8, 113, 64, 8), (40, 30, 32, 16), (70, 200, 160, 512)])
def test_loss_and_gradients_match_full_logits_in_float64(
    n: int, vocabulary: int, width: int, rows: int, scaled: str
) -> None:
    given = inputs(n, vocabulary=vocabulary, width=width, scales=scales(scaled, vocabulary))
    found, expected = run_kernel(*given, rows=rows), exact(*given)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    # The softmax and the rows of x it is multiplied with are rounded to bfloat16, by at most 2^-8. The norm of many
    # such errors is smaller. The gradient of a scale is a sum of products over a row of the weight and its gradient.
    lengths = [reference.norm() for reference in expected]
    lengths[3:] = [2 * lengths[2] * given[1].norm()] * len(lengths[3:])
    for gradient, reference, length in zip(found[1:], expected[1:], lengths[1:], strict=True):
        assert (gradient - reference).norm() <= 2**-8 * length


def test_loss_is_the_same_without_gradients() -> None:
    x, weight, scale, targets = inputs(50, scales=VOCABULARY)
    alone = cpu_cross_entropy(x, weight, scale, targets, rows=16, gradients=False)
    assert alone is not None and alone[1:] == (None, None, None)
    assert alone[0] == run_kernel(x, weight, scale, targets)[0]


def test_small_loss_of_a_confident_model_stays_accurate() -> None:
    targets = torch.arange(32)[:, None]
    x, weight = torch.eye(32).bfloat16() * 4, torch.eye(32) * 4  # 16 at the target, 0 elsewhere
    value, grad_x, _ = run_kernel(x, weight, None, targets)  # without a scale, two gradients
    expected, gradient, _ = exact(x, weight, None, targets)
    assert float(expected) < 4e-6
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert relative_error(grad_x, gradient) < 2**-8


def test_results_do_not_depend_on_the_number_of_threads(set_threads: Callable[[int], None]) -> None:
    given = inputs(100, scales=1)
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(run_kernel(*given, rows=64))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("above", [60.0, 70.0, 200.0])
def test_logits_far_above_the_target_are_accurate_or_use_the_fallback(above: float) -> None:
    x, weight, _, targets = inputs(20)
    x[7], x[:, 0], weight[3] = 0, 0, 0
    x[7, 0], weight[3, 0], weight[5, 0], targets[7] = 1, above, 0, 5
    found = cpu_cross_entropy(x, weight, None, targets, rows=8, gradients=True)
    if above < 69:
        assert found is not None
        torch.testing.assert_close(found[0].double(), exact(x, weight, None, targets)[0], rtol=1e-5, atol=0)
    else:
        assert found is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_cross_entropy(x, weight, targets[:, 0], compiled=True)
    torch.testing.assert_close(value.double(), exact(x, weight, None, targets)[0], rtol=2**-8, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "weight", "scale"])
def test_nonfinite_values_use_the_fallback(bad: float, where: str) -> None:
    x, weight, scale, targets = inputs(20, scales=VOCABULARY)
    assert scale is not None
    {"x": x, "weight": weight, "scale": scale}[where].view(-1)[11] = bad
    assert cpu_cross_entropy(x, weight, scale, targets, rows=8, gradients=True) is None
    if where != "scale":  # the product of scale and weight would need torch's compiler
        value = linear_cross_entropy(x, weight, targets[:, 0], compiled=True)
        assert not math.isfinite(value)


@pytest.mark.parametrize("bad", [-1, -100, VOCABULARY])
def test_target_outside_the_vocabulary_is_an_error(bad: int) -> None:
    x, weight, _, targets = inputs(20)
    targets[13] = bad
    assert cpu_cross_entropy(x, weight, None, targets, rows=8, gradients=False) is None
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(x, weight, targets[:, 0], compiled=True)


def test_unsupported_widths_and_dtypes_use_the_fallback() -> None:
    x, weight, _, targets = inputs(20, width=48)
    assert cpu_cross_entropy(x, weight, None, targets, rows=8, gradients=True) is None
    x, weight, _, targets = inputs(20)
    assert cpu_cross_entropy(x, weight.bfloat16(), None, targets, rows=8, gradients=True) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # from torch, when it loads inductor
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_compiled_loss_uses_the_kernel_with_gradients_of_weight_and_scale(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, scale, targets = inputs(40, scales=VOCABULARY)
    assert scale is not None
    leaves = [x.float().requires_grad_(), weight.requires_grad_(), scale.requires_grad_()]
    seen: list[Result | None] = []

    def watched(*args: Tensor, rows: int, gradients: bool) -> Result | None:
        seen.append(cpu_cross_entropy(*args, rows=rows, gradients=gradients))
        return seen[-1]

    monkeypatch.setattr(loss, "cpu_cross_entropy", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_cross_entropy(leaves[0], weight, targets[:, 0], scale=scale, compiled=True)
    (value * share).backward()
    assert [found is not None for found in seen] == [True]

    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(exact_leaves[0], exact_leaves[1]) * exact_leaves[2]
    (F.cross_entropy(logits, targets[:, 0]) * share).backward()
    for leaf, reference in zip(leaves, exact_leaves, strict=True):
        assert leaf.grad is not None and reference.grad is not None and leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, reference.grad) < 2**-6


def test_fallback_is_used_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, targets = inputs(40)
    monkeypatch.setattr("ngpt.kernels.cpu_cross_entropy.load_native", lambda name: None)
    assert cpu_cross_entropy(x, weight, None, targets, rows=8, gradients=True) is None
