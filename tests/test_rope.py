"""Rotary embedding is a rotation: of complex numbers, by an angle that is position times frequency."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngpt.rope import rope_tables, rotate


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@given(st.integers(1, 40), st.sampled_from([2, 4, 10, 64]), st.sampled_from([10.0, 10_000.0, 500_000.0]))
def test_it_multiplies_each_pair_by_a_complex_number_of_length_one(length: int, head_dim: int, base: float) -> None:
    x = random(2, 3, length, head_dim)
    ours = rotate(x, *rope_tables(length, head_dim, base=base))
    pairs = x.numpy().astype(np.float64).reshape(2, 3, length, head_dim // 2, 2)
    frequencies = np.array([base ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.outer(np.arange(length), frequencies))
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-6)


def test_position_zero_is_left_alone_and_the_others_are_not() -> None:
    x = random(5, 8)
    y = rotate(x, *rope_tables(5, 8))
    assert torch.equal(y[0], x[0])
    assert (y[1:] - x[1:]).norm(dim=-1).min() > 0.1


def test_lengths_are_kept() -> None:
    x = random(4, 200, 32)
    y = rotate(x, *rope_tables(200, 32))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 100))
def test_a_dot_product_depends_on_the_distance_only(here: int, there: int, shift: int) -> None:
    cos, sin = rope_tables(1001, 16)
    q, k = random(2, 1, 16)

    def score(p: int, r: int) -> float:
        return float((rotate(q, cos[p : p + 1], sin[p : p + 1]) * rotate(k, cos[r : r + 1], sin[r : r + 1])).sum())

    assert abs(score(here, there) - score(here + shift, there + shift)) < 1e-4


def test_a_dot_product_does_depend_on_the_distance() -> None:
    cos, sin = rope_tables(10, 16)
    q = rotate(random(1, 16).expand(10, 16), cos, sin)
    scores = q @ q.T
    assert all((scores[0, 0] - scores[0, distance]).abs() > 0.01 for distance in range(1, 10))


def test_the_result_is_float32_also_for_bfloat16() -> None:
    x = random(6, 8).bfloat16()
    assert torch.equal(rotate(x, *rope_tables(6, 8)), rotate(x.float(), *rope_tables(6, 8)))
