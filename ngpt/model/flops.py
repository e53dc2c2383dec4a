"""How big a model is and how much arithmetic a training token costs."""

from ngpt.model.gpt import ModelConfig


def matrix_params(cfg: ModelConfig) -> int:
    """Entries of the matrices that each token is multiplied with: blocks and head; the embedding is a lookup.

    A head that is tied to the embedding is multiplied with all the same, and counts.
    """
    assert cfg.vocab_size is not None
    attention = 2 * cfg.n_embd + 2 * cfg.kv_heads * cfg.head_dim  # rows of query and output, of key and value
    mlp = cfg.hidden * (3 if cfg.mlp == "swiglu" else 2)
    return cfg.n_embd * (cfg.n_layer * (attention + mlp) + cfg.vocab_size)


def flops_per_token(cfg: ModelConfig) -> int:
    """Floating-point operations to train on one token: forward and backward of all matrix products.

    6 per matrix entry (one multiply-add forward, two backward) and 12 * n_layer * n_embd * block_size for attention
    scores and mixing, without the causal half: the count of PaLM (arXiv 2204.02311, appendix B) and of nanochat
    (gpt.py, estimate_flops). Heads that share keys and values save matrix entries, but no scores.
    """
    return 6 * matrix_params(cfg) + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
