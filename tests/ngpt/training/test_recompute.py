"""Activation checkpointing: the numbers stay, the memory that a forward pass leaves for the backward pass shrinks."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ngpt.config.base import ConfigError, override
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.training.config import TrainConfig

WIDTH, LENGTH, BATCH, LAYERS = 32, 64, 4, 2
CASES: dict[str, dict[str, Any]] = {
    "ngpt": {},
    "divisor": {"norm_mode": "dotprod", "norm_probability": 0.5, "alpha_kind": "head", "n_kv_head": 1},
    "gpt": {"residual": "add", "value_residual": 0.5},
}


def model(*, recompute: bool, **changes: Any) -> GPT:
    cfg = ModelConfig(n_layer=LAYERS, n_embd=WIDTH, n_head=2, block_size=LENGTH, vocab_size=64, **changes)
    made = GPT(cfg, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):  # output matrices of a GPT start at zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    made.prepare_step(0, 10, seed=0)
    if recompute:
        made.recompute_blocks()
    return made


def tokens() -> torch.Tensor:
    return torch.randint(64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_counts_are_equal_bit_for_bit(case: str) -> None:
    kept, recomputed = (model(recompute=value, **CASES[case]) for value in (False, True))
    for each in (kept, recomputed):
        each(tokens()[:, :-1], tokens()[:, 1:]).backward()
    grads = [{name: p.grad for name, p in each.named_parameters()} for each in (kept, recomputed)]
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)
    if kept.normalizer is not None:  # a repeated pass counts no divisor twice
        for each in (kept, recomputed):
            with torch.no_grad():
                each.wte.weight[tokens()[0, 0]] = torch.inf
            each.features(tokens()[:, :-1]).sum().backward()
        counts = [int(each.normalizer.replaced) for each in (kept, recomputed) if each.normalizer is not None]
        assert counts[0] == counts[1] > 0


def kept_bytes(made: GPT) -> int:
    """What the features of a batch leave in torch's memory until their backward pass, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        x = made.features(tokens()[:, :-1])
    x.sum().backward()
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


@pytest.mark.filterwarnings("ignore:Profiler clears events")
def test_a_forward_pass_keeps_the_input_of_each_block_only() -> None:
    one = BATCH * LENGTH * WIDTH * 4
    kept, recomputed = (kept_bytes(model(recompute=value)) for value in (False, True))
    assert kept > 20 * LAYERS * one, "more than twenty tensors of a block's width"
    assert LAYERS * one <= recomputed <= 2 * LAYERS * one


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")  # from torch's compiler
def test_a_traced_model_computes_its_blocks_again_with_the_same_numbers() -> None:
    grads = []
    for recompute in (False, True):
        made = model(recompute=recompute)
        features = torch.compile(made.features, backend="aot_eager", fullgraph=True, dynamic=False)
        features(tokens()[:, :-1]).square().sum().backward()
        grads.append({name: p.grad for name, p in made.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("setting", "value"), [("norm_mode", "dotprod"), ("value_residual", 0.5)])
def test_what_blocks_hand_on_is_refused_if_they_are_compiled_and_computed_again(setting: str, value: Any) -> None:
    both = {"compile": True, "activation_checkpointing": True}
    rule = {"model.residual": "add"} if setting == "value_residual" else {}
    for name in both:
        override(TrainConfig(), {f"model.{setting}": value, name: True} | rule)
    with pytest.raises(ConfigError, match=f"activation_checkpointing is not possible with {setting}"):
        override(TrainConfig(), {f"model.{setting}": value} | both | rule)
