"""Normalisations against NumPy in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ngpt.norm import l2_normalize, rms_norm

# Subnormal squares are lost in float32, so a component is zero or not tiny.
component = st.floats(2**-10, 2**20, width=32) | st.just(0.0) | st.floats(-(2**20), -(2**-10), width=32)
vectors = arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=component)


@given(vectors, st.integers(0, 1))
def test_l2_normalize_divides_by_the_euclidean_length(x: np.ndarray, dim: int) -> None:
    length = np.sqrt((x.astype(np.float64) ** 2).sum(dim, keepdims=True))
    expected = np.divide(x, length, out=np.zeros(x.shape), where=length > 0)
    np.testing.assert_allclose(l2_normalize(torch.from_numpy(x), dim).numpy(), expected, atol=1e-6)


@given(vectors)
def test_rms_norm_divides_by_the_root_mean_square_of_the_last_dimension(x: np.ndarray) -> None:
    mean_square = (x.astype(np.float64) ** 2).mean(-1, keepdims=True)
    expected = x / np.sqrt(mean_square + 1e-6)
    np.testing.assert_allclose(rms_norm(torch.from_numpy(x)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [l2_normalize, rms_norm])
def test_zero_stays_zero_and_has_a_finite_gradient(normalize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    y = normalize(x)
    assert torch.equal(y, torch.zeros(2, 5))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("normalize", [l2_normalize, rms_norm])
def test_norms_are_taken_in_float32_whatever_goes_in(normalize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(7, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = normalize(x)
    assert y.dtype == torch.float32
    exact = x.double() / x.double().norm(dim=-1, keepdim=True) * (1 if normalize is l2_normalize else 4096**0.5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(normalize(x), y)
