"""The chunked cross-entropy of a linear head against torch's cross-entropy in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ngpt.kernels import linear_cross_entropy as loss
from ngpt.kernels.linear_cross_entropy import linear_cross_entropy

WIDTH, VOCABULARY = 16, 41
SCALES = {"no scale": None, "one scale": (1,), "a scale per entry": (VOCABULARY,)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows in blocks of 2, so that small inputs cross the borders of both."""
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 9 * 4 * VOCABULARY)
    monkeypatch.setitem(loss.BLOCK_BYTES, "cpu", 3 * 4 * VOCABULARY)


def inputs(
    *shape: int, scale: tuple[int, ...] | None = None, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, weight and scale as leaves, and targets. Logits are a few units large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, WIDTH, generator=generator, **options)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, **options)
    factor = None if scale is None else 0.5 + torch.rand(scale, generator=generator, **options)
    for tensor in (x, weight, factor):
        if tensor is not None:
            tensor.requires_grad_()
    return x, weight, factor, torch.randint(VOCABULARY, shape, generator=generator)


def plain(x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, softcap: float | None) -> Tensor:
    """The definition, which computes all logits at once."""
    logits = F.linear(x, weight)
    logits = logits if scale is None else logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def exact(
    x: Tensor, weight: Tensor, scale: Tensor | None, targets: Tensor, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """The plain loss and its gradients in float64."""
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, scale)]
    assert leaves[0] is not None and leaves[1] is not None
    value = plain(leaves[0], leaves[1], leaves[2], targets, softcap)
    return value.detach(), list(torch.autograd.grad(value, [t for t in leaves if t is not None]))


def assert_gradients(leaves: tuple[Tensor | None, ...], expected: list[Tensor], tolerance: float) -> None:
    """Asserts that the norm of each gradient's error is at most `tolerance` times the norm of the gradient."""
    for leaf, reference in zip([t for t in leaves if t is not None], expected, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        assert (leaf.grad - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize("shape", [(1,), (16,), (21,), (3, 7), (2, 2, 3)], ids=str)
def test_loss_and_gradients_match_full_logits_in_float64(
    shape: tuple[int, ...], scale: tuple[int, ...] | None, softcap: float | None
) -> None:
    x, weight, factor, targets = inputs(*shape, scale=scale)
    value = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap)
    value.backward()
    expected, gradients = exact(x, weight, factor, targets, softcap)
    assert value.dtype == torch.float32 and value.shape == ()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert_gradients((x, weight, factor), gradients, 2e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_gradients_match_finite_differences_in_float64(scale: tuple[int, ...] | None, softcap: float | None) -> None:
    x, weight, factor, targets = inputs(11, scale=scale, dtype=torch.float64)

    def function(x: Tensor, weight: Tensor, *factor: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, scale=factor[0] if factor else None, softcap=softcap)

    leaves = (x, weight) if factor is None else (x, weight, factor)
    assert function(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)  # along random directions, not along each axis


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("how", ["autocast", "x is bfloat16"])
def test_bfloat16_error_stays_within_rounding(how: str, softcap: float | None) -> None:
    x, weight, factor, targets = inputs(500, scale=(VOCABULARY,))
    # Rounding changes the operands and the logits by at most 2^-8. Logits are about ten units large, so the softmax is
    # off by about 2^-6 where it matters most. One extra rounding in the mean over 500 rows is negligible.
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap)
    else:
        x = x.detach().bfloat16().requires_grad_()
        value = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap)
    value.backward()
    expected, gradients = exact(x, weight, factor, targets, softcap)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2**-9, atol=0)
    assert_gradients((x, weight, factor), gradients, 2**-6)


def test_bfloat16_sum_over_many_chunks_keeps_small_terms() -> None:
    x, weight, _, targets = inputs(1)
    x, targets = (
        x.detach().expand(8192, WIDTH),
        targets.expand(8192),
    )  # a sum in bfloat16 would stop growing at 256 chunks
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(x, weight, targets).backward()
    assert_gradients((weight,), exact(x, weight, None, targets, None)[1][1:], 2**-6)


