"""Normalizations and the running divisor r against NumPy in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ngpt.model.norm import NORM_MODES, DotProdNormalizer, l2_normalize, rms_norm

# float32 loses subnormal squares, so each component is either zero or not tiny.
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
    expected = x / np.sqrt(mean_square + 2**-23)  # the machine epsilon of float32
    np.testing.assert_allclose(rms_norm(torch.from_numpy(x)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [l2_normalize, rms_norm])
def test_zero_vector_stays_zero_and_has_a_finite_gradient(normalize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    y = normalize(x)
    assert torch.equal(y, torch.zeros(2, 5))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("normalize", [l2_normalize, rms_norm])
def test_norms_are_computed_in_float32_for_every_input_dtype(normalize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(7, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = normalize(x)
    assert y.dtype == torch.float32
    exact = x.double() / x.double().norm(dim=-1, keepdim=True) * (1 if normalize is l2_normalize else 4096**0.5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(normalize(x), y)


def sublayer_outputs(number: int, *, sublayers: int = 5) -> torch.Tensor:
    """Streams and outputs of several sublayers, (sublayers, 2, B, T, D)."""
    return torch.randn(sublayers, 2, 2, 3, 8, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("mode", NORM_MODES)
@given(number=st.integers(0, 1000), decay=st.floats(0, 1))
def test_divisor_matches_a_computation_by_hand(mode: str, number: int, decay: float) -> None:
    normalizer, given = DotProdNormalizer(mode, decay=decay), sublayer_outputs(number)
    r = normalizer.start(given[0, 0])
    for x, answer in given:
        r = normalizer(r, x, answer)
    for b in range(2):
        for t in range(3):
            expected = 1.0
            for x, answer in given.double().numpy():
                dot = sum(float(x[b, t, d]) * float(answer[b, t, d]) for d in range(8))
                if mode == "dotprod":
                    expected = expected + dot
                elif mode == "ema":
                    expected = decay * expected + (1 - decay) * (1 + dot)
            assert float(r[b, t]) == pytest.approx(expected, abs=1e-4)
    assert int(normalizer.replaced) == 0


def test_divisor_restarts_at_one_in_every_pass() -> None:
    normalizer, given = DotProdNormalizer(), sublayer_outputs(1)
    x, answer = given[0]
    first = normalizer(normalizer.start(x), x, answer)
    normalizer(first, *given[1])
    assert torch.equal(normalizer.start(x), torch.ones(2, 3))
    assert torch.equal(normalizer(normalizer.start(x), x, answer), first)


@given(st.integers(0, 1000))
def test_average_with_decay_one_keeps_the_divisor_at_exactly_one(number: int) -> None:
    normalizer, (x, answer) = DotProdNormalizer("ema", decay=1.0), sublayer_outputs(number)[0]
    assert torch.equal(normalizer(normalizer.start(x), x, 1e6 * answer), torch.ones(2, 3))


@pytest.mark.parametrize("mode", ["dotprod", "ema"])
def test_output_orthogonal_to_the_stream_keeps_the_divisor_at_one(mode: str) -> None:
    x, answer = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    x[..., 0], answer[..., 3] = 1, 5
    normalizer = DotProdNormalizer(mode)
    torch.testing.assert_close(normalizer(normalizer.start(x), x, answer), torch.ones(1, 2))


def test_divisor_grows_beyond_256_for_a_bfloat16_stream() -> None:
    normalizer, x = DotProdNormalizer(), torch.full((1, 1, 4), 0.5).bfloat16()
    r = normalizer.start(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(300):
            r = normalizer(r, x, x)
    assert r.dtype == torch.float32
    assert r.item() == 301


def test_nonfinite_divisor_is_replaced_and_counted() -> None:
    normalizer, x = DotProdNormalizer(), torch.ones(1, 4, 1)
    answer = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0]).view(1, 4, 1)
    r = normalizer(normalizer.start(x), x, answer)
    largest = torch.finfo(torch.float32).max
    assert r.tolist() == [[1.0, largest, -largest, 3.0]]
    assert int(normalizer.replaced) == 3
    normalizer(normalizer.start(x), x, answer)
    assert int(normalizer.replaced) == 6


def test_count_of_replaced_divisors_is_saved_with_the_model() -> None:
    normalizer, x = DotProdNormalizer(), torch.full((1, 1, 1), torch.nan)
    normalizer(normalizer.start(x), x, x)
    restored = DotProdNormalizer()
    restored.load_state_dict(normalizer.state_dict())
    assert int(restored.replaced) == 1


def test_unknown_norm_mode_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="unknown norm mode 'dotpord', did you mean 'dotprod'"):
        DotProdNormalizer("dotpord")
