"""The residual rules against NumPy in float64, the divisor of the step, and the learned step length."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngpt.model.norm import l2_normalize
from ngpt.model.residual import (
    R_MIN,
    RESIDUAL_RULES,
    Residual,
    Scale,
    add,
    add_normalize,
    apply_residual,
    lerp,
    slerp,
    spread_over_depth,
)
from tests.helpers.numpy_gpt import RULES, unit
from tests.helpers.numpy_gpt import slerp as exact_slerp

Array = np.ndarray
SPHERE_RULES = sorted(set(RESIDUAL_RULES) - {"add"})
REFERENCES: dict[str, Callable[[Array, Array, Array], Array]] = {**RULES, "add": lambda x, f, alpha: x + f}
IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = dict(RESIDUAL_RULES)
GEODESIC = ["lerp", "slerp"]  # the rules that step a fraction of the way to the output


def stream(number: int, *, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return scale * torch.randn(3, 5, 12, generator=generator)


def angle(x: torch.Tensor, y: torch.Tensor) -> Array:
    """The angle between vectors in float64, accurate also where arccos is not."""
    a, b = (unit(tensor.detach().double().numpy()) for tensor in (x, y))
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@given(number=st.integers(0, 1000), scale=st.floats(0.01, 100), alpha=st.floats(0, 1))
def test_residual_rule_matches_its_formula(rule: str, number: int, scale: float, alpha: float) -> None:
    x, f = l2_normalize(stream(number)), stream(number + 1, scale=scale)
    alphas = alpha * torch.rand(12, generator=torch.Generator().manual_seed(number))
    actual = IMPLEMENTATIONS[rule](x, f, alphas)
    expected = REFERENCES[rule](*(tensor.double().numpy() for tensor in (x, f, alphas)))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", SPHERE_RULES)
def test_all_rules_except_add_end_on_the_sphere(rule: str) -> None:
    y = IMPLEMENTATIONS[rule](l2_normalize(stream(1)), stream(2, scale=7), torch.tensor(0.4))
    torch.testing.assert_close(y.double().norm(dim=-1), torch.ones(3, 5).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", SPHERE_RULES)
def test_step_of_length_zero_does_not_move_the_stream(rule: str) -> None:
    x = l2_normalize(stream(1))
    torch.testing.assert_close(IMPLEMENTATIONS[rule](x, stream(2), torch.tensor(0.0)), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", GEODESIC)
def test_step_of_length_one_ends_at_the_normalized_output(rule: str) -> None:
    x, f = l2_normalize(stream(1)), stream(2)
    torch.testing.assert_close(IMPLEMENTATIONS[rule](x, f, torch.tensor(1.0)), l2_normalize(f), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", GEODESIC)
@given(scale=st.floats(1e-3, 1e3), alpha=st.floats(0.01, 0.9))
def test_only_add_normalize_depends_on_the_length_of_the_output(rule: str, scale: float, alpha: float) -> None:
    x, f, step = l2_normalize(stream(1)), stream(2), torch.tensor(alpha)
    torch.testing.assert_close(
        IMPLEMENTATIONS[rule](x, scale * f, step), IMPLEMENTATIONS[rule](x, f, step), atol=1e-5, rtol=0
    )
    if abs(scale - 1) > 0.1:
        assert (add_normalize(x, scale * f, step) - add_normalize(x, f, step)).abs().max() > 1e-4


def test_lerp_turns_the_stream_by_the_documented_angle() -> None:
    x, f = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    y = lerp(x, f, torch.tensor(0.05))
    assert np.degrees(np.arctan2(*y.flip(0).numpy())) == pytest.approx(3.0, abs=0.05)


@given(number=st.integers(0, 1000), alpha=st.floats(0, 1))
def test_slerp_turns_by_the_exact_fraction_of_the_angle_within_the_plane(number: int, alpha: float) -> None:
    x, f = l2_normalize(stream(number)), stream(number + 1)
    y = slerp(x, f, torch.tensor(alpha))
    np.testing.assert_allclose(angle(x, y), alpha * angle(x, f), atol=1e-6)
    np.testing.assert_allclose(angle(y, f), (1 - alpha) * angle(x, f), atol=1e-6)


@given(
    number=st.integers(0, 1000),
    exponent=st.floats(-7, 0),
    far=st.booleans(),
    alpha=st.floats(0, 1),
)
def test_slerp_is_accurate_near_the_output_and_near_its_opposite(
    number: int, exponent: float, far: bool, alpha: float
) -> None:
    """The tolerance is the error in direction due to float32 inputs: 1e-7 over the sine of the angle."""
    x = unit(stream(number).double().numpy())
    tangent = stream(number + 1).double().numpy()
    tangent = unit(tangent - (tangent * x).sum(-1, keepdims=True) * x)
    theta = 10**exponent
    f = np.cos(theta) * x * (-1 if far else 1) + np.sin(theta) * tangent
    actual = slerp(torch.tensor(x, dtype=torch.float32), torch.tensor(f, dtype=torch.float32), torch.tensor(alpha))
    turned = alpha * (np.pi - theta if far else theta)
    expected = np.cos(turned) * x + np.sin(turned) * tangent
    undecided = min(2.0, 4e-7 * (1 + np.sin(turned) / np.sin(theta)))
    if undecided < 0.1:
        np.testing.assert_allclose(actual.numpy(), expected, atol=undecided)
    assert actual.isfinite().all()


def test_lerp_and_slerp_agree_for_small_steps_and_not_for_large_ones() -> None:
    x, f = l2_normalize(stream(1)), stream(2)
    small, large = torch.tensor(1e-3), torch.tensor(0.25)
    assert (lerp(x, f, small) - slerp(x, f, small)).abs().max() < 2e-3
    assert (lerp(x, f, large) - slerp(x, f, large)).abs().max() > 1e-2


def test_add_is_the_plain_sum() -> None:
    x, f = stream(1), stream(2)
    assert torch.equal(add(x, f, torch.tensor(0.3)), x + f)


@pytest.mark.parametrize("rule", SPHERE_RULES)
@pytest.mark.parametrize("answer", ["zero", "stream", "opposite"])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_undefined_direction_gives_a_finite_step_and_gradient(rule: str, answer: str, alpha: float) -> None:
    x = l2_normalize(stream(1))
    f = {"zero": torch.zeros_like(x), "stream": x.clone(), "opposite": -x}[answer].requires_grad_()
    x, step = x.clone().requires_grad_(), torch.full((12,), alpha, requires_grad=True)
    y = IMPLEMENTATIONS[rule](x, f, step)
    y.square().sum().backward()
    for tensor in (y, x.grad, f.grad, step.grad):
        assert tensor is not None and tensor.isfinite().all()


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@pytest.mark.parametrize("theta", [0.02, 1.0, 3.1])
def test_gradients_match_finite_differences_of_the_formula(rule: str, theta: float) -> None:
    """Central differences of the NumPy formula in float64; theta is the angle between stream and answer."""
    generator = np.random.default_rng(5)
    x, other, towards = (unit(generator.normal(size=(1, 6))) for _ in range(3))
    other = unit(other - (other * x).sum() * x)
    given = [x, 2.5 * (np.cos(theta) * x + np.sin(theta) * other), generator.uniform(0.1, 0.6, 6)]
    actual = [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in given]
    (IMPLEMENTATIONS[rule](*actual) * torch.tensor(towards)).sum().backward()
    for position, tensor in enumerate(actual):
        expected = np.zeros_like(given[position])
        for entry in np.ndindex(*expected.shape):
            either = []
            for sign in (1, -1):
                moved = [array.copy() for array in given]
                moved[position][entry] += sign * 1e-6
                either.append((REFERENCES[rule](*moved) * towards).sum())
            expected[entry] = (either[0] - either[1]) / 2e-6
        if tensor.grad is None:  # add has no step length
            assert rule == "add" and not expected.any()
        else:
            size = 1 + np.abs(expected).max()  # near pi, slerp's gradients are large
            np.testing.assert_allclose(tensor.grad.numpy() / size, expected / size, atol=2e-5 / np.sin(theta))


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@pytest.mark.parametrize("alpha", [torch.tensor(0.3), torch.full((1,), 0.3), torch.rand(12)])
@pytest.mark.parametrize("r", [1.0, torch.ones(3, 5)])
def test_divisor_of_one_equals_the_plain_rule_bit_for_bit(
    rule: str, alpha: torch.Tensor, r: torch.Tensor | float
) -> None:
    x, f = l2_normalize(stream(1)), stream(2)
    divided = apply_residual(x, f, r, alpha=alpha, rule=RESIDUAL_RULES[rule])
    assert torch.equal(divided, IMPLEMENTATIONS[rule](x, f, alpha))


@pytest.mark.parametrize("rule", SPHERE_RULES)
@given(number=st.integers(0, 1000))
def test_divisor_shortens_the_step_of_its_token_and_is_bounded_away_from_zero(rule: str, number: int) -> None:
    x, f = l2_normalize(stream(number)), stream(number + 1)
    r = torch.empty(3, 5).uniform_(-1, 6, generator=torch.Generator().manual_seed(number))
    actual = apply_residual(x, f, r, alpha=0.09, rule=RESIDUAL_RULES[rule])
    length = 0.09 / np.maximum(r.double().numpy(), 0.25)[..., None]
    expected = REFERENCES[rule](x.double().numpy(), f.double().numpy(), length)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)
    assert R_MIN == 0.25


def test_apply_residual_uses_lerp_by_default() -> None:
    x, f = l2_normalize(stream(1)), stream(2)
    assert torch.equal(apply_residual(x, f, 2.0, alpha=0.2), lerp(x, f, torch.tensor(0.1)))


@pytest.mark.parametrize(("init", "scale"), [(0.05, 1 / 16), (1.0, 1 / 8), (10.0, 0.25), (0.05, 0.05)])
def test_scale_starts_at_init_and_moves_by_lr_times_init_over_scale(init: float, scale: float) -> None:
    for optimizer, gradient in ((torch.optim.SGD, -1.0), (torch.optim.Adam, -123.0)):
        parameter = Scale(3, init=init, scale=scale)
        torch.testing.assert_close(parameter(), torch.full((3,), init))
        parameter.stored.grad = torch.full((3,), gradient)
        optimizer(parameter.parameters(), lr=0.01).step()  # the first step of Adam has length lr for every gradient
        torch.testing.assert_close(parameter(), torch.full((3,), init + 0.01 * init / scale), rtol=1e-4, atol=0)


@pytest.mark.parametrize("learned", [True, False])
def test_only_the_stored_value_of_a_scale_is_saved(learned: bool) -> None:
    parameter = Scale(3, init=10.0, scale=0.25, learned=learned)
    assert list(parameter.state_dict()) == ["stored"]
    assert torch.equal(parameter.stored.detach(), torch.full((3,), 0.25))
    assert len(list(parameter.parameters())) == learned


def test_schedule_multiplies_the_learned_value_without_accumulating() -> None:
    parameter = Scale(3, init=0.1, scale=0.25)
    with torch.no_grad():
        parameter.stored.mul_(3)
    for factor in (2.0, 0.5, 0.5, 1.0):
        parameter.multiply(factor)
        torch.testing.assert_close(parameter(), torch.full((3,), 0.3 * factor))
    assert torch.equal(parameter.stored.detach(), torch.full((3,), 0.75))


@pytest.mark.parametrize(
    ("values", "n_layer", "expected"),
    [
        (0.3, 3, [0.3, 0.3, 0.3]),
        ([0.3], 3, [0.3, 0.3, 0.3]),
        ([0.3, 0.1], 3, [0.3, 0.2, 0.1]),
        ([0.1, 0.2, 0.4], 3, [0.1, 0.2, 0.4]),
        ([0.0, 1.0, 0.0], 5, [0, 0.5, 1, 0.5, 0]),
        ([0.3, 0.1], 1, [0.3]),
    ],
)
def test_values_are_interpolated_linearly_over_the_depth(
    values: float | list[float], n_layer: int, expected: list[float]
) -> None:
    assert spread_over_depth(values, n_layer) == pytest.approx(expected)


@pytest.mark.parametrize("size", [12, 1])
def test_residual_uses_one_alpha_per_channel_or_one_for_all(size: int) -> None:
    residual = Residual("slerp", size=size, alpha=0.3, scale=0.25)
    assert [tuple(parameter.shape) for parameter in residual.parameters()] == [(size,)]
    with torch.no_grad():
        residual.alpha.stored.mul_(torch.linspace(0.5, 1.5, size))
    x, f = l2_normalize(stream(1)), stream(2)
    expected = exact_slerp(x.double().numpy(), f.double().numpy(), 0.3 * np.linspace(0.5, 1.5, size))
    np.testing.assert_allclose(residual(x, f).detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("sign", ["abs", "free"])
def test_sign_policy_decides_the_direction_of_a_negative_alpha(sign: str) -> None:
    residual = Residual("slerp", size=1, alpha=0.3, scale=0.3, sign=sign)
    with torch.no_grad():
        residual.alpha.stored.neg_()
    x, f = l2_normalize(stream(1)), stream(2)
    expected = (0.7 if sign == "abs" else 1.3) * angle(x, f)
    np.testing.assert_allclose(angle(residual(x, f), f), np.minimum(expected, 2 * np.pi - expected), atol=1e-6)


def test_fixed_alpha_is_saved_but_is_not_a_parameter() -> None:
    residual = Residual("lerp", size=12, alpha=0.3, scale=0.25, learned=False)
    assert list(residual.parameters()) == []
    assert list(residual.state_dict()) == ["alpha.stored"]
    x, f = l2_normalize(stream(1)), stream(2)
    torch.testing.assert_close(residual(x, f), lerp(x, f, torch.tensor(0.3)), atol=1e-6, rtol=0)


def heads(alphas: list[float], rule: str, sign: str) -> Residual:
    residual = Residual(rule, size=len(alphas), alpha=0.3, scale=0.3, sign=sign, per_head=True)
    with torch.no_grad():
        residual.alpha.stored.copy_(torch.tensor(alphas))
    return residual


def attention_output(residual: Residual, outputs: torch.Tensor) -> torch.Tensor:
    """The output of attention whose heads contribute `outputs` (H, B, T, D)."""
    weights = residual.head_weights()
    assert weights is not None
    return (weights.view(-1, 1, 1, 1) * outputs).sum(0)


@pytest.mark.parametrize("rule", SPHERE_RULES)
def test_equal_alphas_per_head_match_a_single_alpha(rule: str) -> None:
    residual, outputs = heads([0.3, 0.3, 0.3], rule, "abs"), torch.stack([stream(n) for n in (2, 3, 4)])
    x = l2_normalize(stream(1))
    expected = REFERENCES[rule](x.double().numpy(), outputs.double().numpy().sum(0), np.array(0.3))
    np.testing.assert_allclose(residual(x, attention_output(residual, outputs)).detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("sign", ["abs", "free"])
@given(alphas=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=3))
def test_add_normalize_scales_the_output_of_each_head_by_its_alpha(sign: str, alphas: list[float]) -> None:
    residual, outputs = (
        heads(alphas, "add_normalize", sign),
        torch.stack([stream(n) for n in range(2, 2 + len(alphas))]),
    )
    x = l2_normalize(stream(1))
    acting = np.abs(alphas) if sign == "abs" else alphas
    added = sum(alpha * f for alpha, f in zip(acting, outputs.double().numpy(), strict=True))
    actual = residual(x, attention_output(residual, outputs)).detach().numpy()
    np.testing.assert_allclose(actual, unit(x.double().numpy() + added), atol=2e-5)


@pytest.mark.parametrize("rule", SPHERE_RULES)
@pytest.mark.parametrize("sign", ["abs", "free"])
def test_zero_alphas_in_all_heads_do_not_move_the_stream(rule: str, sign: str) -> None:
    residual, outputs = heads([0.0, 0.0], rule, sign), torch.stack([stream(2), stream(3)])
    x = l2_normalize(stream(1))
    y = residual(x, attention_output(residual, outputs))
    torch.testing.assert_close(y, x, atol=1e-6, rtol=0)
    y[..., 0].sum().backward()
    assert residual.alpha.stored.grad is not None and residual.alpha.stored.grad.isfinite().all()


@pytest.mark.parametrize("rule", SPHERE_RULES)
@pytest.mark.parametrize("per_head", [True, False])
def test_divisor_of_one_equals_the_plain_rule_for_bfloat16_outputs(rule: str, per_head: bool) -> None:
    residual = Residual(rule, size=2 if per_head else 1, alpha=0.3, scale=0.25, per_head=per_head)
    x, f = l2_normalize(stream(1)), stream(2).bfloat16()
    assert torch.equal(residual(x, f), residual(x, f, torch.ones(3, 5)))


@pytest.mark.parametrize("rule", SPHERE_RULES)
def test_norm_is_skipped_always_or_by_the_draw_of_the_step(rule: str) -> None:
    x, f = l2_normalize(stream(1)), stream(2)
    alphas = torch.linspace(0.1, 0.6, 12)

    def step(renormalize: float, *, drawn: bool, training: bool) -> torch.Tensor:
        residual = Residual(rule, size=12, alpha=1.0, scale=1.0, renormalize=renormalize).train(training)
        residual.alpha.stored.data.copy_(alphas)
        residual.renormalized.fill_(drawn)
        return residual(x, f).detach()

    plain, ghost = IMPLEMENTATIONS[rule](x, f, alphas), IMPLEMENTATIONS[rule](x, f, alphas, lambda y: y)
    assert (plain - ghost).abs().max() > 1e-3
    for drawn in (True, False):
        for training in (True, False):
            assert torch.equal(step(1.0, drawn=drawn, training=training), plain)
            assert torch.equal(step(0.0, drawn=drawn, training=training), ghost)
            expected = plain if drawn or not training else ghost
            assert torch.equal(step(0.5, drawn=drawn, training=training), expected)
