"""The settings of a model, with checks that they are compatible."""

from typing import Annotated, Self

from pydantic import Discriminator, Field, Strict, Tag, model_validator

from ngpt.config.base import Config, added_setting, invalid_setting, one_of, renamed_setting
from ngpt.model.norm import NORM_MODES
from ngpt.model.residual import ALPHA_KINDS, ALPHA_SIGNS, RESIDUAL_ALIASES, RESIDUAL_RULES
from ngpt.model.rope import ROPE_KINDS, ROPE_SCALINGS

MLP_KINDS = ("swiglu", "relu2")
SCALE_KINDS = ("vector", "scalar")
TRAINED_SCALINGS = ("yarn", "llama3")  # those that use the context length of the original training
MAX_PARAMS = 10**13  # more than a hundred nodes hold
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Width = Annotated[int, Field(ge=1, le=2**20)]  # of a vector, or a number of sequences
Length = Annotated[int, Field(ge=1, le=2**24)]  # of a sequence, or a number of tokens of a vocabulary
OnePerLayer = Annotated[tuple[Positive, ...], Field(min_length=1), Strict(False)]
# A discriminated union, so that an invalid value gives one error instead of one per member of the union.
Alpha = Annotated[
    Annotated[Positive, Tag("one-number")] | Annotated[OnePerLayer, Tag("one-per-layer")],
    Discriminator(lambda value: "one-per-layer" if isinstance(value, list | tuple) else "one-number"),
]


