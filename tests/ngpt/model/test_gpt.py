"""The model against its formulas in NumPy, and the properties of a language model on the sphere."""

import gc
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ngpt.config.base import ConfigError, build, content_hash, flatten, identity_settings, override
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT, SphereBlock
from ngpt.model.layers import FLOAT32_TOKENS, KVCache
from ngpt.model.norm import NORM_MODES
from ngpt.model.residual import ALPHA_KINDS, RESIDUAL_RULES, Residual
from ngpt.model.rope import ROPE_SCALINGS
from ngpt.training.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint, verify_checkpoint
from ngpt.training.config import TrainConfig
from tests.helpers import numpy_gpt


def tiny(**changes: object) -> ModelConfig:
    plain = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}
    return build(ModelConfig, plain | changes)


def tokens(batch: int = 3, time: int = 12, vocab: int = 31) -> torch.Tensor:
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(5))


def perturbed(**changes: object) -> GPT:
    """A model with generic weights: matrices off the sphere, scales of many sizes, alphas of both signs."""
    model, generator = GPT(tiny(**changes)), torch.Generator().manual_seed(11)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.mul_(1 + 0.3 * noise)
            else:
                tensor.add_(0.1 * noise)
            if "alpha" in name:
                tensor[::3] *= -1
    return model.eval()


def max_error(model: GPT) -> float:
    """The largest difference between the logits of the model and those of NumPy in float64."""
    idx = tokens(batch=2)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = numpy_gpt.logits(model.cfg, weights, idx.numpy())
    return float(np.abs(model(idx).detach().numpy() - expected).max())


@pytest.mark.parametrize("residual", ["lerp", "slerp", "add_normalize"])
@pytest.mark.parametrize("norm_mode", NORM_MODES)
@pytest.mark.parametrize("alpha_kind", ALPHA_KINDS)
@pytest.mark.parametrize("alpha_sign", ["abs", "free"])
def test_ngpt_matches_its_formulas_in_float64(residual: str, norm_mode: str, alpha_kind: str, alpha_sign: str) -> None:
    """Steps are small: for r near 0.1, alpha / r would overshoot the output, where the formula itself is inaccurate."""
    model = perturbed(residual=residual, norm_mode=norm_mode, alpha_kind=alpha_kind, alpha_sign=alpha_sign, alpha=0.1)
    assert max_error(model) < 1e-5


anything = {
    "n_kv_head": st.sampled_from([None, 1, 2]),
    "mlp": st.sampled_from(["swiglu", "relu2"]),
    "qk_norm": st.booleans(),
    "softmax_scale": st.sampled_from([None, 1.5]),
    "softcap": st.sampled_from([None, 3.0]),
    "tied": st.booleans(),
    "rope_base": st.sampled_from([100.0, 10_000.0]),
    "value_residual": st.sampled_from([0.0, 0.5]),
}
scaling = st.sampled_from(
    [{}]
    + [{"rope_scaling": name, "rope_factor": 4.0, "block_size": 256} for name in ("linear", "ntk", "yarn")]
    + [{"rope_scaling": name, "rope_factor": 4.0, "rope_trained": 96} for name in ("yarn", "llama3")]
)
sphere = {
    "residual": st.sampled_from(["lerp", "add_normalize"]),
    "alpha": st.sampled_from([0.05, 0.1, [0.15, 0.05]]),
    "alpha_kind": st.sampled_from(ALPHA_KINDS),
    "alpha_learned": st.booleans(),
    "norm_mode": st.sampled_from(list(NORM_MODES)),
    "norm_decay": st.sampled_from([0.0, 0.5]),
    "norm_every": st.sampled_from([1, 2, 3]),
    "norm_probability": st.sampled_from([1.0, 0.5]),
    "logit_scale": st.sampled_from([1.0, 3.0]),
    "logit_scale_kind": st.sampled_from(["vector", "scalar"]),
    "s_uv": st.booleans(),
    "scale_trick": st.booleans(),
}
plain = {
    "residual": st.just("add"),
    "embedding_norm": st.booleans(),
    "norm_gain": st.booleans(),
    "norm_eps": st.sampled_from([None, 0.01]),
    "qkv_bias": st.booleans(),
}


@given(st.fixed_dictionaries(anything | sphere), scaling)
def test_every_ngpt_setting_matches_its_formula(settings: dict[str, object], rope: dict[str, object]) -> None:
    model = perturbed(n_head=4, **settings, **rope)
    if settings["norm_mode"] == "baseline":
        assert max_error(model) < 2e-5
    # A small divisor r magnifies float32 rounding in alpha / r, so the comparison uses float64.
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        assert max_error(model.double()) < 2e-5


