"""Projection normalizes each matrix along the model dimension."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ngpt.config.base import build
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.optim import projection
from ngpt.optim.projection import project, project_weights

ROWS = ("wte", "lm_head", "attention.query", "attention.key", "attention.value", "mlp.up")
COLUMNS = ("attention.out", "mlp.down")


def model(**changes: object) -> GPT:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    return GPT(build(ModelConfig, plain | changes))


def perturbed(**changes: object) -> GPT:
    """A model whose parameters are off the sphere, each by another factor and noise."""
    gpt, generator = model(**changes), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, parameter in enumerate(gpt.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + number / 10).add_(0.05 * noise)
    return gpt


def state(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gpt.state_dict().items()}


@pytest.mark.parametrize("residual", ["lerp", "slerp", "add_normalize"])
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_projection_gives_unit_vectors_along_the_model_dimension(residual: str, mlp: str) -> None:
    gpt = perturbed(residual=residual, mlp=mlp)
    project_weights(gpt)
    seen = 0
    for name, parameter in gpt.named_parameters():
        if parameter.ndim == 2:
            (axis,) = [1 for end in ROWS if name.endswith(f"{end}.weight")] or [
                0 for end in COLUMNS if name.endswith(f"{end}.weight")
            ]
            assert parameter.shape[axis] == 16, name  # the model dimension
            lengths = parameter.detach().double().square().sum(axis).sqrt()
            torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0, msg=name)
            seen += 1
    assert seen == 2 + 2 * 6


def test_projection_changes_only_lengths_and_no_scales() -> None:
    gpt = perturbed()
    before = state(gpt)
    project_weights(gpt)
    for name, tensor in state(gpt).items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, before[name]), name
        else:
            axis = 0 if any(part in name for part in COLUMNS) else 1
            expected = before[name].double() / before[name].double().norm(dim=axis, keepdim=True)
            torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0, msg=name)


def test_second_projection_changes_almost_nothing() -> None:
    gpt = perturbed()
    project_weights(gpt)
    once = state(gpt)
    project_weights(gpt)
    for name, tensor in state(gpt).items():
        torch.testing.assert_close(tensor, once[name], atol=2e-7, rtol=0, msg=name)


def test_gpt_has_nothing_to_project() -> None:
    gpt = perturbed(residual="add")
    before = state(gpt)
    project_weights(gpt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(gpt).items())


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_shared_keys_and_values_are_projected_and_a_tied_head_only_once(n_kv_head: int) -> None:
    gpt = perturbed(n_head=4, n_kv_head=n_kv_head, tied=True)
    project_weights(gpt)
    for name in ("query", "key", "value"):
        weight = gpt.get_parameter(f"blocks.1.attention.{name}.weight").detach()
        assert weight.shape == (16 if name == "query" else 4 * n_kv_head, 16)
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)), atol=1e-6, rtol=0)
    assert sum(weight is gpt.wte.weight for weight, _ in gpt.sphere_weights()) == 1


@pytest.fixture(params=[64, 300, 1000, 2**22])
def batch_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Batch sizes: one vector, blocks that do not divide a weight evenly, and all weights of a shape."""
    monkeypatch.setitem(projection.BATCH_BYTES, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("batch_bytes")
def test_projection_in_batches_equals_one_weight_at_a_time_bit_for_bit() -> None:
    gpt, other = perturbed(n_kv_head=1), perturbed(n_kv_head=1)
    project_weights(gpt)
    for weight, dim in other.sphere_weights():
        weight.detach().copy_(F.normalize(weight.detach(), dim=dim))
    expected = state(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(gpt).items())


@pytest.mark.usefixtures("batch_bytes")
def test_projection_matches_float64_division_within_rounding() -> None:
    gpt = perturbed()
    before = [(weight.detach().double().numpy().copy(), dim) for weight, dim in gpt.sphere_weights()]
    project_weights(gpt)
    for (weight, _), (old, dim) in zip(gpt.sphere_weights(), before, strict=True):
        exact = old / np.sqrt((old**2).sum(dim, keepdims=True))
        new = weight.detach().numpy()
        assert (np.abs(new - exact) <= 3 * np.spacing(np.abs(exact).astype(np.float32))).all()


def test_zero_vector_stays_zero_and_bfloat16_weights_are_rounded_once() -> None:
    gpt = perturbed().bfloat16()
    with torch.no_grad():
        gpt.wte.weight[3] = 0
    expected = [F.normalize(weight.detach().float(), dim=dim).bfloat16() for weight, dim in gpt.sphere_weights()]
    project_weights(gpt)
    for (weight, _), exact in zip(gpt.sphere_weights(), expected, strict=True):
        assert torch.equal(weight, exact)
    assert not gpt.wte.weight[3].any()


def test_projection_works_in_place() -> None:
    gpt = perturbed()
    before = [weight.data_ptr() for weight, _ in gpt.sphere_weights()]
    project_weights(gpt)
    assert [weight.data_ptr() for weight, _ in gpt.sphere_weights()] == before


def test_projecting_several_models_equals_projecting_each() -> None:
    several = [perturbed(), perturbed(mlp="relu2"), perturbed(n_layer=1)]
    project(entry for gpt in several for entry in gpt.sphere_weights())
    for gpt in several:
        for weight, dim in gpt.sphere_weights():
            lengths = np.linalg.norm(weight.detach().double().numpy(), axis=dim)
            np.testing.assert_allclose(lengths, 1, atol=1e-6)
    alone = perturbed()
    project_weights(alone)
    for name, tensor in state(alone).items():
        torch.testing.assert_close(state(several[0])[name], tensor)
