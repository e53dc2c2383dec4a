"""Models of lucidrains' nGPT-pytorch (0.1 and 0.2): the class `nGPT`."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, Problem
from ngpt.conversion.layout import Layout, Target, convert_state, has_float_values, strip_prefixes
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.norm import l2_normalize

ORIGINAL = ".parametrizations.weight.original"  # of a weight that is normalized whenever it is used
FREQUENCIES = "rotary_embed.freqs"
HEAD = "to_logits.linear.weight"


def _square_root(stored: Tensor, _: ModelConfig) -> Tensor:
    """Scales of queries: theirs multiplies q by stored * n_embd, ours q and k by stored * sqrt(n_embd) each."""
    return stored.sqrt()


LUCIDRAINS = Layout(
    "lucidrains' nGPT",
    {
        "token_embed.linear.weight": Target("wte.weight", "V D"),
        HEAD: Target("lm_head.weight", "V D"),
        "logit_scale.scale": Target("s_z.stored", "V"),
    },
    {
        "0.fn.to_q.linear.weight": Target("attention.query.weight", "D D"),
        "0.fn.to_k.linear.weight": Target("attention.key.weight", "D D"),
        "0.fn.to_v.linear.weight": Target("attention.value.weight", "D D"),
        "0.fn.to_out.linear.weight": Target("attention.out.weight", "D D"),
        "0.fn.qk_scale.scale": Target("attention.s_qk.stored", "D"),
        "0.branch_scale.scale": Target("attention_residual.alpha.stored", "D"),
        "1.fn.to_hidden.linear.weight": Target("mlp.up.weight", "F D", part=0),
        "1.fn.to_gate.linear.weight": Target("mlp.up.weight", "F D", part=1),
        "1.fn.to_out.linear.weight": Target("mlp.down.weight", "D F"),
        # Ours multiplies both scales by sqrt(n_embd), theirs the gate's only. The norm of the branch undoes that.
        "1.fn.hidden_scale.scale": Target("mlp.s_uv.stored", "F", part=0),
        "1.fn.gate_scale.scale": Target("mlp.s_uv.stored", "F", part=1),
        "1.branch_scale.scale": Target("mlp_residual.alpha.stored", "D"),
    },
    {"residual": "lerp", "alpha_sign": "free", "mlp": "swiglu", "rope": "rotary"},
    prefix="layers.",
    changes={"qk_scale.scale": _square_root},
)


def from_lucidrains(
    state: Mapping[str, Tensor], *, block_size: int, alpha_init: float | None = None, value_residual: bool = True
) -> GPT:
    """Builds the model of a state dict of `nGPT_pytorch.nGPT`, with or without `manual_norm_weights`.

    A state dict does not tell what the scales start from, nor other arguments of `nGPT`: those not listed here must
    have had their defaults (attn_norm_qk, causal, norm_eps, num_hyperspheres, s_*_init, s_*_scale, alpha_*_scale).
    Weights that the library normalizes when it uses them are normalized here. Raises ConfigError that lists each weight
    that does not fit.

    Args:
        state: name -> tensor; sizes come from the shapes, and the width of a head from the rotary frequencies.
        block_size: context in tokens, which the library does not limit.
        alpha_init: its `alpha_init`; None: its default, 1 / depth.
        value_residual: its `add_value_residual`.
    """
    weights, problems = strip_prefixes(state)
    weights = {name.replace(ORIGINAL, ".weight"): _normalized(name, weight) for name, weight in weights.items()}
    frequencies = weights.pop(FREQUENCIES, None)
    if frequencies is None or not has_float_values(frequencies) or frequencies.ndim != 1 or not len(frequencies):
        raise ConfigError([*problems, Problem((FREQUENCIES,), "missing weight, which tells the width of a head")])
    width = 2 * len(frequencies)
    expected = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if not torch.allclose(frequencies.double(), expected, rtol=1e-2 if frequencies.itemsize == 2 else 1e-5):
        problems.append(Problem((FREQUENCIES,), "other frequencies than those of RoPE with base 10,000"))
    for name, weight in weights.items():
        if name.endswith("qk_scale.scale") and has_float_values(weight) and (weight < 0).any():
            problems.append(Problem((name,), "negative scale, which the squared s_qk here cannot express"))
    if problems:
        raise ConfigError(problems)
    layers = {number for name in weights if (number := LUCIDRAINS.layer_of(name)) is not None}
    sizes = {weight.numel() for name, weight in weights.items() if name.endswith("0.branch_scale.scale")}
    settings = {
        "block_size": block_size,
        "n_head": max(1, max(sizes, default=width) // width),
        "tied": HEAD not in weights,
        "alpha": 1 / max(1, len(layers)) if alpha_init is None else alpha_init,
        "value_residual": 0.5 if value_residual else 0.0,
    }
    tied_top = {name: target for name, target in LUCIDRAINS.top.items() if name != HEAD}
    return convert_state(weights, replace(LUCIDRAINS, top=tied_top) if settings["tied"] else LUCIDRAINS, settings)


def _normalized(name: str, weight: Tensor) -> Tensor:
    """Returns a weight as the library uses it: of unit length along the model's width."""
    if not name.endswith(ORIGINAL) or not has_float_values(weight) or weight.ndim != 2:
        return weight
    return l2_normalize(weight, 0 if ".to_out." in name else 1)
