"""Models of Hugging Face's transformers: the Llama family and NanoChat, where ours computes exactly the same."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, printable
from ngpt.conversion.exported import MODEL_TYPE, from_exported
from ngpt.conversion.formats import refusal
from ngpt.conversion.layout import Layout, Target, convert_state, flipped, interleaved, strip_prefixes
from ngpt.conversion.weights_file import CONFIG_FILE
from ngpt.model.gpt import GPT

HEAD = {"lm_head.weight": Target("lm_head.weight", "V D")}
EMBEDDING = {"model.embed_tokens.weight": Target("wte.weight", "V D")}
ATTENTION = {
    "self_attn.q_proj.weight": Target("attention.query.weight", "D D"),
    "self_attn.k_proj.weight": Target("attention.key.weight", "C D"),
    "self_attn.v_proj.weight": Target("attention.value.weight", "C D"),
    "self_attn.o_proj.weight": Target("attention.out.weight", "D D"),
}
COUNTS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    "max_position_embeddings",
)
BUFFERS = r"rotary_emb\.inv_freq$"  # computed from the settings; older versions save them
LLAMA = Layout(
    "Hugging Face's Llama",
    {**EMBEDDING, "model.norm.weight": Target("final_norm.weight", "D"), **HEAD},
    ATTENTION
    | {
        "input_layernorm.weight": Target("attention_norm.weight", "D"),
        "post_attention_layernorm.weight": Target("mlp_norm.weight", "D"),
        "mlp.up_proj.weight": Target("mlp.up.weight", "F D", part=0),
        "mlp.gate_proj.weight": Target("mlp.up.weight", "F D", part=1),
        "mlp.down_proj.weight": Target("mlp.down.weight", "D F"),
    },
    {"residual": "add", "mlp": "swiglu", "qk_norm": False, "embedding_norm": False, "norm_gain": True},
    prefix="model.layers.",
    changes={"q_proj.weight": interleaved, "k_proj.weight": interleaved},
    ignored=BUFFERS,
)
QWEN2 = replace(
    LLAMA,
    title="Hugging Face's Qwen2",
    layer={
        **LLAMA.layer,
        "self_attn.q_proj.bias": Target("attention.query.bias", "D"),
        "self_attn.k_proj.bias": Target("attention.key.bias", "C"),
        "self_attn.v_proj.bias": Target("attention.value.bias", "C"),
    },
    settings={**LLAMA.settings, "qkv_bias": True},
    changes={**LLAMA.changes, "q_proj.bias": interleaved, "k_proj.bias": interleaved},
)
NANOCHAT = Layout(
    "Hugging Face's NanoChat",
    {**EMBEDDING, **HEAD},
    ATTENTION | {"mlp.fc1.weight": Target("mlp.up.weight", "F D"), "mlp.fc2.weight": Target("mlp.down.weight", "D F")},
    {"residual": "add", "mlp": "relu2"},
    prefix="model.layers.",
    changes={"q_proj.weight": flipped, "k_proj.weight": flipped},
    ignored=BUFFERS,
)
# By type of model: its layout, and the settings that transformers uses where config.json leaves them out.
TYPES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "llama": (LLAMA, {"hidden_act": "silu", "max_position_embeddings": 2048}),
    "mistral": (
        replace(LLAMA, title="Hugging Face's Mistral"),
        {
            "hidden_act": "silu",
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": (QWEN2, {"hidden_act": "silu", "max_position_embeddings": 32_768, "num_key_value_heads": 32}),
    "nanochat": (
        NANOCHAT,
        {"hidden_act": "relu2", "max_position_embeddings": 2048, "final_logit_softcapping": 15.0},
    ),
}
# What the models of other types have and ours has not.
LACKS = {
    "qwen3": "gains in the norms of queries and keys",
    "gemma": "gates with GELU",
    "gemma2": "gates with GELU, norms after the sublayers",
    "gemma3_text": "gates with GELU, norms after the sublayers",
    "olmo": "LayerNorm",
    "olmo2": "norms after the sublayers",
    "gpt_neox": "LayerNorm, biases, GELU, partial rotation",
    "opt": "learned positions, LayerNorm, biases",
    "bloom": "ALiBi, LayerNorm, biases, GELU",
    "phi": "LayerNorm, biases, GELU, partial rotation",
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
}


def from_huggingface(state: Mapping[str, Tensor], config: Mapping[str, Any], *, block_size: int | None = None) -> GPT:
    """Builds the model of a state dict of transformers: types llama, mistral, qwen2, nanochat, and our own ngpt.

    Its RoPE pairs the two halves of a head, `GPT` pairs adjacent channels; reordering the rows of the query and key
    matrices makes them equivalent. Raises ConfigError in one line if the type or a setting has no equivalent here, and
    ConfigError that lists the weights that do not fit.

    Args:
        state: name -> tensor; sizes come from the shapes, weights become float32.
        config: the content of config.json, of any version.
        block_size: context in tokens; default: `max_position_embeddings`, at most the sliding window.
    """
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        return from_exported(state, config, block_size=block_size)
    known = TYPES.get(kind) if isinstance(kind, str) else None
    title = f"a Hugging Face model of type {printable(repr(kind))}"
    if known is None:
        if isinstance(kind, str) and kind in LACKS:
            raise ConfigError(refusal(title, LACKS[kind]))
        raise ConfigError(f"{title} cannot be converted, only the types {', '.join((*TYPES, MODEL_TYPE))} can")
    layout, defaults = known
    config = {"rms_norm_eps": 1e-6, **defaults, **config}
    for name in COUNTS:
        if (value := config.get(name)) is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{CONFIG_FILE}: {name} is {printable(repr(value))}, not a whole number")
    if not isinstance(config["rms_norm_eps"], float):
        raise ConfigError(f"{CONFIG_FILE}: rms_norm_eps is {printable(repr(config['rms_norm_eps']))}, not a number")
    if lacks := list(_lacks(config, defaults)):
        raise ConfigError(refusal(title, ", ".join(lacks)))
    weights = _full_names(strip_prefixes(state)[0])
    if config.get("tie_word_embeddings", False):
        weights = _without_tied_head(weights)
        layout = replace(layout, top={name: target for name, target in layout.top.items() if name not in HEAD})
    return convert_state(weights, layout, _settings(config, block_size))


def _settings(config: Mapping[str, Any], block_size: int | None) -> dict[str, Any]:
    """Returns the settings of our model that the shapes of the weights do not tell."""
    rope, limit = _rope(config), config.get("max_position_embeddings")
    settings: dict[str, Any] = {
        "rope": "rotary",
        "n_head": config.get("num_attention_heads"),
        "n_kv_head": config.get("num_key_value_heads"),
        "tied": config.get("tie_word_embeddings", False),
        "norm_eps": config["rms_norm_eps"],
        "rope_base": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "softcap": config.get("final_logit_softcapping"),
    }
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    if config["model_type"] == "qwen2" and config.get("use_sliding_window"):  # in its upper layers
        window = config.get("sliding_window", 4096)
    if window is not None:
        if block_size is not None and block_size > window:
            raise ConfigError(f"its attention sees the last {window} tokens only: --block-size can be at most that")
        limit = min(limit, window) if isinstance(limit, int) else window
    settings["block_size"] = limit if block_size is None else block_size
    kind = _rope_type(rope)
    if kind != "default":
        settings |= {"rope_scaling": kind, "rope_factor": rope.get("factor")}
    if kind == "llama3":
        settings["rope_trained"] = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    return settings


def _lacks(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yields the settings of a model for which ours has no equivalent."""
    rope, heads, width = _rope(config), config.get("num_attention_heads"), config.get("hidden_size")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            yield f"biases ({name})"
    if config["hidden_act"] not in (defaults["hidden_act"], {"silu": "swish"}.get(defaults["hidden_act"])):
        yield f"activation {printable(str(config['hidden_act']))}"
    if (head_dim := config.get("head_dim")) is not None and heads and width and head_dim * heads != width:
        yield f"heads of another width ({head_dim}) than hidden_size / num_attention_heads ({width}/{heads})"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial rotation (partial_rotary_factor)"
    kind = _rope_type(rope)
    factors = (rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0))
    if kind not in ("default", "linear", "llama3"):
        yield f"RoPE scaling {printable(repr(kind))} as transformers computes it"
    elif kind == "llama3" and factors != (1.0, 4.0):
        yield f"RoPE scaling 'llama3' with frequency factors {factors}"
    if config.get("quantization_config"):
        yield "quantized weights"


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the settings of RoPE: `rope_parameters` of version 5, `rope_scaling` before."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"its rope_parameters are not settings by name: {printable(repr(rope))}")
    return rope


def _rope_type(rope: Mapping[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type", "default"))


def _full_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds the prefix that the weights have in a model with a head, to those that were saved without."""
    if any(name.startswith("model.") for name in weights):
        return dict(weights)
    return {name if name in HEAD else f"model.{name}": weight for name, weight in weights.items()}


def _without_tied_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ConfigError("it states tie_word_embeddings, but lm_head.weight differs from the embedding")
    return {name: weight for name, weight in weights.items() if name not in HEAD}
