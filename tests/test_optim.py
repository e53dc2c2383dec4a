"""Who updates which parameter, how fast, and with what decay."""

from typing import Any

import pytest
import torch

from ngpt.config import ConfigError, build
from ngpt.model import GPT, ModelConfig
from ngpt.muon import Muon
from ngpt.optim import OPTIMIZERS, OptimConfig, build_optimizers, set_rates
from ngpt.residual import RESIDUAL_RULES


def model(**changes: object) -> GPT:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    return GPT(build(ModelConfig, plain | changes))


def with_gradients(gpt: GPT, seed: int = 0) -> GPT:
    generator = torch.Generator().manual_seed(seed)
    for parameter in gpt.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return gpt


def snapshot(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}


def moved(gpt: GPT, **settings: Any) -> set[str]:
    """The parameters that a step of the given optimizer changes."""
    before = snapshot(with_gradients(gpt))
    for optimizer in build_optimizers(gpt, build(OptimConfig, settings)):
        optimizer.step()
    return {name for name, parameter in snapshot(gpt).items() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("residual", RESIDUAL_RULES)
@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_every_parameter_belongs_to_exactly_one_group_and_moves(name: str, residual: str, kind: str) -> None:
    gpt = model(residual=residual, alpha_kind=kind, logit_scale_kind=kind)
    optimizers = build_optimizers(gpt, OptimConfig(name=name))
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(gpt.parameters()))
    assert moved(model(residual=residual), name=name) == {
        name for name, _ in model(residual=residual).named_parameters()
    }


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_takes_the_steps_of_torchs_adamw(weight_decay: float) -> None:
    ours, theirs = model(), model()
    (optimizer,) = build_optimizers(
        ours, OptimConfig(lr=0.01, lr_other=0.03, weight_decay=weight_decay, betas=(0.8, 0.9))
    )
    reference = [
        torch.optim.AdamW(
            [parameter],
            lr=0.01 if parameter.ndim == 2 else 0.03,
            betas=(0.8, 0.9),
            weight_decay=weight_decay if parameter.ndim == 2 else 0.0,
        )
        for parameter in theirs.parameters()
    ]
    for step in range(5):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        optimizer.step()
        for single in reference:
            single.step()
    expected = snapshot(theirs)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-6, rtol=1e-5, msg=name)


def scales(gpt: GPT) -> set[str]:
    return {name for name, parameter in gpt.named_parameters() if parameter.ndim == 1}


def test_lr_is_of_matrices_and_lr_other_of_scales_under_adamw() -> None:
    every = {name for name, _ in model().named_parameters()}
    assert moved(model(), lr=0.1, lr_other=0.0) == every - scales(model())
    assert moved(model(), lr=0.0, lr_other=0.1) == scales(model())
    assert moved(model(), lr=0.1) == every


def test_lr_is_of_the_blocks_matrices_and_lr_other_of_the_rest_under_muon() -> None:
    every = {name for name, _ in model().named_parameters()}
    inside = {name for name in every if name.startswith("blocks.")} - scales(model())
    assert len(inside) == 2 * 6
    assert moved(model(), name="muon", lr=0.1, lr_other=0.0) == inside
    assert moved(model(), name="muon", lr=0.0, lr_other=0.1) == every - inside


def test_muons_settings_reach_it() -> None:
    cfg = OptimConfig(name="muon", lr=0.3, momentum=0.7, nesterov=False, ns_steps=3, weight_decay=0.2)
    optimizer = build_optimizers(model(), cfg)[0]
    assert isinstance(optimizer, Muon)
    (group,) = optimizer.param_groups
    expected = {"lr": 0.3, "momentum": 0.7, "nesterov": False, "ns_steps": 3, "weight_decay": 0.2}
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_only(name: str) -> None:
    gpt = model()
    before = snapshot(gpt)
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in build_optimizers(gpt, OptimConfig(name=name, lr=0.1, weight_decay=0.5)):
        optimizer.step()
    for parameter_name, parameter in snapshot(gpt).items():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter, factor * before[parameter_name], msg=parameter_name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_are_multiples_of_those_at_the_start(name: str) -> None:
    optimizers = build_optimizers(model(), OptimConfig(name=name, lr=0.2, lr_other=0.4))
    for multiplier in (0.5, 0.25, 1.0):
        set_rates(optimizers, multiplier)
        rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        assert rates == {0.2 * multiplier, 0.4 * multiplier}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("residual", ["lerp", "add"])
def test_every_optimizer_learns_a_batch_by_heart(name: str, residual: str) -> None:
    gpt = model(residual=residual, logit_scale=5.0)
    idx = torch.randint(31, (4, 12), generator=torch.Generator().manual_seed(1))
    optimizers = build_optimizers(gpt, OptimConfig(name=name, lr=0.03))
    losses = []
    for _ in range(25):
        loss = gpt(idx, idx.roll(-1, 1))
        gpt.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "unknown optimizer 'adam', did you mean 'adamw'?"),
        ({"lr": -1.0}, "greater than or equal to 0"),
        ({"betas": [0.9, 1.0]}, "less than 1"),
        ({"betas": [0.9]}, "field required"),
        ({"betas": [0.9, True]}, "valid number"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build(OptimConfig, settings)


def test_betas_may_be_a_list_as_yaml_has_it() -> None:
    assert build(OptimConfig, {"betas": [0.8, 0.9]}).betas == (0.8, 0.9)
