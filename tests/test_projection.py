"""Projection keeps each matrix on the sphere along the model's dimension."""

import pytest
import torch

from ngpt.config import build
from ngpt.model import GPT, ModelConfig
from ngpt.projection import project_weights

ROWS = ("wte", "lm_head", "attention.query", "attention.key", "attention.value", "mlp.up")
COLUMNS = ("attention.out", "mlp.down")


def model(**changes: object) -> GPT:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    return GPT(build(ModelConfig, plain | changes))


def disturbed(**changes: object) -> GPT:
    """All parameters off the sphere by a different factor each, with noise."""
    gpt, generator = model(**changes), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, parameter in enumerate(gpt.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + number / 10).add_(0.05 * noise)
    return gpt


def state(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gpt.state_dict().items()}


@pytest.mark.parametrize("residual", ["lerp", "slerp", "seed"])
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_vectors_along_the_models_dimension_have_length_one_afterwards(residual: str, mlp: str) -> None:
    gpt = disturbed(residual=residual, mlp=mlp)
    project_weights(gpt)
    seen = 0
    for name, parameter in gpt.named_parameters():
        if parameter.ndim == 2:
            (axis,) = [1 for end in ROWS if name.endswith(f"{end}.weight")] or [
                0 for end in COLUMNS if name.endswith(f"{end}.weight")
            ]
            assert parameter.shape[axis] == 16, name  # the model's dimension
            lengths = parameter.detach().double().square().sum(axis).sqrt()
            torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0, msg=name)
            seen += 1
    assert seen == 2 + 2 * 6


def test_it_changes_lengths_only_and_no_scale() -> None:
    gpt = disturbed()
    before = state(gpt)
    project_weights(gpt)
    for name, tensor in state(gpt).items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, before[name]), name
        else:
            axis = 0 if any(part in name for part in COLUMNS) else 1
            expected = before[name].double() / before[name].double().norm(dim=axis, keepdim=True)
            torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=0, msg=name)


def test_a_second_projection_changes_next_to_nothing() -> None:
    gpt = disturbed()
    project_weights(gpt)
    once = state(gpt)
    project_weights(gpt)
    for name, tensor in state(gpt).items():
        torch.testing.assert_close(tensor, once[name], atol=2e-7, rtol=0, msg=name)


def test_a_gpt_has_nothing_to_project() -> None:
    gpt = disturbed(residual="add")
    before = state(gpt)
    project_weights(gpt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(gpt).items())


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_shared_keys_and_values_are_projected_too_and_a_tied_head_once(n_kv_head: int) -> None:
    gpt = disturbed(n_head=4, n_kv_head=n_kv_head, tied=True)
    project_weights(gpt)
    for name in ("query", "key", "value"):
        weight = gpt.get_parameter(f"blocks.1.attention.{name}.weight").detach()
        assert weight.shape == (16 if name == "query" else 4 * n_kv_head, 16)
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)), atol=1e-6, rtol=0)
    assert sum(weight is gpt.wte.weight for weight, _ in gpt.sphere_weights()) == 1