def test_autocast_leaves_float64_alone() -> None:
    x, weight, factor, targets = inputs(9, scale=(1,), dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_cross_entropy(x, weight, targets, scale=factor)
    torch.testing.assert_close(value, plain(x, weight, factor, targets, None), rtol=1e-12, atol=0)


def test_float16_is_refused() -> None:
    x, weight, _, targets = inputs(3)
    with pytest.raises(TypeError, match=r"torch\.float16: allowed are bfloat16"):
        linear_cross_entropy(x.half(), weight, targets)


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor returned by an operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("softcap", [None, 15.0])
def test_no_tensor_is_larger_than_a_chunk_or_a_gradient(softcap: float | None) -> None:
    x, weight, factor, targets = inputs(200, scale=(VOCABULARY,))
    with _LargestTensor() as largest:
        linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap).backward()
    assert largest.numel == max(8 * VOCABULARY, x.numel(), weight.numel())


class _ProductRows(TorchDispatchMode):
    """Records where the rows of the factors and results of matrix products start."""

    def __init__(self) -> None:
        super().__init__()
        self.pitches: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.pitches += [max(t.stride()) for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        return result


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_of_matrix_products_start_at_multiples_of_the_pitch(
    autocast: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, unaligned products for a vocabulary of 50257 would be several times slower."""
    monkeypatch.setitem(loss.PITCH, "cpu", 16)
    monkeypatch.setitem(loss.BLOCK_BYTES, "cpu", 1 << 20)
    x, weight, factor, targets = inputs(21, scale=(VOCABULARY,))
    with _ProductRows() as products, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap)
    value.backward()
    assert len(products.pitches) > 20 and all(pitch % 16 == 0 for pitch in products.pitches)
    expected, gradients = exact(x, weight, factor, targets, softcap)
    torch.testing.assert_close(value.double(), expected, rtol=2**-8 if autocast else 2e-6, atol=0)
    assert_gradients((x, weight, factor), gradients, 2**-6 if autocast else 2e-6)


def test_micro_batch_gradients_add_up_to_those_of_the_batch() -> None:
    x, weight, factor, targets = inputs(24, scale=(VOCABULARY,))
    for rows in torch.arange(24).split(6):
        (linear_cross_entropy(x[rows], weight, targets[rows], scale=factor) * 0.25).backward()
    assert_gradients((x, weight, factor), exact(x, weight, factor, targets, None)[1], 2e-6)


class _HeadPasses(TorchDispatchMode):
    """Counts the operations whose result is as large as the head."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self._numel, self.count = head.numel(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += isinstance(result, Tensor) and result.numel() == self._numel
        return result


def test_accumulating_gradients_needs_no_extra_pass_over_the_head() -> None:
    x, weight, factor, targets = inputs(24, scale=(VOCABULARY,))
    counts = []
    for share in (1.0, 0.25):
        with _HeadPasses(weight) as passes:
            (linear_cross_entropy(x, weight, targets, scale=factor) * share).backward()
        counts.append(passes.count)
    assert counts[0] == counts[1]


def test_backward_can_be_repeated_on_a_retained_graph() -> None:
    x, weight, factor, targets = inputs(9, scale=(VOCABULARY,))
    value = linear_cross_entropy(x, weight, targets, scale=factor)
    assert factor is not None
    first, second = (torch.autograd.grad(value, (x, weight, factor), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_requested_gradients_are_returned(wanted: tuple[int, ...]) -> None:
    x, weight, factor, targets = inputs(9, scale=(1,))
    assert factor is not None
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, weight, factor))]
    linear_cross_entropy(leaves[0], leaves[1], targets, scale=leaves[2]).backward()
    gradients = exact(x, weight, factor, targets, None)[1]
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(wanted)
    assert_gradients(tuple(leaves[i] for i in wanted), [gradients[i] for i in wanted], 2e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_loss_is_the_same_without_gradients(softcap: float | None, autocast: bool) -> None:
    x, weight, factor, targets = inputs(21, scale=(VOCABULARY,))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        trained = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap)
        with torch.no_grad():
            validated = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap)
    assert trained.requires_grad and not validated.requires_grad
    torch.testing.assert_close(validated, trained, rtol=1e-6, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_huge_logits_stay_finite(softcap: float | None, autocast: bool) -> None:
    x, weight, _, targets = inputs(21)
    factor = torch.tensor([1000.0], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap)
    value.backward()
    torch.testing.assert_close(value.double(), exact(x, weight, factor, targets, softcap)[0], rtol=0.01, atol=0)
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, weight, factor))


