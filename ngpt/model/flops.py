"""Matrix parameters of a model and FLOPs per training token."""

from ngpt.model.config import ModelConfig


def matrix_params(cfg: ModelConfig) -> int:
    """Number of matrix entries that multiply each token: blocks and head, but not the embedding lookup."""
    assert cfg.vocab_size is not None
    attention = 2 * cfg.n_embd + 2 * cfg.kv_heads * cfg.head_dim  # query and output, key and value
    mlp = cfg.hidden * (3 if cfg.mlp == "swiglu" else 2)
    return cfg.n_embd * (cfg.n_layer * (attention + mlp) + cfg.vocab_size)


def flops_per_token(cfg: ModelConfig) -> int:
    """FLOPs per training token, forward and backward.

    6 per matrix entry (one multiply-add forward, two backward), plus 12 * n_layer * n_embd * block_size for attention
    scores and weighted values, not halved for causality. This follows PaLM (arXiv 2204.02311, appendix B) and nanochat
    (gpt.py, estimate_flops). Grouped-query attention saves matrix entries, but no score computation. Blocks that
    activation checkpointing computes again do not count: these are the FLOPs of the model, as for MFU.
    """
    return 6 * matrix_params(cfg) + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
