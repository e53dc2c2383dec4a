"""When the residual step is the GPU kernel's and when it is torch's; the kernels themselves: test_fused_kernels.py."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ngpt.kernels import fused_lerp as fused
from ngpt.kernels.fused_lerp import DTYPES, WIDEST, should_fuse, works
from ngpt.model import residual
from ngpt.model.norm import l2_normalize
from ngpt.model.residual import Residual, lerp

SHAPE = (2, 3, 8)


def operands(
    x: tuple[int, ...] = SHAPE,
    f: tuple[int, ...] | None = None,
    alpha: tuple[int, ...] = (8,),
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float32),
    devices: tuple[str, ...] = ("cuda", "cuda", "cuda"),
) -> list[Tensor]:
    """Tensors that say they are on a GPU and have no memory anywhere."""
    with FakeTensorMode():
        kinds = zip((x, x if f is None else f, alpha), dtypes, devices, strict=True)
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A GPU machine with Triton whose kernels work; the list says for which operands that was asked."""
    questions: list[tuple[Any, ...]] = []

    def always(*operand: Any) -> bool:
        questions.append(operand)
        return True

    monkeypatch.setattr(fused, "has_triton", lambda: True)
    monkeypatch.setattr(fused, "works", always)
    return questions


@pytest.mark.parametrize("alpha", [(8,), (1,), ()])
@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize("f", DTYPES)
def test_an_uncompiled_step_on_a_gpu_is_the_kernels(
    alpha: tuple[int, ...], x: torch.dtype, f: torch.dtype, asked: list[tuple[Any, ...]]
) -> None:
    assert should_fuse(*operands(alpha=alpha, dtypes=(x, f, torch.float32)))
    assert asked == [(torch.device("cuda:0"), 8, x, f)]


@pytest.mark.parametrize(
    "other",
    [
        {"devices": ("cpu", "cpu", "cpu")},
        {"devices": ("cuda", "cuda", "cpu")},
        {"devices": ("cuda:0", "cuda:1", "cuda:0")},
        {"dtypes": (torch.float16, torch.float32, torch.float32)},
        {"dtypes": (torch.float32, torch.float64, torch.float32)},
        {"dtypes": (torch.float32, torch.float32, torch.bfloat16)},
        {"f": (3, 8)},
        {"alpha": (2, 3, 1)},  # divided by r of each token
        {"alpha": (2, 3, 8)},
        {"x": (0, 3, 8)},
        {"x": (2, 3, WIDEST + 1), "alpha": (1,)},
    ],
)
def test_what_the_kernels_are_not_made_for_is_torchs(other: dict[str, Any], asked: list[tuple[Any, ...]]) -> None:
    assert not should_fuse(*operands(**other))
    assert asked == []


def test_without_triton_or_where_the_kernels_fail_the_step_is_torchs(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "works", lambda *_: False)
    assert not should_fuse(*operands())
    monkeypatch.setattr(fused, "works", lambda *_: pytest.fail("asked without Triton"))
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    assert not should_fuse(*operands())


def test_a_compiled_step_is_left_to_the_compiler(asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not should_fuse(*operands())
    assert asked == []


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """What lerp hands to the kernels, on a machine where they serve all that fits."""
    taken: list[tuple[Tensor, ...]] = []

    def take(*operand: Tensor) -> Tensor:
        taken.append(operand)
        return operand[0]

    monkeypatch.setattr(residual, "should_fuse", fused.fits)
    monkeypatch.setattr(residual, "fused_lerp", take)
    return taken


def test_only_lerp_with_the_plain_norm_goes_to_the_kernels(steps: list[tuple[Tensor, ...]]) -> None:
    given = [torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(8)]
    for name, rule in residual.RESIDUAL_RULES.items():
        rule(*given, l2_normalize)
        assert len(steps) == (name == "lerp")
        rule(*given, lambda x: x)
        assert len(steps) == (name == "lerp")
        steps.clear()
    lerp(*given)
    assert [tensor is own for tensor, own in zip(given, steps[0], strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("renormalize", "training", "fuses"),
    [(1.0, True, True), (1.0, False, True), (0.5, False, True), (0.5, True, False), (0.0, True, False)],
)
def test_a_residual_goes_to_the_kernels_where_it_always_renormalises(
    renormalize: float, training: bool, fuses: bool, steps: list[tuple[Tensor, ...]]
) -> None:
    connection = Residual("lerp", size=8, alpha=0.3, scale=0.3, renormalize=renormalize).train(training)
    x, f = torch.randn(SHAPE), torch.randn(SHAPE)
    connection(x, f)
    assert len(steps) == fuses
    connection(x, f, torch.ones(2, 3))
    assert len(steps) == fuses


def refuse(error: BaseException) -> Any:
    def deviation(*_: object) -> float:
        raise error

    return deviation


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler"), FileNotFoundError("ptxas"), "TritonError", 0.5, float("nan")]
)
def test_kernels_that_cannot_be_built_or_are_wrong_are_not_used_and_a_warning_says_why(
    error: BaseException | float | str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = pytest.importorskip("triton.errors")
    error = errors.TritonError("too old") if error == "TritonError" else error
    monkeypatch.setattr(fused, "deviation", (lambda *_: error) if isinstance(error, float) else refuse(error))
    with caplog.at_level(logging.WARNING):
        assert not works.__wrapped__(torch.device("cpu"), 8, torch.float32, torch.float32)
    assert len(caplog.records) == 1 and "without the fused kernel" in caplog.text
    assert isinstance(error, float) or str(error) in caplog.text


def test_a_lack_of_memory_says_nothing_about_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.errors")
    monkeypatch.setattr(fused, "deviation", refuse(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        works.__wrapped__(torch.device("cpu"), 8, torch.float32, torch.float32)


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyboardInterrupt()])
def test_an_error_of_ours_is_not_swallowed(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.errors")
    monkeypatch.setattr(fused, "deviation", refuse(error))
    with pytest.raises(type(error)):
        works.__wrapped__(torch.device("cpu"), 8, torch.float32, torch.float32)
