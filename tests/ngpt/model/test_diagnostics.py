"""Measurements of a model in training: its distance from the sphere, step lengths and divisors."""

import numpy as np
import pytest
import torch

from ngpt.config.base import build
from ngpt.model.config import ModelConfig
from ngpt.model.diagnostics import (
    activation_norm_error,
    divisor_statistics,
    divisors,
    effective_alphas,
    restore_counts_on_error,
    weight_norm_error,
)
from ngpt.model.gpt import GPT, SphereBlock
from ngpt.model.residual import Residual

IDX = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(7))


def model(**changes: object) -> GPT:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    return GPT(build(ModelConfig, plain | changes))


def test_new_model_is_on_the_sphere() -> None:
    assert weight_norm_error(model()) < 1e-6
    assert activation_norm_error(model(), IDX) < 1e-6


def test_gpt_has_no_norm_errors() -> None:
    gpt = model(residual="add")
    assert weight_norm_error(gpt) == 0
    assert activation_norm_error(gpt, IDX) == 0
    assert effective_alphas(gpt) == {} and divisors(gpt, IDX) == {}


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("wte.weight", (3, slice(None))),
        ("lm_head.weight", (30, slice(None))),
        ("blocks.1.attention.key.weight", (7, slice(None))),
        ("blocks.0.mlp.up.weight", (5, slice(None))),
        ("blocks.0.mlp.down.weight", (slice(None), 5)),
        ("blocks.1.attention.out.weight", (slice(None), 0)),
    ],
)
@pytest.mark.parametrize("factor", [1.25, 0.75])
def test_weight_error_is_that_of_the_worst_vector(name: str, vector: tuple[int | slice, ...], factor: float) -> None:
    gpt = model()
    with torch.no_grad():
        gpt.get_parameter(name)[vector] *= factor
        gpt.get_parameter("wte.weight")[0] *= 1.1  # smaller, so it must not be reported
    assert weight_norm_error(gpt) == pytest.approx(0.25, abs=1e-6)


def test_activation_error_includes_the_embedding() -> None:
    gpt = model()
    with torch.no_grad():
        gpt.wte.weight[3] *= 1.5
    assert activation_norm_error(gpt, torch.tensor([[1, 2]])) < 1e-5
    assert activation_norm_error(gpt, torch.tensor([[1, 3]])) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("every", [2, 3, 100])
def test_activation_error_includes_every_sublayer_without_a_norm(every: int) -> None:
    """With every = 2 only attention layers skip the norm, so the stream between blocks stays on the sphere."""
    ghost = model(norm_every=every, alpha=0.3)
    lengths = [1.0]
    for module in ghost.modules():
        if isinstance(module, Residual):
            module.register_forward_hook(
                lambda module, given, x: lengths.extend(np.linalg.norm(x.detach().double().numpy(), axis=-1).ravel())
            )
    list(ghost.stream(IDX))
    error = activation_norm_error(ghost, IDX)
    assert error == pytest.approx(max(abs(length - 1) for length in lengths), abs=1e-6)
    assert error > 0.1


def test_activation_error_in_training_uses_the_draws_of_the_last_step() -> None:
    gpt = model(norm_probability=0.5, alpha=0.3)
    errors = []
    for step in range(20):
        gpt.prepare_step(step, 20, seed=0)
        errors.append(activation_norm_error(gpt, IDX))
    assert max(errors) > 0.1
    gpt.eval()
    assert activation_norm_error(gpt, IDX) < 1e-6


@pytest.mark.parametrize("mode", ["dotprod", "ema"])
def test_reported_divisors_match_the_forward_pass(mode: str) -> None:
    gpt = model(norm_mode=mode, norm_decay=0.7, alpha=0.3)
    found = divisors(gpt, IDX)
    assert list(found) == ["r/attention.0", "r/mlp.0", "r/attention.1", "r/mlp.1"]
    block, x = gpt.blocks[0], gpt.wte(IDX)
    assert isinstance(block, SphereBlock)
    answer = block.attention(x, gpt.cos, gpt.sin).detach().double().numpy()
    cosine = (x.detach().double().numpy() * answer).sum(-1) / np.linalg.norm(answer, axis=-1)
    expected = 1 + cosine if mode == "dotprod" else 0.7 + 0.3 * (1 + cosine)
    np.testing.assert_allclose(found["r/attention.0"].numpy(), expected, atol=1e-6)
    every = np.stack([r.numpy() for r in found.values()])
    expected_statistics = {"r_mean": every.mean(), "r_min": every.min(), "r_max": every.max()}
    assert divisor_statistics(found) == pytest.approx(expected_statistics)
    assert divisor_statistics({}) == {}


@pytest.mark.parametrize("look", [divisors, activation_norm_error])
def test_diagnostics_do_not_change_the_model(look: object) -> None:
    gpt = model(norm_mode="dotprod")
    with torch.no_grad():
        gpt.wte.weight[IDX[0, 0]] = torch.nan  # so that divisors are replaced and counted
    assert gpt.normalizer is not None
    gpt(IDX)
    counted = int(gpt.normalizer.replaced)
    assert counted > 0
    assert callable(look)
    look(gpt, IDX)
    assert int(gpt.normalizer.replaced) == counted
    assert not any(module._forward_hooks for module in gpt.modules())


def test_failed_diagnostics_remove_their_hooks() -> None:
    gpt = model(norm_mode="dotprod")
    with pytest.raises(ValueError, match="do not fit"):
        divisors(gpt, torch.zeros(1, 13, dtype=torch.long))
    assert not any(module._forward_hooks for module in gpt.modules())


@pytest.mark.parametrize(("kind", "sizes"), [("vector", (16, 16)), ("scalar", (1, 1)), ("head", (2, 1))])
def test_step_lengths_are_the_effective_alphas(kind: str, sizes: tuple[int, int]) -> None:
    gpt = model(alpha=[0.1, 0.3], alpha_kind=kind)
    with torch.no_grad():
        gpt.get_parameter("blocks.1.mlp_residual.alpha.stored").mul_(-2)
    found = effective_alphas(gpt)
    assert [len(found[f"alpha/{name}.0"]) for name in ("attention", "mlp")] == list(sizes)
    expected = {"alpha/attention.0": 0.1, "alpha/mlp.0": 0.1, "alpha/attention.1": 0.3, "alpha/mlp.1": 0.6}
    assert {name: float(alpha.mean()) for name, alpha in found.items()} == pytest.approx(expected)
    scheduled = model(alpha=0.15, alpha_final=0.2, alpha_kind=kind)
    scheduled.prepare_step(9, 10, seed=0)
    assert all(float(alpha.mean()) == pytest.approx(0.2) for alpha in effective_alphas(scheduled).values())


def test_divisors_of_an_aborted_pass_are_not_counted() -> None:
    gpt = model(norm_mode="dotprod")
    with torch.no_grad():
        gpt.get_parameter("blocks.0.mlp.down.weight").fill_(torch.inf)
    assert gpt.normalizer is not None
    with pytest.raises(MemoryError), restore_counts_on_error(gpt):
        gpt(IDX)
        assert int(gpt.normalizer.replaced) > 0
        raise MemoryError
    assert int(gpt.normalizer.replaced) == 0
    with restore_counts_on_error(gpt):
        gpt(IDX)
    assert int(gpt.normalizer.replaced) > 0
