"""When the residual step uses the GPU kernels and when torch. test_fused_lerp_triton.py tests the kernels."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ngpt.kernels import fused_lerp as fused
from ngpt.kernels.fused_lerp import MAX_WIDTH, SWITCH, TOLERANCE, is_correct, should_fuse
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
    """Fake GPU tensors, which need no memory."""
    with FakeTensorMode():
        kinds = zip((x, x if f is None else f, alpha), dtypes, devices, strict=True)
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A machine whose kernels work and are enabled. The list holds the operands they were checked for."""
    operands: list[tuple[Any, ...]] = []

    def check(*operand: Any) -> bool:
        operands.append(operand)
        return True

    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(fused, "is_correct", check)
    return operands


@pytest.mark.parametrize("alpha", [(8,), (1,), ()])
@pytest.mark.parametrize("x", TOLERANCE)
@pytest.mark.parametrize("f", TOLERANCE)
def test_uncompiled_step_on_a_gpu_uses_the_kernels_if_enabled(
    alpha: tuple[int, ...], x: torch.dtype, f: torch.dtype, checked: list[tuple[Any, ...]]
) -> None:
    assert should_fuse(*operands(alpha=alpha, dtypes=(x, f, torch.float32)))
    assert checked == [(torch.device("cuda:0"), 8, x, f)]


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_kernels_are_off_by_default(
    value: str | None, checked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SWITCH)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    assert not should_fuse(*operands())
    assert checked == []


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
        {"alpha": (2, 3, 1)},  # divided by the r of each token
        {"alpha": (2, 3, 8)},
        {"x": (0, 3, 8)},
        {"x": (2, 3, MAX_WIDTH + 1), "alpha": (1,)},
    ],
)
def test_unsupported_operands_use_torch(other: dict[str, Any], checked: list[tuple[Any, ...]]) -> None:
    assert not should_fuse(*operands(**other))
    assert checked == []


def test_step_uses_torch_without_triton_or_if_the_kernels_are_wrong(
    checked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "is_correct", lambda *_: False)
    assert not should_fuse(*operands())
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(fused, "max_error", lambda *_: pytest.fail("checked without Triton"))
    assert not is_correct.__wrapped__(torch.device("cpu"), 8, torch.float32, torch.float32)


def test_compiled_step_does_not_use_the_kernels(
    checked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not should_fuse(*operands())
    assert checked == []


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """The operands that `lerp` passes to the kernels, on a machine that uses them for all supported operands."""
    taken: list[tuple[Tensor, ...]] = []

    def take(*operand: Tensor) -> Tensor:
        taken.append(operand)
        return operand[0]

    monkeypatch.setattr(residual, "should_fuse", fused.supports)
    monkeypatch.setattr(residual, "fused_lerp", take)
    return taken


def test_only_lerp_with_the_plain_norm_uses_the_kernels(steps: list[tuple[Tensor, ...]]) -> None:
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
def test_residual_uses_the_kernels_only_if_it_always_renormalizes(
    renormalize: float, training: bool, fuses: bool, steps: list[tuple[Tensor, ...]]
) -> None:
    connection = Residual("lerp", size=8, alpha=0.3, scale=0.3, renormalize=renormalize).train(training)
    x, f = torch.randn(SHAPE), torch.randn(SHAPE)
    connection(x, f)
    assert len(steps) == fuses
    connection(x, f, torch.ones(2, 3))
    assert len(steps) == fuses


def failing(error: BaseException) -> Any:
    def max_error(*_: object) -> float:
        raise error

    return max_error


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler"), FileNotFoundError("ptxas"), "TritonError", 0.5, float("nan")]
)
def test_kernels_that_fail_to_build_or_are_wrong_are_disabled_with_a_warning(
    error: BaseException | float | str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = pytest.importorskip("triton.errors")
    error = errors.TritonError("too old") if error == "TritonError" else error
    monkeypatch.setattr(fused, "max_error", (lambda *_: error) if isinstance(error, float) else failing(error))
    with caplog.at_level(logging.WARNING):
        assert not is_correct.__wrapped__(torch.device("cpu"), 8, torch.float32, torch.float32)
    assert len(caplog.records) == 1 and "without the fused kernel" in caplog.text
    assert isinstance(error, float) or str(error) in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), TypeError("a bug"), KeyboardInterrupt()]
)
def test_unexpected_errors_of_the_check_are_raised(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.errors")
    monkeypatch.setattr(fused, "max_error", failing(error))
    with pytest.raises(type(error)):
        is_correct.__wrapped__(torch.device("cpu"), 8, torch.float32, torch.float32)
