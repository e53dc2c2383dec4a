"""Which class of transformers computes exactly what a model computes, with its config and its weights."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import ConfigError
from ngpt.conversion.exported import exported_settings, exported_weights
from ngpt.conversion.huggingface import LLAMA, NANOCHAT, QWEN2
from ngpt.conversion.layout import Layout, flipped, interleaved
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.norm import NORM_MODES
from ngpt.model.residual import RESIDUAL_RULES

REMOTE_CODE = "modeling_ngpt.py"
EXPORTED_RULES = ("lerp", "slerp", "add_normalize", "add")
EXPORTED_NORM_MODES = ("baseline", "dotprod", "ema")
EXACT_SCALINGS = ("none", "linear", "llama3")  # of RoPE, which transformers computes in the same way
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """One class of transformers for several models.

    `fits` are the settings that a model must have; those that it does not name may have any value. Without a `layout`,
    the class is our own, whose weights have their own names.
    """

    title: str
    model_class: str
    config_class: str
    fits: Mapping[str, Any]
    layout: Layout | None = None

    @property
    def is_remote_code(self) -> bool:
        """Whether the exported folder has the code of the model, which transformers runs only if it is trusted."""
        return self.layout is None


GPT_ALIKE = {"residual": "add", "softmax_scale": None, "rope": "rotary", "value_residual": 0.0}
LLAMA_ALIKE = GPT_ALIKE | {"mlp": "swiglu", "qk_norm": False, "embedding_norm": False, "norm_gain": True}
LLAMA_ALIKE |= {"softcap": None}
NANOCHAT_ALIKE = GPT_ALIKE | {"mlp": "relu2", "qk_norm": True, "embedding_norm": True, "norm_gain": False}
FAMILIES = (
    Family("NanoChat", "NanoChatForCausalLM", "NanoChatConfig", NANOCHAT_ALIKE | {"qkv_bias": False}, NANOCHAT),
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", LLAMA_ALIKE | {"qkv_bias": False}, LLAMA),
    Family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", LLAMA_ALIKE | {"qkv_bias": True}, QWEN2),
)
NGPT = Family("nGPT", "NGPTForCausalLM", "NGPTConfig", {})


def family_of(cfg: ModelConfig) -> Family:
    """Returns the class for a model: one of transformers' own where it fits exactly, else ours.

    Raises ConfigError if the model has a rule that our code for transformers does not have, as from a plug-in.
    """
    for what, name, known, table in (
        ("residual rule", cfg.residual, EXPORTED_RULES, RESIDUAL_RULES),
        ("norm mode", cfg.norm_mode, EXPORTED_NORM_MODES, NORM_MODES),
    ):
        if name not in known:
            assert name in table
            exported = ", ".join(known)
            raise ConfigError(f"the {what} {name!r} is from a plug-in, so it cannot be exported; {exported} can")
    if cfg.rope_scaling in EXACT_SCALINGS and trained_length(cfg).is_integer():
        for family in FAMILIES:
            if all(getattr(cfg, name) == value for name, value in family.fits.items()):
                return family
    return NGPT


def trained_length(cfg: ModelConfig) -> float:
    """Returns the context length of the original training, in tokens."""
    return cfg.block_size / cfg.rope_factor if cfg.rope_trained is None else float(cfg.rope_trained)


def to_transformers(model: GPT, *, step: int, steps: int, tokens: Mapping[str, Any]) -> tuple[Family, Any]:
    """Returns the family of a model and the same model as an object of transformers, in evaluation mode.

    Args:
        step, steps: the steps trained, of how many; a schedule of alpha depends on them.
        tokens: `bos_token_id`, `eos_token_id` (one, or a list) and `pad_token_id`.

    Raises:
        ConfigError: transformers is missing or too old, or the model cannot be expressed.
    """
    family = family_of(model.cfg)
    transformers = import_transformers()
    no_padding = dict(tokens) | {"pad_token_id": None}  # an embedding would not train its row
    kind: Any
    if family.layout is None:
        from ngpt.export import modeling_ngpt

        config = modeling_ngpt.NGPTConfig(exported_settings(model), step, steps, **no_padding)
        config.auto_map = {
            "AutoConfig": f"modeling_ngpt.{family.config_class}",
            "AutoModelForCausalLM": f"modeling_ngpt.{family.model_class}",
        }
        weights, kind = exported_weights(model), modeling_ngpt.NGPTForCausalLM
    else:
        config = getattr(transformers, family.config_class)(**_config(model.cfg), **no_padding)
        weights, kind = _renamed(model, family.layout), getattr(transformers, family.model_class)
    if model.cfg.tied:
        weights[HEAD] = model.wte.weight
    state = {name: weight.detach().cpu() for name, weight in weights.items()}
    exported, info = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if wrong := [f"{what} {sorted(names)}" for what, names in info.items() if names]:
        raise RuntimeError(f"{family.model_class} does not have the weights of the model: {', '.join(wrong)}")
    exported.generation_config = transformers.GenerationConfig(**tokens)
    return family, exported.eval()


def import_transformers() -> Any:
    """Returns the module; ConfigError if it is missing or too old."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ConfigError("the export needs transformers: pip install 'ngpt-campaign[hf]'") from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        found = f"the export needs transformers 5, not {transformers.__version__}"
        raise ConfigError(f"{found}: pip install 'ngpt-campaign[hf]'")
    return transformers


def _config(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the settings of a GPT by the names of transformers."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_base}
    if cfg.rope_scaling != "none":
        rope |= {"rope_type": cfg.rope_scaling, "factor": cfg.rope_factor}
    if cfg.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = int(trained_length(cfg))
    eps = 1e-6 if cfg.norm_gain else torch.finfo(torch.float32).eps  # torch's default
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.n_embd,
        "intermediate_size": cfg.hidden,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.kv_heads,
        "max_position_embeddings": cfg.block_size,
        "rms_norm_eps": cfg.norm_eps or eps,
        "rope_parameters": rope,
        "tie_word_embeddings": cfg.tied,
    } | ({"final_logit_softcapping": cfg.softcap} if cfg.mlp == "relu2" else {})


def _renamed(model: GPT, layout: Layout) -> dict[str, Tensor]:
    """Returns the weights by the names of a layout: what `ngpt.conversion.layout` does, undone."""
    own, cfg = model.state_dict(), model.cfg
    expected = layout.expected([*range(cfg.n_layer)])
    parts = Counter(target.name for target in expected.values())
    weights = {}
    for name, target in expected.items():
        if name == HEAD and cfg.tied:
            continue
        weight = own[target.name].chunk(parts[target.name])[target.part]
        change = next((change for end, change in layout.changes.items() if name.endswith(end)), None)
        weights[name] = UNDONE[change](weight, cfg) if change else weight
    return {name: weight.contiguous() for name, weight in weights.items()}


def _halves(weight: Tensor, cfg: ModelConfig) -> Tensor:
    """Reorders the rows of each head from adjacent pairs to a RoPE that pairs the two halves of a head."""
    return weight.unflatten(0, (-1, cfg.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _flipped_halves(weight: Tensor, cfg: ModelConfig) -> Tensor:
    """As `_halves`, for a RoPE that rotates by -theta."""
    return weight.unflatten(0, (-1, cfg.head_dim // 2, 2)).transpose(1, 2).flip(1).flatten(0, 2)


UNDONE: dict[Callable[..., Tensor], Callable[[Tensor, ModelConfig], Tensor]] = {
    interleaved: _halves,
    flipped: _flipped_halves,
}
