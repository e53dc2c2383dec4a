"""The residual rules against NumPy in float64, and the learned step length."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngpt.norm import l2_normalize
from ngpt.residual import RESIDUAL_RULES, Residual, Scale, add, lerp, seed

Array = np.ndarray
SPHERE_RULES = sorted(set(RESIDUAL_RULES) - {"add"})


def unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def lerp_reference(x: Array, f: Array, alpha: Array) -> Array:
    a, b = unit(x), unit(f)
    return unit((1 - alpha) * a + alpha * b)


def seed_reference(x: Array, f: Array, alpha: Array) -> Array:
    return unit(x + alpha * f)


REFERENCES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "lerp": lerp_reference,
    "seed": seed_reference,
    "add": lambda x, f, alpha: x + f,
}


def stream(number: int, *, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return scale * torch.randn(3, 5, 12, generator=generator)


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@given(number=st.integers(0, 1000), scale=st.floats(0.01, 100), alpha=st.floats(0, 1))
def test_a_rule_equals_its_formula(rule: str, number: int, scale: float, alpha: float) -> None:
    x, f = l2_normalize(stream(number)), stream(number + 1, scale=scale)
    alphas = alpha * torch.rand(12, generator=torch.Generator().manual_seed(number))
    ours = RESIDUAL_RULES[rule](x, f, alphas)
    expected = REFERENCES[rule](*(tensor.double().numpy() for tensor in (x, f, alphas)))
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", SPHERE_RULES)
def test_every_rule_but_add_ends_on_the_sphere(rule: str) -> None:
    y = RESIDUAL_RULES[rule](l2_normalize(stream(1)), stream(2, scale=7), torch.tensor(0.4))
    torch.testing.assert_close(y.double().norm(dim=-1), torch.ones(3, 5).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", SPHERE_RULES)
def test_a_step_of_length_zero_stays_where_it_is(rule: str) -> None:
    x = l2_normalize(stream(1))
    torch.testing.assert_close(RESIDUAL_RULES[rule](x, stream(2), torch.tensor(0.0)), x, atol=1e-6, rtol=0)


def test_lerp_with_alpha_one_arrives_at_the_normalised_answer() -> None:
    x, f = l2_normalize(stream(1)), stream(2)
    torch.testing.assert_close(lerp(x, f, torch.tensor(1.0)), l2_normalize(f), atol=1e-6, rtol=0)


@given(st.floats(1e-3, 1e3), st.floats(0.01, 0.9))
def test_the_length_of_the_answer_does_not_matter_to_lerp_but_to_seed(scale: float, alpha: float) -> None:
    x, f, step = l2_normalize(stream(1)), stream(2), torch.tensor(alpha)
    torch.testing.assert_close(lerp(x, scale * f, step), lerp(x, f, step), atol=1e-5, rtol=0)
    if abs(scale - 1) > 0.1:
        assert (seed(x, scale * f, step) - seed(x, f, step)).abs().max() > 1e-4


def test_lerp_turns_the_stream_by_the_angle_that_the_module_says() -> None:
    x, f = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    y = lerp(x, f, torch.tensor(0.05))
    assert np.degrees(np.arctan2(*y.flip(0).numpy())) == pytest.approx(3.0, abs=0.05)


def test_add_is_the_plain_sum() -> None:
    x, f = stream(1), stream(2)
    assert torch.equal(add(x, f, torch.tensor(0.3)), x + f)


def test_an_answer_of_zero_has_finite_gradients() -> None:
    for rule in SPHERE_RULES:
        x, f = l2_normalize(stream(1)).requires_grad_(), torch.zeros(3, 5, 12, requires_grad=True)
        RESIDUAL_RULES[rule](x, f, torch.tensor(0.1)).square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and f.grad is not None and f.grad.isfinite().all()


@pytest.mark.parametrize(("init", "scale"), [(0.05, 1 / 16), (1.0, 1 / 8), (10.0, 0.25)])
def test_a_scale_starts_at_init_and_an_optimizer_moves_it_by_lr_times_init_over_scale(
    init: float, scale: float
) -> None:
    for optimizer, gradient in ((torch.optim.SGD, -1.0), (torch.optim.Adam, -123.0)):
        parameter = Scale(3, init=init, scale=scale)
        torch.testing.assert_close(parameter(), torch.full((3,), init))
        parameter.stored.grad = torch.full((3,), gradient)
        optimizer(parameter.parameters(), lr=0.01).step()  # Adam's first step has length lr whatever the gradient
        torch.testing.assert_close(parameter(), torch.full((3,), init + 0.01 * init / scale), rtol=1e-4, atol=0)


def test_a_scale_is_stored_as_scale_and_only_that_is_saved() -> None:
    parameter = Scale(3, init=10.0, scale=0.25)
    assert list(parameter.state_dict()) == ["stored"]
    assert torch.equal(parameter.stored.detach(), torch.full((3,), 0.25))


@pytest.mark.parametrize(("kind", "size"), [("vector", 12), ("scalar", 1)])
def test_alpha_is_one_number_per_channel_or_one_for_all(kind: str, size: int) -> None:
    residual = Residual("lerp", n_embd=12, alpha=0.3, alpha_kind=kind)
    assert [tuple(parameter.shape) for parameter in residual.parameters()] == [(size,)]
    x, f = stream(1), stream(2)
    torch.testing.assert_close(residual(x, f), lerp(x, f, torch.tensor(0.3)), atol=1e-6, rtol=0)


def test_a_negative_alpha_steps_towards_the_answer_all_the_same() -> None:
    residual = Residual("lerp", n_embd=12, alpha=0.3, alpha_kind="vector")
    x, f = stream(1), stream(2)
    before = residual(x, f)
    with torch.no_grad():
        residual.alpha.stored.neg_()
    assert torch.equal(residual(x, f), before)
