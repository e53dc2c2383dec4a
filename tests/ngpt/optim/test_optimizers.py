"""Which optimizer updates which parameter, at which rate and weight decay."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import ConfigError, build
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.residual import RESIDUAL_RULES
from ngpt.optim.muon import Muon
from ngpt.optim.optimizers import (
    KINDS,
    ON_SPHERE,
    OPTIMIZERS,
    WIDTH_RULES,
    OptimConfig,
    build_optimizers,
    set_learning_rates,
)
from ngpt.optim.riemannian import GeodesicMuon, RiemannianAdamW

FITTING = [
    (name, residual) for name in OPTIMIZERS for residual in RESIDUAL_RULES if name not in ON_SPHERE or residual != "add"
]


def model(*, seed: int = 0, **changes: object) -> GPT:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    return GPT(build(ModelConfig, plain | changes), seed=seed)


def with_gradients(gpt: GPT, seed: int = 0) -> GPT:
    generator = torch.Generator().manual_seed(seed)
    for parameter in gpt.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return gpt


def snapshot(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}


def moved(gpt: GPT, **settings: Any) -> set[str]:
    """The parameters that a step of this optimizer changes."""
    before = snapshot(with_gradients(gpt))
    for optimizer in build_optimizers(gpt, build(OptimConfig, settings)):
        optimizer.step()
    return {name for name, parameter in snapshot(gpt).items() if not torch.equal(parameter, before[name])}


def kind_by_name(name: str) -> str:
    """The kind of a parameter by its name alone, whereas the code under test uses shapes and modules."""
    known = {"wte.weight": "embedding", "lm_head.weight": "head"}
    linear = ("query.weight", "key.weight", "value.weight", "out.weight", "up.weight", "down.weight")
    return known.get(name) or ("matrices" if name.endswith(linear) else "scales")


@pytest.mark.parametrize(("name", "residual"), FITTING)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_every_parameter_is_in_exactly_one_group_of_its_kind_and_is_updated(
    name: str, residual: str, tied: bool, kind: str
) -> None:
    gpt = model(residual=residual, tied=tied, norm_gain=True, alpha_kind=kind, logit_scale_kind=kind)
    names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    held: dict[str, str] = {}
    for optimizer in build_optimizers(gpt, OptimConfig(name=name)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in held
                held[names[id(parameter)]] = group["kind"]
    assert held == {name: kind_by_name(name) for name in names.values()}
    assert set(held.values()) == set(KINDS) - ({"head"} if tied else set())
    assert moved(gpt, name=name) == set(held)


def test_baseline_without_scales_can_be_trained() -> None:
    for name in ("adamw", "muon"):
        assert "scales" not in rates(model(residual="add"), name=name)


@pytest.mark.parametrize("name", ON_SPHERE)
def test_sphere_optimizer_refuses_a_plain_model_and_suggests_alternatives(name: str) -> None:
    expected = (
        f"optimizer {name} rotates unit vectors, but a model with residual rule add has no weights on the sphere: "
        rf"choose another residual rule \({', '.join(sorted({*RESIDUAL_RULES} - {'add'}))}\) "
        rf"or another optimizer \({', '.join(sorted({*OPTIMIZERS} - {'geodesic_muon', 'riemannian_adamw'}))}\)"
    )
    with pytest.raises(ConfigError, match=expected):
        build_optimizers(model(residual="add"), OptimConfig(name=name))


def rates(gpt: GPT, **settings: Any) -> dict[str, float]:
    """The base rate of each kind."""
    groups = [
        group for optimizer in build_optimizers(gpt, build(OptimConfig, settings)) for group in optimizer.param_groups
    ]
    found = {group["kind"]: group["base_lr"] for group in groups}
    assert all(group["lr"] == group["base_lr"] == found[group["kind"]] for group in groups)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", {"matrices": 1.0, "embedding": 1.0, "head": 1.0, "scales": 2.0}),
        ("riemannian_adamw", {"matrices": 1.0, "embedding": 1.0, "head": 1.0, "scales": 2.0}),
        ("muon", {"matrices": 1.0, "embedding": 2.0, "head": 2.0, "scales": 2.0}),
        ("geodesic_muon", {"matrices": 1.0, "embedding": 2.0, "head": 2.0, "scales": 2.0}),
    ],
)
def test_each_kind_uses_lr_or_lr_other_unless_its_own_rate_is_set(name: str, expected: dict[str, float]) -> None:
    assert rates(model(), name=name, lr=1.0, lr_other=2.0) == expected
    assert rates(model(), name=name, lr=1.0) == dict.fromkeys(KINDS, 1.0)
    for kind in ("embedding", "head", "scales"):
        for rate in (0.0, 3.0):
            given = rates(model(), name=name, lr=1.0, lr_other=2.0, **{f"lr_{kind}": rate})
            assert given == expected | {kind: rate}


def test_tied_head_uses_the_embedding_rate() -> None:
    tied = rates(model(tied=True), lr=1.0, lr_embedding=2.0, lr_head=3.0)
    assert tied == {"matrices": 1.0, "embedding": 2.0, "scales": 1.0}


# Worked out by hand for four times the base width: 4^(-1/2) = 0.5, 4^(-3/4) = 0.35355339, 4^(-1) = 0.25.
AT_FOUR_TIMES_THE_WIDTH = {
    "none": {"matrices": 1.0, "embedding": 1.0, "head": 1.0, "scales": 1.0},
    "nanochat": {"matrices": 0.5, "embedding": 0.5, "head": 0.5, "scales": 1.0},
    "mup": {"matrices": 0.25, "embedding": 1.0, "head": 0.25, "scales": 1.0},
    "nugpt": {"matrices": 0.35355339, "embedding": 0.5, "head": 0.35355339, "scales": 1.0},
}


@pytest.mark.parametrize("rule", WIDTH_RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_width_rule_scales_adam_rates_but_not_muon_rates(rule: str, name: str) -> None:
    given = {"name": name, "lr": 0.3, "lr_other": 0.3, "lr_head": 0.7, "width_rule": rule}
    factors = dict(AT_FOUR_TIMES_THE_WIDTH[rule])
    if "muon" in name:
        factors["matrices"] = 1.0
    plain = {"matrices": 0.3, "embedding": 0.3, "head": 0.7, "scales": 0.3}
    expected = {kind: plain[kind] * factor for kind, factor in factors.items()}
    assert rates(model(), base_width=4, **given) == pytest.approx(expected, rel=1e-7)
    assert rates(model(), base_width=16, **given) == pytest.approx(plain, rel=1e-12)


def test_nanochat_rule_matches_the_code_of_nanochat() -> None:
    wide = model(n_embd=1536, n_layer=1, residual="add")
    actual = rates(wide, name="muon", lr=0.02, lr_embedding=0.2, lr_head=0.004, width_rule="nanochat", base_width=768)
    scale = (1536 / 768) ** -0.5
    assert actual == pytest.approx({"matrices": 0.02, "embedding": 0.2 * scale, "head": 0.004 * scale})


def test_width_rule_without_a_base_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="width_rule: width_rule mup needs base_width"):
        build(OptimConfig, {"width_rule": "mup"})
    with pytest.raises(ConfigError, match="unknown width rule 'mupp', did you mean 'mup'"):
        build(OptimConfig, {"width_rule": "mupp", "base_width": 64})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_steps_match_torch_adamw(weight_decay: float) -> None:
    actual, reference_model = model(), model()
    (optimizer,) = build_optimizers(
        actual, OptimConfig(lr=0.01, lr_other=0.03, weight_decay=weight_decay, betas=(0.8, 0.9))
    )
    reference = [
        torch.optim.AdamW(
            [parameter],
            lr=0.01 if parameter.ndim == 2 else 0.03,
            betas=(0.8, 0.9),
            weight_decay=weight_decay if parameter.ndim == 2 else 0.0,
        )
        for parameter in reference_model.parameters()
    ]
    for step in range(5):
        with_gradients(actual, step)
        with_gradients(reference_model, step)
        optimizer.step()
        for single in reference:
            single.step()
    expected = snapshot(reference_model)
    for name, parameter in actual.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-6, rtol=1e-5, msg=name)


def scales(gpt: GPT) -> set[str]:
    return {name for name, parameter in gpt.named_parameters() if parameter.ndim == 1}


def test_adamw_uses_lr_for_matrices_and_lr_other_for_scales() -> None:
    every = {name for name, _ in model().named_parameters()}
    assert moved(model(), lr=0.1, lr_other=0.0) == every - scales(model())
    assert moved(model(), lr=0.0, lr_other=0.1) == scales(model())
    assert moved(model(), lr=0.1) == every


def test_muon_uses_lr_for_block_matrices_and_lr_other_for_the_rest() -> None:
    every = {name for name, _ in model().named_parameters()}
    inside = {name for name in every if name.startswith("blocks.")} - scales(model())
    assert len(inside) == 2 * 6
    assert moved(model(), name="muon", lr=0.1, lr_other=0.0) == inside
    assert moved(model(), name="muon", lr=0.0, lr_other=0.1) == every - inside


def test_muon_settings_are_passed_on() -> None:
    cfg = OptimConfig(name="muon", lr=0.3, momentum=0.7, nesterov=False, ns_steps=3, weight_decay=0.2)
    optimizer = build_optimizers(model(), cfg)[0]
    assert isinstance(optimizer, Muon)
    (group,) = optimizer.param_groups
    expected = {"lr": 0.3, "momentum": 0.7, "nesterov": False, "ns_steps": 3, "weight_decay": 0.2}
    assert {name: group[name] for name in expected} == expected


def test_settings_of_the_sphere_optimizers_are_passed_on() -> None:
    cfg = OptimConfig(
        name="geodesic_muon", lr=0.3, momentum=0.7, nesterov=False, ns_steps=3, betas=(0.5, 0.6), eps=1e-4, lr_other=0.2
    )
    gpt = model()
    dims = {id(weight): dim for weight, dim in gpt.sphere_weights()}
    matrices, embeddings, scales = build_optimizers(gpt, cfg)
    assert isinstance(matrices, GeodesicMuon) and isinstance(embeddings, RiemannianAdamW)
    assert isinstance(scales, torch.optim.AdamW)
    expected = {
        matrices: {"lr": 0.3, "momentum": 0.7, "nesterov": False, "ns_steps": 3},
        embeddings: {"lr": 0.2, "betas": (0.5, 0.6), "eps": 1e-4},
        scales: {"lr": 0.2, "betas": (0.5, 0.6), "eps": 1e-4},
    }
    for optimizer, settings in expected.items():
        for group in optimizer.param_groups:
            assert {name: group[name] for name in settings} == settings
            assert optimizer is scales or all(dims[id(p)] == group["dim"] for p in group["params"])
    assert {group["dim"] for group in matrices.param_groups} == {0, 1}


@pytest.mark.parametrize("name", ON_SPHERE)
def test_scales_beside_sphere_weights_match_torch_adamw(name: str) -> None:
    actual, reference_model = model(), model()
    optimizers = build_optimizers(actual, OptimConfig(name=name, lr=0.1, lr_scales=0.03, weight_decay=0.2))
    reference = torch.optim.AdamW(
        [p for p in reference_model.parameters() if p.ndim == 1], lr=0.03, betas=(0.9, 0.95), weight_decay=0.0
    )
    for step in range(5):
        with_gradients(actual, step)
        with_gradients(reference_model, step)
        for optimizer in [*optimizers, reference]:
            optimizer.step()
    for scale in scales(actual):
        mine, other = actual.get_parameter(scale), reference_model.get_parameter(scale)
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5, msg=scale)


@pytest.mark.parametrize("name", ON_SPHERE)
def test_sphere_optimizers_need_no_projection(name: str) -> None:
    gpt = model()
    optimizers = build_optimizers(gpt, OptimConfig(name=name, lr=0.7, weight_decay=0.5))
    for step in range(50):
        with_gradients(gpt, step)
        for optimizer in optimizers:
            optimizer.step()
    for weight, dim in gpt.sphere_weights():
        assert float((torch.linalg.vector_norm(weight.detach(), dim=dim) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_restored_midway_end_like_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    """The state goes through a file and torch's safe loader. The rates follow a schedule."""

    def steps(gpt: GPT, optimizers: list[torch.optim.Optimizer], which: range) -> None:
        for step in which:
            with_gradients(gpt, step)
            set_learning_rates(optimizers, 1 - step / 8)
            for optimizer in optimizers:
                optimizer.step()

    cfg = OptimConfig(name=name, lr=0.05, lr_other=0.01, weight_decay=0.1)
    straight = model()
    optimizers = build_optimizers(straight, cfg)
    steps(straight, optimizers, range(4))
    torch.save([optimizer.state_dict() for optimizer in optimizers], tmp_path / "state.pt")
    weights = snapshot(straight)
    steps(straight, optimizers, range(4, 8))

    resumed = model(seed=1)
    resumed.load_state_dict(weights)
    restored = build_optimizers(resumed, cfg)
    for optimizer, state in zip(restored, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        optimizer.load_state_dict(state)
    steps(resumed, restored, range(4, 8))
    for parameter_name, parameter in snapshot(straight).items():
        assert torch.equal(parameter, resumed.get_parameter(parameter_name)), parameter_name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_only_matrices(name: str) -> None:
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
def test_learning_rates_are_multiples_of_the_base_rates(name: str) -> None:
    optimizers = build_optimizers(model(), OptimConfig(name=name, lr=0.2, lr_other=0.4))
    for multiplier in (0.5, 0.25, 1.0):
        set_learning_rates(optimizers, multiplier)
        rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        assert rates == {0.2 * multiplier, 0.4 * multiplier}


@pytest.mark.parametrize("name", ON_SPHERE)
def test_weight_decay_changes_nothing_on_the_sphere(name: str) -> None:
    after = []
    for weight_decay in (0.0, 0.5):
        gpt = with_gradients(model())
        for optimizer in build_optimizers(gpt, OptimConfig(name=name, lr=0.1, weight_decay=weight_decay)):
            optimizer.step()
        after.append(snapshot(gpt))
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize(("name", "residual"), [(name, rule) for name, rule in FITTING if rule in ("lerp", "add")])
def test_every_optimizer_overfits_a_single_batch(name: str, residual: str) -> None:
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
def test_invalid_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build(OptimConfig, settings)


def test_betas_can_be_a_list_as_in_yaml() -> None:
    assert build(OptimConfig, {"betas": [0.8, 0.9]}).betas == (0.8, 0.9)


def test_a_clip_of_zero_says_how_to_switch_clipping_off() -> None:
    with pytest.raises(
        ConfigError, match=r"^grad_clip: must be greater than 0, got 0; write null to switch clipping off$"
    ):
        build(OptimConfig, {"grad_clip": 0.0})
    assert build(OptimConfig, {"grad_clip": None}).grad_clip is None
