"""FLOPs and parameters against a count by hand and against the shapes of the real model."""

import pytest
import torch

from ngpt.config import build
from ngpt.flops import flops_per_token, matrix_params
from ngpt.model import GPT, ModelConfig
from ngpt.residual import RESIDUAL_RULES

SMALL = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 20, "vocab_size": 50}


def test_a_count_by_hand() -> None:
    # nGPT, 30.5M of the seed documents: 6 layers of 256, 12 d^2 a layer with a plain MLP, untied head.
    cfg = build(ModelConfig, {"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 50257, "mlp": "relu2"})
    assert matrix_params(cfg) == 6 * 12 * 256 * 256 + 50257 * 256 == 17_584_384
    assert flops_per_token(cfg) == 6 * 17_584_384 + 12 * 6 * 256 * 128
    swiglu = build(ModelConfig, {"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 50257})
    assert matrix_params(swiglu) == 6 * 16 * 256 * 256 + 50257 * 256


@pytest.mark.parametrize("residual", RESIDUAL_RULES)
@pytest.mark.parametrize(("mlp", "mlp_ratio"), [("swiglu", 4.0), ("relu2", 4.0), ("swiglu", 2.66)])
def test_the_count_is_that_of_the_matrices_of_the_real_model(residual: str, mlp: str, mlp_ratio: float) -> None:
    cfg = build(ModelConfig, SMALL | {"residual": residual, "mlp": mlp, "mlp_ratio": mlp_ratio})
    multiplied = [module.weight.numel() for module in GPT(cfg).modules() if isinstance(module, torch.nn.Linear)]
    assert len(multiplied) == 3 * 6 + 1
    assert matrix_params(cfg) == sum(multiplied)
    assert flops_per_token(cfg) == 6 * sum(multiplied) + 12 * 3 * 16 * 20
