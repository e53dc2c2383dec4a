"""The language model. Attention and MLP are in layers.py, the settings in config.py.

With `residual: add` it is a pre-norm GPT as in nanochat (RMSNorm without gain, QK norm, relu^2, softcap, untied head).
With any other rule it is nGPT (arXiv 2410.01131; NVIDIA/ngpt): the residual stream and the weight vectors lie on the
unit sphere, and learned scales s_qk, s_uv and s_z replace the norm layers.

Shapes: B batch, T tokens, D width (n_embd), H heads, G key/value heads (n_kv_head), K head width (D / H), F hidden
width of the MLP, V vocabulary.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngpt.kernels.compile import compile_for, compiled_copy
from ngpt.kernels.cpu_attention import has_cpu_attention
from ngpt.kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from ngpt.model.config import ModelConfig
from ngpt.model.layers import MLP, Attention, KVCache, ValueResidual
from ngpt.model.norm import DotProdNormalizer, l2_normalize, rms_norm
from ngpt.model.residual import Residual, Scale, spread_over_depth
from ngpt.model.rope import rope_tables


class Block(nn.Module):
    """A block of a model. With `recomputes`, a training pass keeps its inputs only, and computes the rest once more."""

    recomputes = False  # set by `GPT.recompute_blocks`
    compiles = False  # set by `GPT.compile_blocks`

    def __init__(self) -> None:
        super().__init__()
        self._compiled: dict[Hashable, Callable[..., tuple[Tensor, Tensor | None]]] = {}

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        normalizer: DotProdNormalizer | None,
        r: Tensor | None,
        cache: KVCache | None,
        values: ValueResidual | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the stream (B, T, D) and the divisor r (B, T), or None without a `normalizer`, after the block."""
        inputs = x, cos, sin, normalizer, r, cache, values
        if not self.compiles:
            return self._pass(*inputs)
        key = x.shape, torch.is_grad_enabled()
        if key not in self._compiled:
            self._compiled[key] = compiled_copy(type(self)._pass)
        return self._compiled[key](self, *inputs)

    def _pass(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        normalizer: DotProdNormalizer | None,
        r: Tensor | None,
        cache: KVCache | None,
        values: ValueResidual | None,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = x, cos, sin, normalizer, r, cache, values
        if not (self.recomputes and torch.is_grad_enabled()):
            return self.compute(*inputs)
        contexts: dict[str, Any] = {}
        if normalizer is not None and not torch.compiler.is_compiling():  # a compiled repetition counts nothing
            contexts = {"context_fn": normalizer.contexts}
        # Nothing in a block is random, so there is no state of a generator to restore.
        result = checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)
        assert result is not None
        return result

    def compute(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        normalizer: DotProdNormalizer | None,
        r: Tensor | None,
        cache: KVCache | None,
        values: ValueResidual | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the block; arguments and results are those of `forward`."""
        raise NotImplementedError  # in SphereBlock and PreNormBlock


class SphereBlock(Block):
    """nGPT block: attention and MLP read the stream without a norm, and each moves it along the sphere."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.attention_residual = _residual(cfg, 2 * layer, n_head=cfg.n_head)
        self.mlp_residual = _residual(cfg, 2 * layer + 1, n_head=None)

    def compute(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        normalizer: DotProdNormalizer | None,
        r: Tensor | None,
        cache: KVCache | None,
        values: ValueResidual | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Moves the stream along the sphere, first by the attention, then by the MLP."""
        f = self.attention(x, cos, sin, self.attention_residual.head_weights(), cache, values)
        if normalizer is not None and r is not None:
            r = normalizer(r, x, self.attention_residual.normalized_branch(f))
        x = self.attention_residual(x, f, r)
        f = self.mlp(x)
        if normalizer is not None and r is not None:
            r = normalizer(r, x, self.mlp_residual.normalized_branch(f))
        return self.mlp_residual(x, f, r), r


def _residual(cfg: ModelConfig, sublayer: int, *, n_head: int | None) -> Residual:
    """Builds the residual of one of the 2 * n_layer sublayers. With per-head alphas, an MLP gets a single alpha."""
    alpha = spread_over_depth(cfg.alpha, cfg.n_layer)[sublayer // 2]
    sizes = {"vector": cfg.n_embd, "scalar": 1, "head": n_head or 1}
    renormalizes = (sublayer + 1) % cfg.norm_every == 0 or sublayer == 2 * cfg.n_layer - 1
    return Residual(
        cfg.residual,
        size=sizes[cfg.alpha_kind],
        alpha=alpha,
        scale=cfg.stored_scale or alpha,
        learned=cfg.alpha_learned,
        sign=cfg.alpha_sign,
        per_head=cfg.alpha_kind == "head" and n_head is not None,
        renormalize=cfg.norm_probability if renormalizes else 0.0,
    )


class PreNormBlock(Block):
    """Pre-norm GPT block: attention and MLP read the normalized stream and add to it."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.attention_norm, self.mlp_norm = _rms_norm(cfg), _rms_norm(cfg)

    def compute(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        normalizer: DotProdNormalizer | None,
        r: Tensor | None,
        cache: KVCache | None,
        values: ValueResidual | None,
    ) -> tuple[Tensor, None]:
        """Adds the attention, then the MLP, to the stream; there is no divisor."""
        x = x + self.attention(self.attention_norm(x), cos, sin, cache=cache, values=values)
        return x + self.mlp(self.mlp_norm(x)), None


def _rms_norm(cfg: ModelConfig) -> nn.RMSNorm:
    # With gain as in NVIDIA's GPT baseline; without gain as in nanochat, which uses torch's default eps.
    eps = cfg.norm_eps if cfg.norm_eps is not None else 1e-6 if cfg.norm_gain else None
    return nn.RMSNorm(cfg.n_embd, eps=eps, elementwise_affine=cfg.norm_gain)


class GPT(nn.Module):
    """GPT or nGPT language model. `seed` determines the initial weights, independently of the device."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("model.vocab_size is not set: ngpt.training.config.resolved sets it from the tokenizer")
        self.cfg = cfg
        self.compiled, self._compiles_blocks, self._graph_key = False, False, ""
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        block = SphereBlock if cfg.on_sphere else PreNormBlock
        self.blocks = nn.ModuleList(block(cfg, layer) for layer in range(cfg.n_layer))
        has_divisor = cfg.norm_mode != "baseline"
        self.normalizer = DotProdNormalizer(cfg.norm_mode, decay=cfg.norm_decay) if has_divisor else None
        self.final_norm = None if cfg.on_sphere else _rms_norm(cfg)
        self.lm_head = None if cfg.tied else nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        size = cfg.vocab_size if cfg.logit_scale_kind == "vector" else 1
        scale = cfg.stored_scale or cfg.logit_scale
        self.s_z = Scale(size, init=cfg.logit_scale, scale=scale) if cfg.on_sphere else None
        scaling = {"scaling": cfg.rope_scaling, "factor": cfg.rope_factor, "trained": cfg.rope_trained}
        cos, sin = rope_tables(cfg.block_size, cfg.head_dim, base=cfg.rope_base, **scaling)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def forward(self, idx: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Returns logits (B, T, V) for token ids `idx` (B, T), or with `targets` (B, T) the mean cross-entropy in nats.

        With a `cache`, `idx` continues the cached tokens and is appended to the cache.
        """
        x = self.features(idx, cache)
        if targets is None:
            return self.logits(x)
        return self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy in nats of features x (B, T, D) against targets (B, T)."""
        scale, softcap = None if self.s_z is None else self.s_z(), self.cfg.softcap
        return linear_cross_entropy(x, self.head_weight, targets, scale=scale, softcap=softcap, compiled=self.compiled)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropy of each token in nats, (B * T,), without gradients; arguments as in `loss`."""
        scale = None if self.s_z is None else self.s_z()
        return token_losses(x, self.head_weight, targets, scale=scale, softcap=self.cfg.softcap)

    def compile_parts(self) -> None:
        """Turns on compilation: the blocks and the loss are compiled on their next call, which takes seconds."""
        # These settings enter the graph as tensors, so models that differ only in them share compiled code.
        tensor_settings = ("alpha", "alpha_final", "logit_scale", "rope_base")
        self._graph_key = repr(self.cfg.model_copy(update=dict.fromkeys(tensor_settings)))
        if self.wte.weight.device.type == "cpu" and has_cpu_attention():
            for module in self.modules():
                if isinstance(module, Attention):
                    module.use_cpu_kernel = True
        self.compiled = True

    def compile_blocks(self) -> None:
        """Compiles each block by itself instead of all together, so that weights can be gathered between them."""
        self._compiles_blocks = True
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiles = True

    def recompute_blocks(self) -> None:
        """Turns on activation checkpointing: each block is computed again in the backward pass (arXiv 1604.06174).

        A training pass then keeps the inputs of the blocks, and the activations of one block at a time.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recomputes = True

    def logits(self, x: Tensor) -> Tensor:
        """Returns the float32 logits (B, T, V) of features x (B, T, D)."""
        # Scale the (V, D) weight, which is far smaller than the (B, T, V) logits.
        weight = self.head_weight if self.s_z is None else self.head_weight * self.s_z()[:, None]
        logits = F.linear(x, weight).float()
        return logits if self.cfg.softcap is None else self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def features(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Returns the input of the head (B, T, D): the stream after the last block, normalized in a GPT."""
        if not self.compiled or self._compiles_blocks:
            return self.features_uncompiled(idx, cache)
        # One key per shape, since a run that repeatedly halves its batch would exceed torch's recompilation limit.
        return compile_for((self._graph_key, idx.shape), GPT.features_uncompiled)(self, idx, cache)

    def features_uncompiled(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        *_, x = self.stream(idx, cache)
        return x if self.final_norm is None else self.final_norm(x)

    def stream(self, idx: Tensor, cache: KVCache | None = None) -> Iterator[Tensor]:
        """Yields the residual stream (B, T, D) before the first block and after each block."""
        past, new = cache.length if cache else 0, idx.shape[1]
        if past + new > self.cfg.block_size:
            raise ValueError(f"{past + new} tokens do not fit the model's block_size of {self.cfg.block_size}")
        cos, sin = self.cos[past : past + new], self.sin[past : past + new]
        x = self.wte(idx)
        r = None if self.normalizer is None else self.normalizer.start(x)
        if self.cfg.embedding_norm and not self.cfg.on_sphere:
            x = rms_norm(x, self.cfg.norm_eps)
        values = ValueResidual(self.cfg.value_residual) if self.cfg.value_residual else None
        yield x
        for block in self.blocks:
            x, r = block(x, cos, sin, normalizer=self.normalizer, r=r, cache=cache, values=values)
            yield x
        if cache is not None:
            cache.length += new

    def prepare_step(self, step: int, total: int, *, seed: int) -> None:
        """Applies the alpha schedule and draws the stochastic norms of `step`, in 0 ... total - 1; keeps no state."""
        residuals = [module for module in self.modules() if isinstance(module, Residual)]
        if self.cfg.alpha_final is not None:
            assert isinstance(self.cfg.alpha, float)
            progress = step / max(1, total - 1)
            for residual in residuals:
                residual.alpha.multiply(1 + (self.cfg.alpha_final / self.cfg.alpha - 1) * progress)
        if self.cfg.norm_probability < 1:
            draws = np.random.default_rng([seed, step, len(residuals)]).random(len(residuals))
            for residual, draw in zip(residuals, draws, strict=True):
                residual.renormalized.fill_(bool(draw < self.cfg.norm_probability))

    def sphere_weights(self) -> Iterator[tuple[Tensor, int]]:
        """Yields each matrix on the sphere with the dimension along which its vectors have unit length.

        The vectors are rows in embedding, head and matrices that read the stream, and columns in matrices that write to
        it. A GPT has no such matrices.
        """
        if not self.cfg.on_sphere:
            return
        yield self.wte.weight, 1
        for block in self.blocks:
            assert isinstance(block, SphereBlock)
            for linear in (block.attention.query, block.attention.key, block.attention.value, block.mlp.up):
                yield linear.weight, 1
            for linear in (block.attention.out, block.mlp.down):
                yield linear.weight, 0
        if self.lm_head is not None:
            yield self.lm_head.weight, 1

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """Draws nGPT weights from N(0, 1/D) and normalizes them; draws GPT weights as in nanochat's init_weights.

        A tied GPT cannot use nanochat's zero-initialized head; it uses N(0, 0.02^2) as in GPT-2.
        """
        if self.cfg.on_sphere:
            for weight, dim in self.sphere_weights():
                weight.normal_(std=self.cfg.n_embd**-0.5, generator=generator)
                weight.copy_(l2_normalize(weight, dim))
            return
        self.wte.weight.normal_(std=0.02 if self.cfg.tied else 1.0, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                std = min(1.0, (rows / columns) ** 0.5) / columns**0.5
                module.weight.normal_(std=std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
                if name.endswith(("out", "down", "lm_head")):  # blocks start as the identity, logits as 0
                    module.weight.zero_()
