"""Models of the official code: nGPT and its GPT baseline of NVIDIA/ngpt, and nanochat's GPT."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ngpt.config.base import ConfigError
from ngpt.conversion.layout import Layout, Target, convert_state, flipped
from ngpt.conversion.weights_file import WeightsFile, read_json
from ngpt.model.gpt import GPT

EMBEDDING_AND_HEAD = {
    "transformer.wte.weight": Target("wte.weight", "V D"),
    "lm_head.weight": Target("lm_head.weight", "V D"),
}
NVIDIA_MATRICES = {
    "query.weight": Target("attention.query.weight", "D D"),
    "key.weight": Target("attention.key.weight", "D D"),
    "value.weight": Target("attention.value.weight", "D D"),
    "att_c_proj.weight": Target("attention.out.weight", "D D"),
    "c_fc.weight": Target("mlp.up.weight", "2F D"),
    "mlp_c_proj.weight": Target("mlp.down.weight", "D F"),
}
NVIDIA_NGPT = Layout(
    "NVIDIA's nGPT",
    EMBEDDING_AND_HEAD | {"sz": Target("s_z.stored", "V")},
    NVIDIA_MATRICES
    | {
        "attn_alpha": Target("attention_residual.alpha.stored", "D"),
        "mlp_alpha": Target("mlp_residual.alpha.stored", "D"),
        "sqk": Target("attention.s_qk.stored", "D"),
        "suv": Target("mlp.s_uv.stored", "2F"),
    },
    {"residual": "lerp", "alpha": 0.05, "mlp": "swiglu"},
)
NVIDIA_GPT = Layout(
    "NVIDIA's GPT baseline",
    EMBEDDING_AND_HEAD | {"rmsnorm_f.weight": Target("final_norm.weight", "D")},
    NVIDIA_MATRICES
    | {
        "rmsnorm_att.weight": Target("attention_norm.weight", "D"),
        "rmsnorm_mlp.weight": Target("mlp_norm.weight", "D"),
    },
    {"residual": "add", "mlp": "swiglu", "qk_norm": False, "embedding_norm": False, "norm_gain": True},
)
NANOCHAT = Layout(
    "nanochat's GPT",
    EMBEDDING_AND_HEAD,
    {
        "attn.c_q.weight": Target("attention.query.weight", "D D"),
        "attn.c_k.weight": Target("attention.key.weight", "C D"),
        "attn.c_v.weight": Target("attention.value.weight", "C D"),
        "attn.c_proj.weight": Target("attention.out.weight", "D D"),
        "mlp.c_fc.weight": Target("mlp.up.weight", "F D"),
        "mlp.c_proj.weight": Target("mlp.down.weight", "D F"),
    },
    {"residual": "add", "mlp": "relu2", "softcap": 15.0, "rope": "rotary"},
    changes={"attn.c_q.weight": flipped, "attn.c_k.weight": flipped},
)


def from_nvidia_ngpt(state: Mapping[str, Tensor], *, n_head: int, block_size: int, rope: str = "nvidia") -> GPT:
    """Builds the model of a state dict of NVIDIA/ngpt (at ed19eb2), nGPT or its GPT baseline depending on the keys.

    Scales keep their stored values: the effective value is stored * init * sqrt(n_embd), with init 0.05 for alpha and 1
    for s_qk and s_z; s_uv is stored as is. Weights are converted to float32 and not projected. Raises ConfigError that
    lists each weight that is unknown, missing or of the wrong shape, and each impossible setting.

    Args:
        state: official name -> tensor; prefixes of torch.compile and DDP are stripped. Sizes come from the shapes.
        n_head: must match the training run; a wrong divisor of n_embd loads without error but computes nonsense.
        rope: `nvidia` for the repository's own RoPE (its issue 10), `rotary` for a fork with a true rotation.
    """
    layout = NVIDIA_GPT if any("rmsnorm_" in name for name in state) else NVIDIA_NGPT
    return convert_state(state, layout, {"n_head": n_head, "block_size": block_size, "rope": rope})


def from_nanochat(state: Mapping[str, Tensor], *, n_head: int, n_kv_head: int, block_size: int) -> GPT:
    """Builds the model of a state dict of karpathy/nanochat as of November 2025 (gpt.py at a83646e).

    nanochat's RoPE pairs the two halves of a head and rotates by -theta; `GPT` pairs adjacent channels and rotates by
    +theta. Reordering the rows of the query and key matrices makes them equivalent. nanochat rounds its sine and cosine
    tables to bfloat16, `GPT` keeps float32. Later versions have more weights (resid_lambdas, ...), which are rejected
    with an error that names them. `n_head` counts query heads, `n_kv_head` key/value heads; `state` and errors are as
    in `from_nvidia_ngpt`.
    """
    return convert_state(state, NANOCHAT, {"n_head": n_head, "n_kv_head": n_kv_head, "block_size": block_size})


def nvidia_settings(file: WeightsFile) -> dict[str, Any]:
    """Returns the settings in the `ckpt.pt` of NVIDIA/ngpt's train.py; a bare state dict has none."""
    args = file.entries.get("model_args")
    if not isinstance(args, Mapping):
        return {}
    scale, width = args.get("base_scale"), args.get("n_embd")
    if args.get("use_nGPT") and isinstance(scale, float) and isinstance(width, int) and width > 0:
        right = width**-0.5
        if not math.isclose(scale, right, rel_tol=1e-6):
            raise ConfigError(f"base_scale is {scale}, only 1/sqrt(n_embd) = {right} can be converted")
    known = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    return {name: args[name] for name in known if name in args}


def nanochat_settings(file: WeightsFile) -> dict[str, Any]:
    """Returns the settings in the `meta_STEP.json` beside nanochat's `model_STEP.pt`, if it exists."""
    meta = file.path.with_name(file.path.name.replace("model_", "meta_", 1)).with_suffix(".json")
    if meta == file.path or not meta.exists():
        return {}
    settings = read_json(meta).get("model_config")
    if not isinstance(settings, dict):
        raise ConfigError(f"{meta.name}: cannot read model_config")
    known = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len")
    if unknown := [name for name in settings if name not in known]:
        raise ConfigError(f"{meta.name}: nanochat as of November 2025 has no setting {', '.join(unknown)}")
    return {"block_size" if name == "sequence_len" else name: value for name, value in settings.items()}
