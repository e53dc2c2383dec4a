"""Models with random weights, as checkpoints, and the settings of the shipped models and campaigns at a small size."""

from pathlib import Path
from typing import Any

import torch

from ngpt.config.base import build, flatten, override
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.training.checkpoint import save_checkpoint

VOCABULARY, CONTEXT = 61, 24
SMALL = {"n_layer": 3, "n_head": 2, "n_embd": 16, "mlp_ratio": 2.0, "block_size": CONTEXT, "vocab_size": VOCABULARY}


def small(cfg: ModelConfig) -> ModelConfig:
    """The same architecture with fewer layers, channels and tokens."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": CONTEXT, "vocab_size": VOCABULARY}
    sizes |= {"n_kv_head": None if cfg.kv_heads == cfg.n_head else 1}
    return override(cfg, sizes | {"rope_trained": cfg.rope_trained and CONTEXT // 2})


def random_model(cfg: ModelConfig | None = None, **changes: Any) -> GPT:
    """A model of `SMALL`, or of `cfg`, with random matrices and gains, and scales that are not their initial ones."""
    model = GPT(override(cfg or build(ModelConfig, SMALL), changes)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (*model.parameters(), *(value for name, value in model.named_buffers() if "stored" in name)):
            if weight.ndim == 1:
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def prompts(model: GPT, *, rows: int = 2, length: int = 6) -> torch.Tensor:
    size = int(model.cfg.vocab_size or 0)
    return torch.randint(1, size, (rows, length), generator=torch.Generator().manual_seed(6))


def save_model(
    model: GPT,
    folder: Path,
    *,
    step: int = 0,
    steps: int = 1,
    tokenizer: tuple[str, str, bytes] | None = None,
    **identity: Any,
) -> Path:
    """Saves a checkpoint in the folder of a run; `tokenizer` has the spec, and the name and content of its file."""
    saved = {f"model.{name}": value for name, value in flatten(model.cfg).items()} | {"steps": steps} | identity
    files = {}
    if tokenizer is not None:
        saved["data.tokenizer"], files = tokenizer[0], {tokenizer[1]: tokenizer[2]}
    how: dict[str, Any] = {"state": {}, "step": step, "val_loss": None, "keep_last": 1, "files": files}
    save_checkpoint(folder / "checkpoints", weights=model.state_dict(), identity=saved, **how)
    return folder
