"""The presets in experiments/models: parameter counts, sources, and a first loss from each."""

from pathlib import Path

import pytest
import torch

from ngpt.config.base import build, override
from ngpt.config.overrides import named_settings
from ngpt.config.yaml_reader import read_yaml
from ngpt.model.config import ModelConfig
from ngpt.model.flops import matrix_params
from ngpt.model.gpt import GPT

FOLDER = Path(__file__).parent.parent / "experiments" / "models"
# Layers, width, vocabulary, and the matrices of a block in width^2: 4 of attention, 8 of relu^2 or 12 of SwiGLU.
SIZES = {
    "1.3M": (4, 128, 2048, 12),  # the preset leaves the vocabulary to the tokenizer; 2048 is what campaigns use
    "13.7M": (4, 128, 50257, 12),
    "30.5M": (6, 256, 50257, 12),
    "52.8M": (8, 384, 50257, 12),
    "0.5B": (24, 1024, 32000, 16),
    "1B": (36, 1280, 32000, 16),
    "nvidia-0.5B": (24, 1024, 50304, 16),
    "nanochat-d4": (4, 256, 65536, 12),
}
# In millions, as the source reports and the paper (table 2: 468.4M and 1026.1M) state them.
STATED = {"13.7M": 13.7, "30.5M": 30.5, "52.8M": 52.8, "0.5B": 468.5, "1B": 1026.2, "nvidia-0.5B": 506.0}


def preset(name: str) -> ModelConfig:
    found, wrong = named_settings(ModelConfig, read_yaml(FOLDER / f"{name}.yaml").data)
    assert wrong == []
    settings = {setting: value for setting, (value, _) in found.items()}
    return build(ModelConfig, settings | {"vocab_size": settings["vocab_size"] or SIZES[name][2]})


def n_params(cfg: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(cfg).parameters())


def test_every_preset_has_a_count() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_the_parameters_of_a_preset_are_those_counted_by_hand(name: str) -> None:
    n_layer, width, vocabulary, units = SIZES[name]
    cfg = preset(name)
    matrices = n_layer * units * width**2 + 2 * vocabulary * width
    # nGPT: two alphas and s_qk of the width, s_uv of the hidden units (4 widths, 8 with a gate), and s_z.
    hidden = 8 if units == 16 else 4
    scales = n_layer * (3 + hidden) * width + vocabulary if cfg.on_sphere else 0
    assert n_params(cfg) == matrices + scales
    assert matrix_params(cfg) == matrices - vocabulary * width  # an embedding is a lookup, not a product


@pytest.mark.parametrize("name", STATED)
def test_the_parameters_of_a_preset_are_those_its_source_states(name: str) -> None:
    assert n_params(preset(name)) / 1e6 == pytest.approx(STATED[name], rel=0.001)


def test_nanochats_preset_is_its_depth_four() -> None:
    cfg = preset("nanochat-d4")  # base_train.py: 64 channels per layer, heads of 128
    assert (cfg.n_embd, cfg.head_dim, cfg.residual, cfg.softcap) == (64 * cfg.n_layer, 128, "add", 15.0)


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_computes_a_loss_near_that_of_guessing(name: str) -> None:
    """The architecture of the preset with fewer tokens, layers and channels."""
    cfg = preset(name)
    small = override(cfg, {"n_layer": 2, "n_embd": cfg.n_head * 8, "vocab_size": 97, "block_size": 16})
    idx = torch.randint(97, (4, 16), generator=torch.Generator().manual_seed(1))
    loss = GPT(small)(idx, idx.roll(-1, 1))
    assert float(loss.detach()) == pytest.approx(4.575, abs=0.2)  # ln 97