@given(st.fixed_dictionaries(anything | plain), scaling)
def test_every_gpt_setting_matches_its_formula(settings: dict[str, object], rope: dict[str, object]) -> None:
    assert max_error(perturbed(n_head=4, **settings, **rope)) < 2e-5


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("residual", RESIDUAL_RULES)
def test_shared_keys_and_values_equal_copies_in_every_head(n_kv_head: int, residual: str) -> None:
    shared, full = perturbed(n_head=4, n_kv_head=n_kv_head, residual=residual), GPT(tiny(n_head=4, residual=residual))
    state = shared.state_dict()
    for name, tensor in state.items():
        if name.endswith(("key.weight", "value.weight")):
            copies = tensor.view(n_kv_head, 4, 16).repeat_interleave(4 // n_kv_head, dim=0)
            state[name] = copies.reshape(16, 16)
    full.load_state_dict(state)
    torch.testing.assert_close(shared(tokens()), full(tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("n_head", [2, 4, 8])
def test_initial_attention_scores_of_ngpt_have_unit_spread_with_and_without_qk_norm(qk_norm: bool, n_head: int) -> None:
    """Without QK norm, 1/sqrt(K) would give a spread of 1/D: uniform attention for every input."""
    model = GPT(tiny(n_layer=1, n_embd=256, n_head=n_head, qk_norm=qk_norm, vocab_size=500))
    block, x = model.blocks[0], model.wte.weight.detach().double().numpy()
    assert isinstance(block, SphereBlock)
    attention = block.attention
    q, k = (
        (x @ matrix.weight.detach().double().numpy().T).reshape(500, n_head, -1)
        for matrix in (attention.query, attention.key)
    )
    if qk_norm:
        q, k = numpy_gpt.unit(q), numpy_gpt.unit(k)
    scores = np.einsum("shk,thk->hst", q, k)[:, *np.triu_indices(500, 1)]
    assert float((scores * attention.softmax_scale).std()) == pytest.approx(1, abs=0.05)
    if not qk_norm:
        assert float((scores / (256 / n_head) ** 0.5).std()) == pytest.approx(1 / 256, rel=0.05)


@pytest.mark.parametrize("residual", ["lerp", "slerp", "add_normalize"])
@pytest.mark.parametrize("alpha_kind", ALPHA_KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_ema_with_decay_one_equals_the_baseline_bit_for_bit(residual: str, alpha_kind: str, autocast: bool) -> None:
    baseline = perturbed(residual=residual, alpha_kind=alpha_kind)
    averaged = perturbed(residual=residual, alpha_kind=alpha_kind, norm_mode="ema", norm_decay=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(baseline(tokens()), averaged(tokens()))


@pytest.mark.parametrize("rope_scaling", [name for name in ROPE_SCALINGS if name != "none"])
def test_rope_factor_of_one_equals_no_scaling_bit_for_bit(rope_scaling: str) -> None:
    assert torch.equal(perturbed()(tokens()), perturbed(rope_scaling=rope_scaling, rope_factor=1.0)(tokens()))


def test_norm_probability_one_and_norm_every_one_equal_the_plain_model_bit_for_bit() -> None:
    plain, drawn = perturbed(norm_every=1, norm_probability=1.0).train(), perturbed(norm_probability=1 - 1e-12).train()
    for model in (plain, drawn):
        model.prepare_step(3, 10, seed=4)
    assert torch.equal(plain(tokens()), drawn(tokens()))


def residuals(model: GPT) -> list[Residual]:
    return [module for module in model.modules() if isinstance(module, Residual)]


@pytest.mark.parametrize(
    ("norm_every", "due"), [(1, "111111"), (2, "010101"), (4, "000101"), (5, "000011"), (9, "000001")]
)
def test_ghost_norms_keep_every_kth_sublayer_and_the_last(norm_every: int, due: str) -> None:
    model = perturbed(n_layer=3, norm_every=norm_every)
    lengths: list[bool] = []
    for residual in residuals(model):
        residual.register_forward_hook(
            lambda module, given, x: lengths.append(bool((x.norm(dim=-1) - 1).abs().max() < 1e-5))
        )
    model(tokens())
    assert lengths == [digit == "1" for digit in due]


def test_draws_depend_only_on_the_seed_and_the_step() -> None:
    model, other = GPT(tiny(n_layer=8, norm_probability=0.6)), GPT(tiny(n_layer=8, norm_probability=0.6), seed=9)

    def draws(model: GPT, step: int, *, seed: int) -> tuple[bool, ...]:
        model.prepare_step(step, 1000, seed=seed)
        return tuple(bool(residual.renormalized) for residual in residuals(model))

    first = [draws(model, step, seed=1) for step in range(200)]
    assert [draws(other, step, seed=1) for step in reversed(range(200))] == first[::-1]
    assert len(set(first)) > 190
    assert [draws(model, step, seed=2) for step in range(200)] != first
    assert np.mean(first) == pytest.approx(0.6, abs=0.03)  # 3200 draws: a standard error of 0.009
    assert np.allclose(np.mean(first, axis=0), 0.6, atol=0.15)


def test_micro_batches_of_a_step_share_their_norm_draws_and_evaluation_uses_all_norms() -> None:
    model, idx = perturbed(norm_probability=0.5).train(), tokens(batch=4)
    whole = []
    for step in range(6):
        model.prepare_step(step, 6, seed=1)
        parts = torch.cat([model(part) for part in idx.split(1)])
        whole.append(model(idx))
        torch.testing.assert_close(parts, whole[-1], atol=1e-5, rtol=0)
    assert max((a - whole[0]).abs().max() for a in whole) > 1e-3
    assert torch.equal(model.eval()(idx), perturbed()(idx))


@pytest.mark.parametrize("alpha_kind", ALPHA_KINDS)
@pytest.mark.parametrize("alpha_learned", [True, False])
def test_alpha_schedule_is_linear_from_alpha_to_alpha_final(alpha_kind: str, alpha_learned: bool) -> None:
    model = GPT(tiny(alpha=0.15, alpha_final=0.20, alpha_kind=alpha_kind, alpha_learned=alpha_learned))
    for step in (5, 0, 10, 2):  # in any order, since steps do not accumulate
        model.prepare_step(step, 11, seed=0)
        for residual in residuals(model):
            assert residual.alpha().mean().item() == pytest.approx(0.15 + 0.05 * step / 10)
    model.prepare_step(0, 1, seed=0)
    assert residuals(model)[0].alpha().mean().item() == pytest.approx(0.15)


def test_preparing_a_step_changes_nothing_without_a_schedule() -> None:
    model = perturbed(norm_mode="dotprod", norm_every=2).train()
    before = model(tokens())
    model.prepare_step(7, 10, seed=3)
    assert torch.equal(model(tokens()), before)


def test_alphas_are_spread_over_the_depth() -> None:
    model = GPT(tiny(n_layer=3, alpha=[0.3, 0.1], alpha_kind="scalar"))
    assert [residual.alpha().item() for residual in residuals(model)] == pytest.approx([0.3, 0.3, 0.2, 0.2, 0.1, 0.1])


def test_without_the_scale_trick_scales_are_stored_at_their_effective_value_and_move_by_lr() -> None:
    model = GPT(tiny(alpha=0.3, logit_scale=10.0, scale_trick=False))
    scales = {"s_z": 10.0, "blocks.0.attention.s_qk": 1.0, "blocks.0.mlp.s_uv": 1.0, "blocks.1.mlp_residual.alpha": 0.3}
    for name, value in scales.items():
        stored = model.get_parameter(f"{name}.stored").detach()
        torch.testing.assert_close(stored, torch.full_like(stored, value))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(tokens(), tokens().roll(-1, dims=1)).backward()
    optimizer.step()
    for name, value in scales.items():
        moved = (model.get_submodule(name)() - value).abs().detach()
        assert float(moved.median()) == pytest.approx(0.01, rel=0.01), name


def test_fixed_alpha_of_a_model_is_saved_but_not_trained() -> None:
    model = GPT(tiny(alpha_learned=False))
    name = "blocks.0.attention_residual.alpha.stored"
    assert name in model.state_dict() and name not in dict(model.named_parameters())


def test_tied_head_is_the_embedding() -> None:
    model = GPT(tiny(tied=True))
    assert model.head_weight is model.wte.weight
    assert not any("lm_head" in name for name in model.state_dict())


@pytest.mark.parametrize("changes", [{}, {"n_head": 4, "n_kv_head": 2, "alpha_kind": "head"}, {"residual": "add"}])
def test_cached_generation_matches_one_full_pass(changes: dict[str, object]) -> None:
    mode = {} if "residual" in changes else {"norm_mode": "dotprod"}
    model, idx = perturbed(**changes, **mode), tokens(batch=2)
    cache = KVCache(model.cfg, 2, device=torch.device("cpu"))
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split([5, 1, 4, 2], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), atol=1e-5, rtol=0)


def test_cached_keys_and_values_have_the_dtype_of_the_step() -> None:
    model, idx = perturbed(), tokens(batch=2)
    cache = KVCache(model.cfg, 2, device=torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for part in idx.split([5, 1, 4, 2], dim=1):
            model(part, cache=cache)
    cache.length -= 1
    new = torch.zeros(2, model.cfg.kv_heads, 1, model.cfg.head_dim, dtype=torch.bfloat16)
    keys, values = cache.extend(0, new.float(), new)  # normalized keys are float32 also under autocast
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)


EVERYTHING = {
    "residual": "slerp",
    "norm_mode": "dotprod",
    "norm_every": 3,
    "norm_probability": 0.5,
    "alpha_kind": "head",
    "alpha_final": 0.1,
    "n_kv_head": 1,
    "value_residual": 0.5,
}


def check_compiled(backend: str, changes: dict[str, object]) -> None:
    model, idx = perturbed(**changes).train(), tokens()
    features = torch.compile(model.features, backend=backend, fullgraph=True, dynamic=False)
    for step in range(3):  # the settings of a step reach the compiled code without a recompilation
        model.prepare_step(step, 3, seed=1)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            compiled = features(idx)
        torch.testing.assert_close(compiled, model.features(idx), atol=1e-5, rtol=0)
        compiled.sum().backward()
    if model.normalizer is not None:
        with torch.no_grad():
            model.wte.weight[idx[0, 3]] = torch.nan
        features(idx)
        counted = int(model.normalizer.replaced)
        model.features(idx)
        assert int(model.normalizer.replaced) == 2 * counted > 0


@pytest.mark.slow
def test_traced_model_gives_the_same_numbers_in_every_step() -> None:
    check_compiled("aot_eager", EVERYTHING)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # from torch, when it loads inductor
@pytest.mark.parametrize("changes", [{}, {"norm_mode": "dotprod"}, {"residual": "add"}, EVERYTHING])
def test_compiled_model_gives_the_same_numbers_in_every_step(changes: dict[str, object]) -> None:
    check_compiled("inductor", changes)


@pytest.mark.parametrize("compiled", [False, True])
def test_model_memory_is_freed_without_garbage_collection(compiled: bool) -> None:
    model = GPT(tiny())
    if compiled:
        model.compile_parts()
    seen = weakref.ref(model.wte.weight)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("residual", RESIDUAL_RULES)
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_later_tokens_do_not_change_earlier_logits(residual: str, mlp: str) -> None:
    model, idx = GPT(tiny(residual=residual, mlp=mlp)), tokens()
    if residual == "add":  # output matrices start at zero, which would hide every difference
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 31
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-4


@pytest.mark.parametrize("residual", [rule for rule in RESIDUAL_RULES if rule != "add"])
@pytest.mark.parametrize("alpha_kind", ALPHA_KINDS)
def test_residual_stream_stays_on_the_unit_sphere(residual: str, alpha_kind: str) -> None:
    model = GPT(tiny(residual=residual, alpha_kind=alpha_kind, alpha=0.3))
    streams = list(model.stream(tokens()))
    assert len(streams) == 1 + 2
    for x in streams:
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(3, 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("matrix", ["attention.out", "mlp.down"])
def test_lerp_ignores_the_length_of_a_block_output(matrix: str) -> None:
    model, idx = GPT(tiny()), tokens()
    before = model(idx)
    with torch.no_grad():
        model.get_parameter(f"blocks.0.{matrix}.weight").mul_(3.0)
    torch.testing.assert_close(model(idx), before, atol=1e-5, rtol=0)


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model, idx, targets = GPT(tiny()), tokens(), tokens().roll(-1, dims=1)
    expected = F.cross_entropy(model(idx).detach().double().flatten(0, 1), targets.flatten())
    assert model(idx, targets).item() == pytest.approx(float(expected), abs=1e-5)


def test_initial_loss_is_log_vocabulary_for_gpt_and_close_to_it_for_ngpt() -> None:
    gpt, ngpt = GPT(tiny(residual="add")), GPT(tiny())
    idx, targets = tokens(), tokens().roll(-1, dims=1)
    assert gpt(idx, targets).item() == pytest.approx(
        np.log(31), abs=1e-6
    )  # the head is zero, so the distribution is uniform
    assert ngpt(idx, targets).item() == pytest.approx(np.log(31), abs=0.2)  # logits are small, so it is nearly uniform


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


def test_initial_weights_depend_on_the_seed() -> None:
    one, same, other = GPT(tiny(), seed=1), GPT(tiny(), seed=1), GPT(tiny(), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.wte.weight, other.wte.weight)


@pytest.mark.parametrize(
    "time", [12, FLOAT32_TOKENS, FLOAT32_TOKENS + 1]
)  # attention over short sequences is computed in float32
def test_bfloat16_forward_pass_stays_close_to_float32(time: int) -> None:
    model, idx = GPT(tiny(logit_scale=5.0, block_size=time)), tokens(time=time)
    targets = idx.roll(-1, dims=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(idx, targets).item()
    assert low == pytest.approx(model(idx, targets).item(), abs=0.02)


def test_more_tokens_than_the_context_raise_an_error() -> None:
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
        ({"alpha": [0.1, -0.1]}, "greater than 0"),
        ({"alpha": []}, "at least 1 item"),
        ({"alpha": [0.1, 0.2], "alpha_final": 0.3}, "alpha_final needs a single alpha to start from"),
        ({"alpha_kind": "heads"}, "unknown alpha kind 'heads', did you mean 'head'?"),
        ({"alpha_sign": "signed"}, "unknown alpha sign 'signed'.* abs, free"),
        ({"logit_scale_kind": "head"}, "unknown logit scale kind 'head'"),
        ({"norm_mode": "dotpord"}, "unknown norm mode 'dotpord', did you mean 'dotprod'?"),
        ({"norm_decay": 1.5}, "less than or equal to 1"),
        ({"norm_every": 0}, "greater than or equal to 1"),
        ({"norm_probability": 0.0}, "greater than 0"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"rope_factor": 2.0}, "rope_factor 2.0 needs a rope_scaling: linear, ntk, yarn, llama3"),
        (
            {"rope_trained": 64, "rope_scaling": "ntk"},
            "rope_trained needs a rope_scaling that .*: yarn, llama3",
        ),
        ({"qkv_bias": True}, "qkv_bias needs `residual: add`; nGPT has no biases"),
        ({"norm_eps": 1e-5}, "norm_eps needs `residual: add`; nGPT has no RMSNorm"),
        ({"rope_factor": 0.5, "rope_scaling": "yarn"}, "greater than or equal to 1"),
        ({"rope_scaling": "yarm"}, "unknown rope scaling 'yarm', did you mean 'yarn'?"),
        ({"residual": "add", "norm_mode": "ema"}, "norm_mode needs a residual rule on the sphere, not `add`"),
        ({"residual": "add", "norm_every": 2}, "norm_every needs a residual rule on the sphere"),
        ({"residual": "add", "norm_probability": 0.5}, "norm_probability needs a residual rule on the sphere"),
        ({"residual": "add", "alpha_final": 0.5}, "alpha_final needs a residual rule on the sphere"),
        ({"mlp_ratio": 0.001}, "mlp_ratio: mlp_ratio 0.001 of n_embd \\d+ gives an MLP without hidden units"),
    ],
)
def test_invalid_model_config_is_refused_with_the_reason(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_old_name_of_add_normalize_is_read_and_written() -> None:
    """Campaigns, records and checkpoints of version 1 use `seed`, and trial ids hash that name."""
    old, new = (
        build(TrainConfig, {"model.residual": name, "model.vocab_size": 64}) for name in ("seed", "add_normalize")
    )
    assert old == new and new.model.residual == "add_normalize"
    assert flatten(new)["model.residual"] == "seed"
    assert build(TrainConfig, flatten(new)) == override(new, {"steps": 200}) == new
    assert content_hash(new) == "a78950cbae"
    with pytest.raises(ConfigError, match="Allowed: add, add_normalize, lerp, slerp"):
        build(ModelConfig, {"residual": "add_normalise"})


def test_checkpoint_with_the_old_name_of_add_normalize_resumes(tmp_path: Path) -> None:
    model = GPT(tiny(residual="add_normalize"), seed=1)
    old = {"model.residual": "seed"}
    save_checkpoint(tmp_path, weights=model.state_dict(), state={}, step=1, val_loss=None, identity=old, keep_last=1)
    found = verify_checkpoint(checkpoint_folders(tmp_path)[0])
    resumed = identity_settings(build(TrainConfig, {"model.residual": "add_normalize"}))
    load_checkpoint(found, GPT(tiny(residual="seed")), identity={"model.residual": resumed["model.residual"]})