def test_confident_correct_prediction_keeps_its_small_gradient_in_bfloat16() -> None:
    # softmax - 1 at the target is -1.2e-4; a softmax rounded to bfloat16 would be 1.
    x, weight, targets = torch.ones(1, 1), torch.tensor([[9.0], [0.0]], requires_grad=True), torch.tensor([0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(x, weight, targets).backward()
    slope = 1 / (1 + math.exp(9.0))
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.flatten(), [-slope, slope], rtol=2**-7)


@pytest.mark.parametrize("target", [VOCABULARY, -1, -100])
@pytest.mark.parametrize("compiled", [False, True])
def test_target_outside_the_vocabulary_is_an_error(target: int, compiled: bool) -> None:
    x, weight, _, targets = inputs(9)
    targets[4] = target
    with pytest.raises((IndexError, RuntimeError), match=rf"index {target} is out of bounds"):
        linear_cross_entropy(x, weight, targets, compiled=compiled)


@pytest.mark.parametrize(
    ("x", "targets", "scale", "message"),
    [
        ((4, WIDTH + 1), (4,), None, "do not fit together"),
        ((4, WIDTH), (2, 2), None, "do not fit together"),
        ((0, WIDTH), (0,), None, "targets is empty"),
        ((4, WIDTH), (4,), (2,), "scale has shape"),
    ],
)
def test_error_names_mismatched_shapes(
    x: tuple[int, ...], targets: tuple[int, ...], scale: tuple[int, ...] | None, message: str
) -> None:
    weight, factor = torch.zeros(VOCABULARY, WIDTH), None if scale is None else torch.ones(scale)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.zeros(x), weight, torch.zeros(targets, dtype=torch.int64), scale=factor)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_kernel_gives_the_same_numbers(autocast: bool, softcap: float | None) -> None:
    results = []
    for compiled in (False, True):
        x, weight, factor, targets = inputs(21, scale=(VOCABULARY,))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap, compiled=compiled)
            with torch.no_grad():
                validated = linear_cross_entropy(x, weight, targets, scale=factor, softcap=softcap, compiled=compiled)
        value.backward()
        torch.testing.assert_close(validated, value, rtol=1e-6, atol=0)
        results.append((value, x, weight, factor))
    (eager, *leaves), (value, *compiled_leaves) = results
    torch.testing.assert_close(value, eager, rtol=1e-6, atol=0)
    # The products and their operands are the same, but an exponential may differ in its last bit and round differently.
    assert_gradients(tuple(compiled_leaves), [leaf.grad for leaf in leaves], 2**-8 if autocast else 1e-6)


seeds = st.integers(0, 2**31)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), seeds, st.sampled_from([None, 5.0]))
def test_loss_of_equal_logits_is_the_log_of_the_vocabulary_size(n: int, seed: int, softcap: float | None) -> None:
    x, weight, _, targets = inputs(n, seed=seed)
    same = weight[:1].detach().expand_as(weight)
    value = linear_cross_entropy(x.detach(), same, targets, softcap=softcap)
    assert value.item() == pytest.approx(math.log(VOCABULARY), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), seeds, st.floats(-100, 100))
def test_adding_a_constant_to_all_logits_changes_nothing(n: int, seed: int, constant: float) -> None:
    x, weight, _, targets = inputs(n, seed=seed, dtype=torch.float64)
    # A column of ones in x and one of the constant in the weight add the constant to every logit.
    longer = torch.cat([x.detach(), torch.ones(n, 1)], 1), torch.cat([weight, torch.full((VOCABULARY, 1), constant)], 1)
    expected = linear_cross_entropy(x.detach(), weight, targets)
    torch.testing.assert_close(linear_cross_entropy(*longer, targets), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), seeds)
def test_weight_gradient_sums_to_zero_over_the_vocabulary(n: int, seed: int) -> None:
    # Each row of softmax - onehot sums to zero.
    x, weight, _, targets = inputs(n, seed=seed, dtype=torch.float64)
    linear_cross_entropy(x, weight, targets).backward()
    assert weight.grad is not None and weight.grad.abs().max() > 1e-4
    np.testing.assert_allclose(weight.grad.sum(0), np.zeros(WIDTH), atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), seeds)
def test_order_of_the_rows_does_not_matter(n: int, seed: int) -> None:
    x, weight, factor, targets = inputs(n, scale=(VOCABULARY,), seed=seed, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    value = linear_cross_entropy(x, weight, targets, scale=factor)
    shuffled = linear_cross_entropy(x[order], weight, targets[order], scale=factor)
    torch.testing.assert_close(shuffled, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_loss_of_each_token_is_torchs(softcap: float | None) -> None:
    x, weight, scale, targets = inputs(3, 7, scale=(VOCABULARY,))
    assert scale is not None
    logits = x.flatten(0, 1) @ (weight * scale[:, None]).T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="none")
    found = loss.token_losses(x, weight, targets, scale=scale, softcap=softcap)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