class ModelConfig(Config, frozen=True):
    """Shape and variant of a GPT or nGPT."""

    n_layer: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Number of blocks."""
    n_head: Width = 4
    """Attention heads per block."""
    n_kv_head: Width | None = None
    """Heads of keys and values; null: `n_head`, 1: multi-query, otherwise grouped-query."""
    n_embd: Width = 128
    """Width of the residual stream."""
    block_size: Length = 128
    """Context length, and length of the sequences in training, in tokens."""
    vocab_size: Annotated[int, Field(ge=2, le=2**24)] | None = None
    """Entries of the vocabulary; null: the tokenizer's."""
    tied: bool = False
    """Whether embedding and head share one matrix."""
    mlp: Annotated[str, one_of(MLP_KINDS, "MLP kind")] = "swiglu"
    """Kind of the MLP."""
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """Hidden width of the MLP, divided by `n_embd`."""
    qk_norm: bool = True
    """Whether queries and keys are normalized."""
    softmax_scale: Positive | None = None
    """Factor of the attention scores; null: the one that fits the normalization of queries and keys."""
    softcap: Positive | None = None
    """Logits become `softcap * tanh(logits / softcap)`; null: they are not capped."""
    rope: Annotated[str, one_of(ROPE_KINDS, "rope")] = "rotary"
    """Rotary embedding; `nvidia`: the variant of the official checkpoints."""
    rope_base: Positive = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Annotated[str, one_of(ROPE_SCALINGS, "rope scaling")] = "none"
    """Rule that adapts the rotary frequencies to longer contexts."""
    rope_factor: Annotated[float, Field(ge=1)] = 1.0
    """`block_size`, divided by the context length of the original training."""
    rope_trained: Length | None = added_setting(None)
    """Context length of the original training, for `yarn` and `llama3`; null: from `rope_factor`."""
    value_residual: Annotated[float, Field(ge=0, le=1)] = added_setting(0.0)
    """Share of the first layer's values in those of the others (ResFormer, arXiv 2410.17897)."""
    residual: Annotated[str, one_of(RESIDUAL_RULES, "residual rule", aliases=RESIDUAL_ALIASES)] = renamed_setting(
        "lerp", RESIDUAL_ALIASES
    )
    """Residual rule: `lerp` (the paper), `slerp`, `add_normalize` (the source reports), `add` (GPT)."""

    # nGPT only; no effect under `residual: add`:
    alpha: Alpha = 0.05
    """nGPT only: initial step length of the residuals; a list is spread over the depth."""
    alpha_final: Positive | None = None
    """nGPT only: where alpha goes over the run, linearly; null: it has no schedule."""
    alpha_kind: Annotated[str, one_of(ALPHA_KINDS, "alpha kind")] = "vector"
    """nGPT only: one alpha per channel (`vector`), per head, or per layer (`scalar`)."""
    alpha_learned: bool = True
    """nGPT only: whether alpha is learned."""
    alpha_sign: Annotated[str, one_of(ALPHA_SIGNS, "alpha sign")] = "abs"
    """nGPT only: whether alpha is used by its absolute value, or may become negative (`free`)."""
    logit_scale: Positive = 1.0
    """nGPT only: initial s_z, the scale of the logits."""
    logit_scale_kind: Annotated[str, one_of(SCALE_KINDS, "logit scale kind")] = "vector"
    """nGPT only: one s_z per vocabulary entry (`vector`), or a single one (`scalar`)."""
    s_uv: bool = True
    """nGPT only: whether the hidden units of the MLP have a learned scale, times sqrt(n_embd)."""
    scale_trick: bool = True
    """nGPT only: whether alpha, s_qk and s_z are stored at 1/sqrt(n_embd)."""
    norm_mode: Annotated[str, one_of(NORM_MODES, "norm mode")] = "baseline"
    """nGPT only: rule for the divisor r of a residual step."""
    norm_decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """nGPT only: decay of the norm mode `ema`."""
    norm_every: Count = 1
    """nGPT only: ghost norms: sublayers between normalizations; the last one is always followed by one."""
    norm_probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """nGPT only: stochastic residual norm: probability of normalizing in training."""

    # GPT only; no effect under the other rules:
    embedding_norm: bool = True
    """GPT only: whether the output of the embedding is normalized."""
    norm_gain: bool = False
    """GPT only: whether each RMSNorm of the residual stream has a learned gain."""
    qkv_bias: bool = added_setting(False)
    """GPT only: whether queries, keys and values have biases, as in Qwen2."""
    norm_eps: Positive | None = added_setting(None)
    """GPT only: epsilon of every RMSNorm; null: 1e-6 with `norm_gain`, torch's without."""

    @property
    def on_sphere(self) -> bool:
        """Whether the residual stream and the weight vectors have unit length, as under every rule but `add`."""
        return self.residual != "add"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden(self) -> int:
        """Hidden width F of the MLP."""
        return round(self.mlp_ratio * self.n_embd)

    @property
    def stored_scale(self) -> float | None:
        """Initial stored value of alpha, s_qk and s_z; None: equal to the effective value."""
        return self.n_embd**-0.5 if self.scale_trick else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.n_embd % self.n_head:
            text = f"n_embd {self.n_embd} cannot be divided into n_head {self.n_head} heads"
            raise invalid_setting(text, "n_head", "n_embd")
        if self.head_dim % 2:
            text = f"n_embd {self.n_embd} / n_head {self.n_head} gives heads of odd width {self.head_dim}"
            raise invalid_setting(f"{text}; rotary embedding needs an even width", "n_head", "n_embd")
        if self.n_head % self.kv_heads:
            text = f"n_head {self.n_head} is not a multiple of n_kv_head {self.kv_heads}"
            raise invalid_setting(text, "n_kv_head", "n_head")
        if not self.hidden:
            text = f"mlp_ratio {self.mlp_ratio} of n_embd {self.n_embd} gives an MLP without hidden units"
            raise invalid_setting(text, "mlp_ratio", "n_embd")
        n_params = self.n_layer * self.n_embd * (4 * self.n_embd + 3 * self.hidden)
        if n_params > MAX_PARAMS:
            text = f"n_layer {self.n_layer}, n_embd {self.n_embd} and mlp_ratio {self.mlp_ratio:g} give a model"
            text += f" of about {n_params:.2g} parameters; at most {MAX_PARAMS:.0e} are possible"
            raise invalid_setting(text, "n_layer", "n_embd", "mlp_ratio")
        if self.rope_factor != 1 and self.rope_scaling == "none":
            scalings = ", ".join(name for name in ROPE_SCALINGS if name != "none")
            raise invalid_setting(f"rope_factor {self.rope_factor} needs a rope_scaling: {scalings}", "rope_factor")
        if self.alpha_final is not None and not isinstance(self.alpha, float):
            raise invalid_setting("alpha_final needs a single alpha to start from, not one per layer", "alpha_final")
        if self.qkv_bias and self.on_sphere:
            raise invalid_setting("qkv_bias needs `residual: add`; nGPT has no biases", "qkv_bias", "residual")
        if self.norm_eps is not None and self.on_sphere:
            raise invalid_setting("norm_eps needs `residual: add`; nGPT has no RMSNorm", "norm_eps", "residual")
        if self.rope_trained is not None and self.rope_scaling not in TRAINED_SCALINGS:
            text = f"rope_trained needs a rope_scaling that depends on it: {', '.join(TRAINED_SCALINGS)}"
            raise invalid_setting(text, "rope_trained")
        for name in ("norm_mode", "norm_every", "norm_probability", "alpha_final"):
            if not self.on_sphere and getattr(self, name) != type(self).model_fields[name].default:
                raise invalid_setting(f"{name} needs a residual rule on the sphere, not `add`", name, "residual")
        return self
