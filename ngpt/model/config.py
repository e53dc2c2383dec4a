"""The settings of a model, with checks that they are compatible."""

from typing import Annotated, Self

from pydantic import Discriminator, Field, Strict, Tag, model_validator

from ngpt.config.base import Config, invalid_setting, one_of, renamed_setting
from ngpt.model.norm import NORM_MODES
from ngpt.model.residual import ALPHA_KINDS, ALPHA_SIGNS, RESIDUAL_ALIASES, RESIDUAL_RULES
from ngpt.model.rope import ROPE_KINDS, ROPE_SCALINGS

MLP_KINDS = ("swiglu", "relu2")
SCALE_KINDS = ("vector", "scalar")
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
    n_head: Width = 4
    n_kv_head: Width | None = None  # key/value heads; null: n_head; 1: multi-query; otherwise grouped-query
    n_embd: Width = 128
    block_size: Length = 128  # context length and training sequence length, in tokens
    vocab_size: Annotated[int, Field(ge=2, le=2**24)] | None = None  # null: the tokenizer's
    tied: bool = False  # the head shares the embedding's matrix
    mlp: Annotated[str, one_of(MLP_KINDS, "MLP kind")] = "swiglu"
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = 4.0  # hidden width of the MLP / n_embd
    qk_norm: bool = True
    softmax_scale: Positive | None = None  # multiplies the attention scores; null: see Attention
    softcap: Positive | None = None  # logits become softcap * tanh(logits / softcap)
    rope: Annotated[str, one_of(ROPE_KINDS, "rope")] = "rotary"
    rope_base: Positive = 10_000.0
    rope_scaling: Annotated[str, one_of(ROPE_SCALINGS, "rope scaling")] = "none"
    rope_factor: Annotated[float, Field(ge=1)] = 1.0  # block_size / context length of the original training
    residual: Annotated[str, one_of(RESIDUAL_RULES, "residual rule", aliases=RESIDUAL_ALIASES)] = renamed_setting(
        "lerp", RESIDUAL_ALIASES
    )

    # nGPT only; no effect under `residual: add`:
    alpha: Alpha = 0.05  # initial step size of the residuals, or several values spread over the depth
    alpha_final: Positive | None = None  # alpha changes linearly to this over the run; null: no schedule
    alpha_kind: Annotated[str, one_of(ALPHA_KINDS, "alpha kind")] = "vector"
    alpha_learned: bool = True
    alpha_sign: Annotated[str, one_of(ALPHA_SIGNS, "alpha sign")] = "abs"
    logit_scale: Positive = 1.0  # initial s_z
    logit_scale_kind: Annotated[str, one_of(SCALE_KINDS, "logit scale kind")] = "vector"
    s_uv: bool = True  # learned scale of the MLP's hidden units, times sqrt(n_embd)
    scale_trick: bool = True  # store alpha, s_qk and s_z at 1/sqrt(n_embd), see Scale
    norm_mode: Annotated[str, one_of(NORM_MODES, "norm mode")] = "baseline"  # rule for the divisor of the residual step
    norm_decay: Annotated[float, Field(ge=0, le=1)] = 0.9  # decay of norm mode `ema`
    norm_every: Count = 1  # ghost norms: renormalize after every norm_every sublayers and after the last
    norm_probability: Annotated[float, Field(gt=0, le=1)] = 1.0  # stochastic norms: of renormalizing in training

    # GPT only; no effect under the other rules:
    embedding_norm: bool = True  # normalize the embedding output
    norm_gain: bool = False  # learned gain in each RMSNorm of the residual stream

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
        for name in ("norm_mode", "norm_every", "norm_probability", "alpha_final"):
            if not self.on_sphere and getattr(self, name) != type(self).model_fields[name].default:
                raise invalid_setting(f"{name} needs a residual rule on the sphere, not `add`", name, "residual")
        return self
