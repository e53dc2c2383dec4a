"""A stack computes what each of its models computes, in the tensors that the models hold."""

from typing import Any

import pytest
import torch

import ngpt.ensemble.stack
from ngpt.config.base import build
from ngpt.ensemble.stack import Stack
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 31, "mlp_ratio": 2.0}
KINDS: dict[str, dict[str, Any]] = {
    "lerp": {},
    "scalars": {"alpha_kind": "scalar", "logit_scale_kind": "scalar", "alpha_learned": False, "softcap": 5.0},
    "tied": {"tied": True, "residual": "slerp", "norm_mode": "dotprod", "n_kv_head": 1, "value_residual": 0.5},
    "gpt": {"residual": "add", "norm_gain": True, "mlp": "relu2", "qkv_bias": True},
}


def models(kind: str, count: int = 3) -> list[GPT]:
    """Models with different weights and, on the sphere, different alpha and logit scale."""
    found = []
    for k in range(count):
        apart = {} if kind == "gpt" else {"alpha": 0.1 * (k + 1), "logit_scale": 2.0 + k}
        model = GPT(build(ModelConfig, SMALL | KINDS[kind] | apart), seed=k)
        if kind == "gpt":  # its zero initialisation would hide differences
            generator = torch.Generator().manual_seed(k)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        found.append(model)
    return found


def batches(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    idx, targets = (torch.randint(31, (count, 4, 8), generator=generator) for _ in range(2))
    return idx, targets


@pytest.mark.parametrize("limit", [0, 1 << 40])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_those_of_each_model(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ngpt.ensemble.stack.MAX_BATCHED_LOGITS, "cpu", limit)
    lone, stacked, (idx, targets) = models(kind), models(kind), batches()
    stack = Stack(stacked)
    stack.begin()
    losses = stack.losses(idx, targets)
    losses.sum().backward()
    norms = stack.norms().tolist()
    stack.clip(norms, [0.1, 1e9, 0.2])
    for k, model in enumerate(lone):
        loss = model(idx[k], targets[k])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), [0.1, 1e9, 0.2][k])
        assert losses[k].item() == pytest.approx(loss.item(), abs=1e-5)
        assert norms[k] == pytest.approx(float(norm), rel=1e-4)
        for own, other in zip(stacked[k].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_a_stacked_model_holds_views_and_computes_the_same() -> None:
    stacked, lone, (idx, _) = models("tied"), models("tied"), batches()
    stack = Stack(stacked)
    for k, model in enumerate(stacked):
        assert torch.equal(model(idx[k]), lone[k](idx[k]))
        with torch.no_grad():
            model.wte.weight.fill_(float(k))
            model.blocks[0].attention_residual.alpha.multiply(2.0)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert stack.weights["wte.weight"].mean((1, 2)).tolist() == [0.0, 1.0, 2.0]
    ratios = stack.buffers["blocks.0.attention_residual.alpha.ratio"] / torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(ratios, torch.full((3,), 2 * 16**0.5))


def test_a_gradient_that_is_not_finite_stays_in_its_model() -> None:
    stacked, (idx, targets) = models("lerp"), batches()
    stack = Stack(stacked)
    with torch.no_grad():
        stacked[1].blocks[0].mlp.up.weight[0, 0] = torch.inf  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    stack.begin()
    losses = stack.losses(idx, targets)
    losses.sum().backward()
    norms = stack.norms().tolist()
    stack.clip(norms, [1.0] * 3)
    assert losses.isfinite().tolist() == torch.tensor(norms).isfinite().tolist() == [True, False, True]
    for k in (0, 2):
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in stacked[k].parameters())


def test_models_can_be_restacked_without_one_of_them() -> None:
    stacked, lone, (idx, targets) = models("lerp"), models("lerp"), batches()
    Stack(stacked)
    stack = Stack([stacked[2], stacked[0]])
    stack.begin()
    losses = stack.losses(idx[[2, 0]], targets[[2, 0]])
    losses.sum().backward()
    lone[2](idx[2], targets[2]).backward()
    for own, other in zip(stacked[2].parameters(), lone[2].parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-3)
    expected = [lone[k](idx[k], targets[k]).item() for k in (2, 0)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_divisors_that_are_not_finite_are_counted_per_model() -> None:
    stacked, (idx, targets) = models("tied"), batches()
    stack = Stack(stacked)
    with torch.no_grad():
        stacked[1].blocks[1].mlp.down.weight[:] = torch.nan  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    stack.losses(idx, targets)
    counts = [int(model.normalizer.replaced) for model in stacked if model.normalizer is not None]
    assert counts == [0, 4 * 8, 0]
