"""FLOPs and parameters against counts by hand, those of nanochat, and those of torch on the real model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ngpt.config.base import build
from ngpt.model.config import ModelConfig
from ngpt.model.flops import flops_per_token, matrix_params
from ngpt.model.gpt import GPT
from ngpt.model.residual import RESIDUAL_RULES
from tests.helpers import GOLDEN

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 16, "block_size": 20, "vocab_size": 50}
MLPS = [("swiglu", 4.0), ("relu2", 4.0), ("swiglu", 2.66)]
NANOCHAT = GOLDEN / "nanochat_gpt.npz"


def test_flops_and_parameters_match_a_count_by_hand() -> None:
    # The 30.5M nGPT of the source reports: 6 layers of width 256, 12 d^2 per layer with a plain MLP, untied head.
    cfg = build(ModelConfig, {"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 50257, "mlp": "relu2"})
    assert matrix_params(cfg) == 6 * 12 * 256 * 256 + 50257 * 256 == 17_584_384
    assert flops_per_token(cfg) == 6 * 17_584_384 + 12 * 6 * 256 * 128
    swiglu = build(ModelConfig, {"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 50257})
    assert matrix_params(swiglu) == 6 * 16 * 256 * 256 + 50257 * 256


def test_flops_match_a_count_by_hand_with_grouped_query_attention() -> None:
    cfg = build(ModelConfig, {"n_layer": 6, "n_head": 4, "n_kv_head": 1, "n_embd": 256, "vocab_size": 50257})
    query_and_output, key_and_value, swiglu = 2 * 256 * 256, 2 * 256 * 64, 3 * 256 * 1024
    assert matrix_params(cfg) == 6 * (query_and_output + key_and_value + swiglu) + 50257 * 256
    assert flops_per_token(cfg) == 6 * matrix_params(cfg) + 12 * 6 * 256 * 128


def test_flops_match_the_estimate_of_nanochat_for_its_model() -> None:
    with np.load(NANOCHAT) as golden:
        n_layer, n_head, n_kv_head, n_embd, vocab_size, _, block_size = map(int, golden["meta_config"])
        estimate = int(golden["flops_per_token"])
    cfg = ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        vocab_size=vocab_size,
        block_size=block_size,
        mlp="relu2",
        residual="add",
    )
    assert flops_per_token(cfg) == estimate


@pytest.mark.parametrize("residual", RESIDUAL_RULES)
@pytest.mark.parametrize(("mlp", "mlp_ratio"), MLPS)
def test_parameter_count_matches_the_matrices_of_the_real_model(residual: str, mlp: str, mlp_ratio: float) -> None:
    cfg = build(ModelConfig, SMALL | {"residual": residual, "mlp": mlp, "mlp_ratio": mlp_ratio})
    multiplied = [module.weight.numel() for module in GPT(cfg).modules() if isinstance(module, torch.nn.Linear)]
    assert len(multiplied) == 3 * 6 + 1
    assert matrix_params(cfg) == sum(multiplied)
    assert flops_per_token(cfg) == 6 * sum(multiplied) + 12 * 3 * 16 * 20


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@pytest.mark.parametrize(("mlp", "mlp_ratio"), MLPS)
@pytest.mark.parametrize("residual", ["lerp", "add"])
def test_flops_match_torch_over_forward_and_backward_of_the_real_model(
    residual: str, mlp: str, mlp_ratio: float, n_kv_head: int | None, tied: bool
) -> None:
    choices = {"residual": residual, "mlp": mlp, "mlp_ratio": mlp_ratio, "n_kv_head": n_kv_head, "tied": tied}
    cfg = build(ModelConfig, SMALL | choices)
    model, idx = GPT(cfg), torch.zeros(2, 20, dtype=torch.int64)
    # Torch has no formula for fused attention on a CPU. For unfused attention it counts the full square of scores, as
    # ngpt does. It has no formula for the in-place product in ngpt's loss either, so this uses torch's loss.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    assert counter.get_total_flops() == idx.numel() * flops_per_token(cfg)
