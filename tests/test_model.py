"""The model against numbers of the official nGPT, and the properties that make it a language model on the sphere."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ngpt.config import ConfigError, build
from ngpt.model import GPT, ModelConfig
from ngpt.optim import OptimConfig, build_optimizers
from ngpt.projection import project_weights
from ngpt.residual import RESIDUAL_RULES

GOLDEN = Path(__file__).parent / "golden" / "nvidia_ngpt_true_rotary.npz"
OURS = {
    "transformer.wte.weight": "wte.weight",
    "lm_head.weight": "lm_head.weight",
    "sz": "s_z.stored",
    "query.weight": "attention.query.weight",
    "key.weight": "attention.key.weight",
    "value.weight": "attention.value.weight",
    "att_c_proj.weight": "attention.out.weight",
    "c_fc.weight": "mlp.up.weight",
    "mlp_c_proj.weight": "mlp.down.weight",
    "attn_alpha": "attention_residual.alpha.stored",
    "mlp_alpha": "mlp_residual.alpha.stored",
    "sqk": "attention.s_qk.stored",
    "suv": "mlp.s_uv.stored",
}


def our_name(official: str) -> str:
    if official in OURS:
        return OURS[official]
    _, _, layer, rest = official.split(".", 3)
    return f"blocks.{layer}.{OURS[rest]}"


def tensors(golden: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {our_name(k.removeprefix(prefix)): torch.tensor(v) for k, v in golden.items() if k.startswith(prefix)}


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture
def official(golden: dict[str, np.ndarray]) -> GPT:
    n_layer, n_head, n_embd, vocab_size, _, block_size = map(int, golden["meta_config"])
    cfg = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size, block_size=block_size)
    model = GPT(cfg)
    model.load_state_dict(tensors(golden, "w/"))
    return model


def tiny(**changes: object) -> ModelConfig:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    return build(ModelConfig, plain | changes)


def tokens(batch: int = 3, time: int = 12, vocab: int = 31) -> torch.Tensor:
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(5))


def test_logits_and_loss_equal_those_of_the_official_ngpt(official: GPT, golden: dict[str, np.ndarray]) -> None:
    idx, targets = torch.tensor(golden["idx"]), torch.tensor(golden["targets"])
    torch.testing.assert_close(official(idx), torch.tensor(golden["logits"]), atol=1e-5, rtol=0)
    assert official(idx, targets).item() == pytest.approx(float(golden["loss"]), abs=1e-5)


def test_gradients_equal_those_of_the_official_ngpt(official: GPT, golden: dict[str, np.ndarray]) -> None:
    official(torch.tensor(golden["idx"]), torch.tensor(golden["targets"])).backward()
    expected = tensors(golden, "grad/")
    assert set(expected) == {name for name, _ in official.named_parameters()}
    for name, parameter in official.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name


def test_an_adamw_step_and_projection_equal_those_of_the_official_ngpt(
    official: GPT, golden: dict[str, np.ndarray]
) -> None:
    (optimizer,) = build_optimizers(official, OptimConfig(lr=1e-3, grad_clip=1.0))
    official(torch.tensor(golden["idx"]), torch.tensor(golden["targets"])).backward()
    torch.nn.utils.clip_grad_norm_(official.parameters(), 1.0)
    optimizer.step()
    project_weights(official)
    after = tensors(golden, "after/")
    for name, parameter in official.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), after[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("residual", RESIDUAL_RULES)
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_later_tokens_do_not_change_earlier_logits(residual: str, mlp: str) -> None:
    model, idx = GPT(tiny(residual=residual, mlp=mlp)), tokens()
    if residual == "add":  # its output matrices start at zero, which would hide everything
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 31
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-4


@pytest.mark.parametrize("residual", [rule for rule in RESIDUAL_RULES if rule != "add"])
@pytest.mark.parametrize("alpha_kind", ["vector", "scalar"])
def test_the_residual_stream_stays_on_the_unit_sphere(residual: str, alpha_kind: str) -> None:
    model = GPT(tiny(residual=residual, alpha_kind=alpha_kind, alpha=0.3))
    streams = list(model.stream(tokens()))
    assert len(streams) == 1 + 2
    for x in streams:
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(3, 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("matrix", ["attention.out", "mlp.down"])
def test_the_length_of_what_a_block_writes_does_not_matter_under_lerp(matrix: str) -> None:
    model, idx = GPT(tiny()), tokens()
    before = model(idx)
    with torch.no_grad():
        model.get_parameter(f"blocks.0.{matrix}.weight").mul_(3.0)
    torch.testing.assert_close(model(idx), before, atol=1e-5, rtol=0)


def test_the_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model, idx, targets = GPT(tiny()), tokens(), tokens().roll(-1, dims=1)
    expected = F.cross_entropy(model(idx).detach().double().flatten(0, 1), targets.flatten())
    assert model(idx, targets).item() == pytest.approx(float(expected), abs=1e-5)


def test_a_fresh_gpt_knows_nothing_and_a_fresh_ngpt_next_to_nothing() -> None:
    gpt, ngpt = GPT(tiny(residual="add")), GPT(tiny())
    idx, targets = tokens(), tokens().roll(-1, dims=1)
    assert gpt(idx, targets).item() == pytest.approx(np.log(31), abs=1e-6)  # zero head: uniform
    assert ngpt(idx, targets).item() == pytest.approx(np.log(31), abs=0.2)  # unit logits: nearly


def test_softcap_bounds_the_logits() -> None:
    model = GPT(tiny(softcap=2.0, logit_scale=50.0))
    assert model(tokens()).abs().max() <= 2.0


def test_alpha_and_logit_scale_start_at_their_settings() -> None:
    model = GPT(tiny(alpha=0.28, logit_scale=10.0))
    assert model.s_z is not None
    torch.testing.assert_close(model.s_z(), torch.full((31,), 10.0))
    alpha = model.get_submodule("blocks.1.mlp_residual.alpha")
    torch.testing.assert_close(alpha(), torch.full((16,), 0.28))
    torch.testing.assert_close(alpha.get_parameter("stored"), torch.full((16,), 0.25))  # 1 / sqrt(16)


def test_the_seed_decides_the_initial_weights() -> None:
    one, same, other = GPT(tiny(), seed=1), GPT(tiny(), seed=1), GPT(tiny(), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.wte.weight, other.wte.weight)


def test_a_forward_pass_in_bfloat16_stays_close_to_float32() -> None:
    model, idx, targets = GPT(tiny(logit_scale=5.0)), tokens(), tokens().roll(-1, dims=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(idx, targets).item()
    assert low == pytest.approx(model(idx, targets).item(), abs=0.02)


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="13 tokens do not fit"):
        GPT(tiny())(tokens(time=13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_embd 16 cannot be divided into n_head 3 heads"),
        ({"n_head": 16}, "heads of odd width 1"),
        ({"residual": "lepr"}, "unknown residual rule 'lepr', did you mean 'lerp'?"),
        ({"mlp": "gelu"}, "unknown MLP kind 'gelu'"),
        ({"alpha": -0.1}, "greater than 0"),
    ],
)
def test_an_impossible_model_is_refused_with_the_reason(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)
