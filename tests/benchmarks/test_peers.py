"""The comparison with public implementations, on two small files with the interfaces of nanoGPT and of NVIDIA's nGPT.

The second one imports flash_attn, as the official file does. The real files are not part of this repository.
"""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import (
    compare_with_peer,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    load_peer,
    main,
    normalize_matrices,
    peer_step,
)
from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import Dataset
from ngpt.training.config import TrainConfig, resolved

NANOGPT = """
import torch
from dataclasses import dataclass
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.5
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.dropout == 0 and not config.bias
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
        print("number of parameters: many")

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
NGPT = """
import torch
from dataclasses import dataclass
from torch import nn
from torch.nn import functional as F
from flash_attn import flash_attn_qkvpacked_func, flash_attn_func

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 1024
    base_scale: float = 1.0 / (1024.0 ** 0.5)
    use_nGPT: int = 0
    dropout: float = 0.0
    bias: bool = False

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        n, kind = config.n_embd, torch.bfloat16
        self.heads = config.n_head
        self.query, self.key, self.value, self.att_c_proj = (nn.Linear(n, n, bias=False, dtype=kind) for _ in range(4))
        self.c_fc = nn.Linear(n, 8 * n, bias=False, dtype=kind)
        self.mlp_c_proj = nn.Linear(4 * n, n, bias=False, dtype=kind)

    def forward(self, h):
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).bfloat16() for f in (self.query, self.key, self.value))
        h = h + self.att_c_proj(flash_attn_func(q, k, v, softmax_scale=1.0, causal=True, deterministic=True).flatten(2))
        u, v = self.c_fc(h).chunk(2, dim=-1)
        return h + self.mlp_c_proj(u * F.silu(v))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.use_nGPT == 1 and abs(config.base_scale - config.n_embd ** -0.5) < 1e-9
        self.config = config
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd), "h": blocks})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx, targets=None):
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        GPT.newest = self
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


@pytest.fixture
def ngpt_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(NGPT)
    return path


def test_a_peer_of_the_same_shape_learns_and_prints_nothing_on_stdout(
    tiny: TrainConfig, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.py"
    path.write_text(NANOGPT)
    config = resolved(tiny)
    train, n_params = peer_step(path, config, dataset, compiled=False)
    assert n_params == 2 * 400 * 16
    losses = [float(train()) for _ in range(30)]
    assert losses[-1] < losses[0]
    captured = capsys.readouterr()
    assert captured.out == "" and "number of parameters" in captured.err


def test_an_ngpt_is_projected_before_training_and_after_each_step(
    tiny: TrainConfig, dataset: Dataset, ngpt_file: Path
) -> None:
    config = override(resolved(tiny), {"dtype": "bfloat16"})
    train, _ = peer_step(ngpt_file, config, dataset, compiled=False)
    net = loaded_module(ngpt_file).GPT.newest
    for _ in range(3):
        for weight, dim in weights(net):
            lengths = weight.detach().double().norm(dim=dim)
            torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=4e-3, rtol=0)  # bfloat16
        before = net.transformer.wte.weight.detach().clone()
        assert math.isfinite(float(train()))
        assert not torch.equal(net.transformer.wte.weight, before)


def loaded_module(path: Path) -> Any:
    """The module that `peer_step` has imported from `path`."""
    return next(
        module for module in reversed(list(sys.modules.values())) if getattr(module, "__file__", "") == str(path)
    )


def weights(net: Any) -> list[tuple[torch.Tensor, int]]:
    """Matrices, and the dimension of each that has width D."""
    found = [(net.transformer.wte.weight, 1), (net.lm_head.weight, 1)]
    for block in net.transformer.h:
        found += [(block.c_fc.weight, 1), (block.mlp_c_proj.weight, 0), (block.att_c_proj.weight, 0)]
        found += [(part.weight, 1) for part in (block.query, block.key, block.value)]
    return found


def test_normalize_matrices_gives_unit_rows_or_columns(ngpt_file: Path) -> None:
    module = load_peer(ngpt_file)
    config = module.GPTConfig(8, 31, 1, 2, 16, base_scale=0.25, use_nGPT=1)
    net = module.GPT(config)
    expected = [(w.detach().double() / w.detach().double().norm(dim=dim, keepdim=True)) for w, dim in weights(net)]
    normalize_matrices(net)
    for (weight, _), exact in zip(weights(net), expected, strict=True):
        torch.testing.assert_close(weight.detach(), exact.to(weight.dtype), atol=1e-6, rtol=8e-3)


def test_the_flash_attn_substitute_is_causal_softmax_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 0.7
    allowed = torch.ones(5, 5).tril().bool()
    expected = torch.einsum("bhts,bshk->bthk", scores.masked_fill(~allowed, -math.inf).softmax(-1), v)
    result = flash_attn_func(q, k, v, softmax_scale=0.7, causal=True, deterministic=True)
    torch.testing.assert_close(result, expected)
    packed = flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), softmax_scale=0.7, causal=True)
    torch.testing.assert_close(packed, expected)
    with pytest.raises(NotImplementedError, match="windows"):
        flash_attn_func(q, k, v, window_size=(4, 0))


def test_the_flash_attn_substitute_is_removed_after_loading(ngpt_file: Path) -> None:
    load_peer(ngpt_file)
    assert "flash_attn" not in sys.modules or hasattr(sys.modules["flash_attn"], "__file__")


def test_a_file_without_nanogpts_interface_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("class GPT: ...")
    with pytest.raises(ConfigError, match="does not define GPTConfig, as nanoGPT's"):
        load_peer(tmp_path / "other.py")


def test_bfloat16_weights_are_not_compared_with_float32_steps(
    tiny: TrainConfig, dataset: Dataset, ngpt_file: Path
) -> None:
    with pytest.raises(ConfigError, match="keeps weights in bfloat16"):
        peer_step(ngpt_file, resolved(tiny), dataset, compiled=False)


def test_a_missing_file_is_reported_in_one_line(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.py"
    assert main([str(path), "--set", f"corpus={tiny.data.corpus}", f"tokenizer={tiny.data.tokenizer}"]) == 2
    assert capsys.readouterr().err == f"no such file: {path}\n"


@pytest.mark.slow
def test_each_contestant_is_measured_in_its_own_process(tiny: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(NANOGPT)
    figures = compare_with_peer(tiny, path, modes=["eager"], seconds=0.0)
    assert figures.keys() >= {"tokens_per_second", "step_ms", "mfu", "ratio_eager", "memory_ratio_eager"}
    assert "ratio_compiled" not in figures
    ours, theirs = (figures["contestants"][f"{who}_eager"] for who in ("ours", "peer"))
    assert figures["tokens_per_second"] == ours["tokens_per_second"]
    assert figures["memory_ratio_eager"] == ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    for contestant in (ours, theirs):
        assert contestant["best_ms"] <= contestant["step_ms"]
        assert contestant["peak_memory_bytes"] > 50e6  # an interpreter with torch
