"""Exported models are those of transformers with our logits and our greedy tokens, or are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ngpt.config.base import ConfigError, build
from ngpt.export.families import FAMILIES, family_of, to_transformers
from ngpt.export.folder import without_progress_bars
from ngpt.generate import generate_tokens
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.residual import RESIDUAL_RULES
from tests.helpers.random_models import CONTEXT, SMALL, VOCABULARY, prompts, random_model, small
from tests.test_presets import SIZES, preset
from tune.campaign import load_campaign
from tune.planning.plan import preview

EXPERIMENTS = sorted((Path(__file__).parents[3] / "experiments").glob("*.yaml"))
NANOCHAT = {"residual": "add", "mlp": "relu2"}
LLAMA = {"residual": "add", "qk_norm": False, "embedding_norm": False, "norm_gain": True}
REPORTS = {"residual": "add_normalize", "qk_norm": False, "s_uv": False, "scale_trick": False}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nanochat": ("NanoChat", NANOCHAT | {"softcap": 5.0, "n_kv_head": 1}),
    "nanochat tied": ("NanoChat", NANOCHAT | {"tied": True, "norm_eps": 1e-2}),
    "llama": ("Llama", LLAMA),
    "llama 3.1": ("Llama", LLAMA | {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_trained": 8, "tied": True}),
    "linear": ("Llama", LLAMA | {"rope_scaling": "linear", "rope_factor": 4.0, "rope_base": 100.0}),
    "qwen2": ("Qwen2", LLAMA | {"qkv_bias": True, "n_kv_head": 1}),
    "another GPT": ("nGPT", {"residual": "add", "value_residual": 0.5, "rope": "nvidia", "norm_gain": True}),
    "paper": ("nGPT", {"alpha": [0.05, 0.3], "tied": True}),
    "reports": ("nGPT", REPORTS | {"alpha": 0.15, "logit_scale": 10.0, "logit_scale_kind": "scalar", "mlp": "relu2"}),
    "slerp": ("nGPT", {"residual": "slerp", "alpha_kind": "head", "n_kv_head": 1, "alpha": 0.3}),
    "dotprod": ("nGPT", {"norm_mode": "dotprod", "alpha": 0.3, "alpha_kind": "scalar", "alpha_sign": "free"}),
    "ema": ("nGPT", {"residual": "add_normalize", "norm_mode": "ema", "norm_every": 4, "alpha_learned": False}),
    "schedule": ("nGPT", {"alpha": 0.1, "alpha_final": 0.4, "norm_probability": 0.5, "value_residual": 0.3}),
    "yarn": ("nGPT", {"rope_scaling": "yarn", "rope_factor": 2.0, "softcap": 3.0}),
    "ntk": ("nGPT", {"rope_scaling": "ntk", "rope_factor": 2.0, "softmax_scale": 3.0}),
}
STEP, STEPS = 8, 11
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def exported(model: GPT) -> Any:
    with without_progress_bars():
        return to_transformers(model, step=STEP, steps=STEPS, tokens=TOKENS)[1]


def greedy(model: GPT, idx: torch.Tensor, count: int) -> list[list[int]]:
    return torch.stack(list(generate_tokens(model, idx, count, temperature=0)), dim=1).tolist()


@torch.no_grad()
def assert_equal(model: GPT, title: str) -> None:
    """Logits within 1e-5 of ours, and the same greedy tokens, from a cache."""
    model.prepare_step(STEP - 1, STEPS, seed=0)
    assert family_of(model.cfg).title == title
    hf, idx = exported(model), prompts(model, length=CONTEXT)
    logits = model(idx)
    assert logits.std() > 0.1 * min(1.0, model.cfg.logit_scale)
    assert (hf(idx).logits - logits).abs().max() < 1e-5
    known = idx[:, : CONTEXT - 6]  # up to the end of the context
    generated = hf.generate(known, attention_mask=torch.ones_like(known), do_sample=False, max_new_tokens=6)
    assert generated[:, CONTEXT - 6 :].tolist() == greedy(model, known, 6)


def test_every_preset_has_our_logits_and_our_greedy_tokens() -> None:
    titles = {small(preset(name)): "NanoChat" if name.startswith("nanochat") else "nGPT" for name in SIZES}
    assert len(titles) == 3  # at one size: with SwiGLU, with relu^2, and a GPT
    for cfg, title in titles.items():
        assert_equal(random_model(cfg), title)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_our_logits_and_our_greedy_tokens(name: str) -> None:
    title, changes = VARIANTS[name]
    assert_equal(random_model(**changes), title)


def test_together_the_variants_have_every_family_and_every_rule() -> None:
    configs = [build(ModelConfig, SMALL | changes) for _, changes in VARIANTS.values()]
    assert {title for title, _ in VARIANTS.values()} == {"nGPT", *(family.title for family in FAMILIES)}
    assert {cfg.residual for cfg in configs} == set(RESIDUAL_RULES)
    assert {cfg.norm_mode for cfg in configs} == {"baseline", "dotprod", "ema"}


@pytest.mark.slow
def test_every_model_of_the_shipped_campaigns_has_our_logits_and_our_greedy_tokens() -> None:
    trials = [trial for path in EXPERIMENTS for phase in preview(load_campaign(path)) for trial in phase.trials]
    models = {str(cfg): cfg for trial in trials for cfg in [small(trial.config.model)]}
    assert len(models) > 40
    for cfg in models.values():
        assert_equal(random_model(cfg), family_of(cfg).title)


@pytest.mark.parametrize("name", ["nanochat", "dotprod", "schedule"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_token(name: str) -> None:
    model = random_model(**VARIANTS[name][1])
    model.prepare_step(STEP - 1, STEPS, seed=0)
    hf, idx = exported(model), prompts(model, rows=3, length=9)
    lengths = [9, 4, 1]
    right, left = torch.zeros_like(idx), torch.zeros_like(idx)
    for row, length in enumerate(lengths):
        right[row, :length], left[row, 9 - length :] = idx[row, :length], idx[row, :length]
    masks = [(torch.arange(9) < torch.tensor(lengths)[:, None]).long() for _ in range(2)]
    masks[1] = masks[1].flip(1)
    logits = hf(right, attention_mask=masks[0]).logits
    continued = hf.generate(left, attention_mask=masks[1], do_sample=False, max_new_tokens=5)[:, 9:]
    for row, length in enumerate(lengths):
        alone = idx[row : row + 1, :length]
        torch.testing.assert_close(logits[row : row + 1, :length], model(alone), rtol=0, atol=1e-5)
        assert continued[row].tolist() == greedy(model, alone, 5)[0]


def test_a_rule_of_a_plug_in_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RESIDUAL_RULES, "mine", RESIDUAL_RULES["lerp"])
    with pytest.raises(ConfigError, match="residual rule 'mine' is from a plug-in, so it cannot be exported; lerp, "):
        family_of(build(ModelConfig, SMALL | {"residual": "mine"}))


def test_the_vocabulary_of_the_tests_is_that_of_their_models() -> None:
    assert random_model().wte.num_embeddings == VOCABULARY
