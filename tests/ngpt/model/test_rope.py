"""Rotary embedding rotates complex numbers by the angle position times frequency."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngpt.model.rope import ROPE_SCALINGS, attention_temperature, nvidia_rotate, rope_tables, rotate
from tests.helpers.numpy_gpt import rope_frequencies


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@given(st.integers(1, 40), st.sampled_from([2, 4, 10, 64]), st.sampled_from([10.0, 10_000.0, 500_000.0]))
def test_rotation_multiplies_each_pair_by_a_unit_complex_number(length: int, head_dim: int, base: float) -> None:
    x = random(2, 3, length, head_dim)
    actual = rotate(x, *rope_tables(length, head_dim, base=base))
    pairs = x.numpy().astype(np.float64).reshape(2, 3, length, head_dim // 2, 2)
    frequencies = np.array([base ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.outer(np.arange(length), frequencies))
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-6)


def test_position_zero_is_unchanged_and_other_positions_rotate() -> None:
    x = random(5, 8)
    y = rotate(x, *rope_tables(5, 8))
    assert torch.equal(y[0], x[0])
    assert (y[1:] - x[1:]).norm(dim=-1).min() > 0.1


def test_rotation_preserves_lengths() -> None:
    x = random(4, 200, 32)
    y = rotate(x, *rope_tables(200, 32))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 100))
def test_dot_product_depends_only_on_the_distance(here: int, there: int, shift: int) -> None:
    cos, sin = rope_tables(1001, 16)
    q, k = random(2, 1, 16)

    def score(p: int, r: int) -> float:
        return float((rotate(q, cos[p : p + 1], sin[p : p + 1]) * rotate(k, cos[r : r + 1], sin[r : r + 1])).sum())

    assert abs(score(here, there) - score(here + shift, there + shift)) < 1e-4


def test_dot_product_changes_with_the_distance() -> None:
    cos, sin = rope_tables(10, 16)
    q = rotate(random(1, 16).expand(10, 16), cos, sin)
    scores = q @ q.T
    assert all((scores[0, 0] - scores[0, distance]).abs() > 0.01 for distance in range(1, 10))


def test_result_is_float32_for_bfloat16_input() -> None:
    x = random(6, 8).bfloat16()
    assert torch.equal(rotate(x, *rope_tables(6, 8)), rotate(x.float(), *rope_tables(6, 8)))


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
@given(
    width=st.sampled_from([2, 4, 16, 64, 128]),
    base=st.sampled_from([100.0, 10_000.0, 500_000.0]),
    factor=st.sampled_from([1.0, 1.5, 4.0, 32.0]),
    length=st.sampled_from([16, 96, 2048]),
)
def test_rope_scaling_uses_the_angles_of_its_paper(
    scaling: str, width: int, base: float, factor: float, length: int
) -> None:
    cos, sin = rope_tables(length, width, base=base, scaling=scaling, factor=factor)
    theta = rope_frequencies(width, base=base, scaling=scaling, factor=factor, trained=length / factor)
    expected = np.exp(1j * np.outer(np.arange(length), theta))
    np.testing.assert_allclose(cos.numpy() + 1j * sin.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_rope_factor_of_one_changes_nothing(scaling: str) -> None:
    plain, scaled = rope_tables(64, 16), rope_tables(64, 16, scaling=scaling, factor=1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    assert attention_temperature(scaling, 1.0) == 1


def test_linear_scaling_interpolates_between_trained_positions() -> None:
    trained, extended = rope_tables(32, 16), rope_tables(128, 16, scaling="linear", factor=4.0)
    torch.testing.assert_close(extended[0][::4], trained[0])
    torch.testing.assert_close(extended[1][::4], trained[1])


@pytest.mark.parametrize("scaling", ["ntk", "yarn"])
def test_scaling_keeps_the_fastest_pair_and_interpolates_the_slowest(scaling: str) -> None:
    """In 1024 tokens the fastest pair turns 163 times, the slowest 0.03 times."""
    plain = rope_tables(8192, 32)
    scaled, squeezed = (rope_tables(8192, 32, scaling=name, factor=8.0) for name in (scaling, "linear"))
    for table, unscaled, interpolated in zip(scaled, plain, squeezed, strict=True):
        torch.testing.assert_close(table[:, 0], unscaled[:, 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(table[:, -1], interpolated[:, -1], atol=1e-6, rtol=0)


def test_only_yarn_scales_attention_scores() -> None:
    assert attention_temperature("yarn", 16.0) == pytest.approx((1 + 0.1 * math.log(16)) ** 2)
    assert {attention_temperature(name, 16.0) for name in ROPE_SCALINGS if name != "yarn"} == {1.0}


def test_official_rope_variant_is_not_a_rotation() -> None:
    """The expected value is its formula, written per entry."""
    x, theta = random(5, 8), [10_000 ** (-2 * i / 8) for i in range(4)]
    y = nvidia_rotate(x, *rope_tables(5, 8))
    for p in range(5):
        table = [value for angle in theta for value in (math.sin(p * angle), math.cos(p * angle))]
        for j in range(4):
            assert float(y[p, 2 * j]) == pytest.approx(-float(x[p, 2 * j + 1]) * table[4 + j], abs=1e-6)
            assert float(y[p, 2 * j + 1]) == pytest.approx(float(x[p, 2 * j]) * table[j], abs=1e-6)
    assert (y.norm(dim=-1) - x.norm(dim=-1)).abs().max() > 0.1
