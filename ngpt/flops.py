"""How big a model is and how much arithmetic a training token costs."""

from ngpt.model import ModelConfig


def matrix_params(cfg: ModelConfig) -> int:
    """Entries of the matrices that each token is multiplied with: blocks and head; the embedding is a lookup."""
    assert cfg.vocab_size is not None
    up = cfg.hidden * (2 if cfg.mlp == "swiglu" else 1)
    block = cfg.n_embd * (4 * cfg.n_embd + up + cfg.hidden)
    return cfg.n_layer * block + cfg.vocab_size * cfg.n_embd


def flops_per_token(cfg: ModelConfig) -> int:
    """Floating-point operations to train on one token: forward and backward.

    6 per matrix entry (one multiply-add forward, two backward) and 12 * n_layer * n_embd * block_size for attention
    scores and mixing, without the causal half: the count of PaLM (arXiv 2204.02311, appendix B) and of nanochat.
    """
    return 6 * matrix_params(cfg) + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
