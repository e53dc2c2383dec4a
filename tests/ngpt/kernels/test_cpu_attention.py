"""The C++ causal attention against that of torch in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngpt.kernels.cpu_attention import MAX_TOKENS, causal_attention, has_cpu_attention
from ngpt.model import gpt, layers
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", autouse=True)
def require_kernel() -> None:
    if not has_cpu_attention():
        pytest.skip("no C++ compiler")


def inputs(batch: int, tokens: int, heads: int, groups: int, width: int, *, seed: int = 0) -> Four:
    """q, k, v and the gradient of the output. Scores are a few units large at a scale of 1."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads, groups, groups, heads)
    q, k, v, grad = (torch.randn(batch, tokens, count, width, generator=generator) for count in counts)
    return q / width**0.25, k / width**0.25, v, grad


def run_reference(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """Output and gradients of q, k and v of torch's attention in float64, with its heads before tokens."""
    q, k, v = (part.double().transpose(1, 2).requires_grad_() for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    gradients = torch.autograd.grad(out, (q, k, v), grad.double().transpose(1, 2))
    return [part.detach().transpose(1, 2) for part in (out, *gradients)]


def run_kernel(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    q, k, v = (part.detach().requires_grad_() for part in (q, k, v))
    out, _ = causal_attention(q, k, v, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    groups=st.integers(1, 3),
    each=st.integers(1, 3),
    width=st.integers(1, 40),
    scale=st.sampled_from([0.2, 1.0, 12.0]),
    seed=st.integers(0, 10),
)
def test_output_and_gradients_match_torch_attention_in_float64(
    batch: int, tokens: int, groups: int, each: int, width: int, scale: float, seed: int
) -> None:
    given = inputs(batch, tokens, groups * each, groups, width, seed=seed)
    q, k, v, grad = given
    factors = scale * grad.norm() * v.norm() * max(q.norm(), k.norm())  # whose products may cancel in a gradient
    for found, expected in zip(run_kernel(*given, scale), run_reference(*given, scale), strict=True):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert (found - expected).norm() <= 1e-6 * (expected.norm() + factors)


@pytest.mark.parametrize("tokens", [128, 257, MAX_TOKENS])
def test_long_sequences_match_torch_attention(tokens: int) -> None:
    given = inputs(1, tokens, 2, 1, 32)
    for found, expected in zip(run_kernel(*given, 1.0), run_reference(*given, 1.0), strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm()


def test_tokens_do_not_attend_to_later_tokens() -> None:
    q, k, v, grad = inputs(2, 40, 2, 2, 16)
    before = run_kernel(q, k, v, grad, 1.0)[0][:, :30]
    k[:, 30:], v[:, 30:] = 100.0, 1e6
    assert torch.equal(run_kernel(q, k, v, grad, 1.0)[0][:, :30], before)


def test_equal_scores_give_the_running_mean_of_the_values() -> None:
    _, k, v, grad = inputs(1, 20, 1, 1, 8)
    mean = v.cumsum(1) / torch.arange(1, 21).view(1, -1, 1, 1)
    torch.testing.assert_close(run_kernel(torch.zeros_like(v), k, v, grad, 1.0)[0], mean, rtol=1e-5, atol=1e-6)


def test_memory_layout_does_not_change_the_result() -> None:
    given = inputs(2, 33, 4, 2, 16)
    q, k, v, grad = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in given)
    assert not q.is_contiguous()
    for found, expected in zip(run_kernel(q, k, v, grad, 1.0), run_kernel(*given, 1.0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_propagates_within_its_head(where: int) -> None:
    given = inputs(1, 20, 2, 2, 8)
    given[where][0, 7, 1, 3] = math.nan
    out, *gradients = run_kernel(*given, 1.0)
    assert out[0, 7, 1].isnan().any() and out[0, :, 0].isfinite().all()
    assert any(gradient[0, :, 1].isnan().any() for gradient in gradients)
    assert all(gradient[0, :, 0].isfinite().all() for gradient in gradients)


def test_results_do_not_depend_on_the_number_of_threads(set_threads: Callable[[int], None]) -> None:
    given = inputs(3, 50, 4, 2, 16)
    set_threads(1)
    alone = run_kernel(*given, 1.0)
    set_threads(3)
    assert all(torch.equal(one, two) for one, two in zip(run_kernel(*given, 1.0), alone, strict=True))


def test_operator_passes_torch_opcheck() -> None:
    q, k, v, _ = inputs(2, 9, 4, 2, 8)
    leaves = tuple(part.requires_grad_() for part in (q, k, v))
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(causal_attention, (*leaves, 0.7), test_utils=kinds)


@pytest.mark.parametrize("n_kv_head", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_uses_the_kernel(n_kv_head: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "compile_for", lambda key, function: function)
    cfg = ModelConfig(n_layer=2, n_head=2, n_kv_head=n_kv_head, n_embd=16, block_size=24, vocab_size=50)
    idx = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(0))
    calls = 0

    def counted(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return causal_attention(q, k, v, scale)

    monkeypatch.setattr(layers, "causal_attention", counted)
    plain, prepared = GPT(cfg), GPT(cfg)
    prepared.compile_parts()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        expected, found = plain.features(idx), prepared.features(idx)
    assert calls == cfg.n_layer
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 2**-8)
