"""Recognises whose weights a file holds, by their names; also of formats that cannot be converted."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ngpt.config.base import ConfigError, printable
from ngpt.conversion.layout import strip_prefixes
from ngpt.conversion.weights_file import CONFIG_FILE, WeightsFile

GPT2_TYPE = "gpt2"
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of GPT-2's causal mask


@dataclass(frozen=True)
class Format:
    """One format of weights: what it is called, and a pattern that the name of one of its weights matches."""

    title: str
    marker: str
    source: str = ""  # the key of the converter in `ngpt.convert.SOURCES`; empty: there is none
    lacks: str = ""  # what our models lack for it
    advice: str = ""


FORMATS = (
    Format("NVIDIA's nGPT or its GPT baseline", r"transformer\.h\.\d+\.att_c_proj\.weight", "nvidia"),
    Format("nanochat's GPT", r"transformer\.h\.\d+\.attn\.c_q\.weight", "nanochat"),
    Format("lucidrains' nGPT", r"layers\.\d+\.0\.fn\.to_q\.linear\..*", "lucidrains"),
    Format("Hugging Face's Llama family", r"(model\.)?layers\.\d+\.self_attn\.q_proj\.weight", "hf"),
    Format("GPT-2", r"(transformer\.)?h\.\d+\.attn\.c_attn\.weight"),  # its `lacks` depends on the weights
    Format(
        "Meta's Llama",
        r"layers\.\d+\.attention\.wq\.weight",
        advice="convert it to Hugging Face's format first (convert_llama_weights_to_hf.py of transformers)",
    ),
    Format("GPT-NeoX (Pythia)", r"gpt_neox\..*", lacks="LayerNorm, biases, GELU, partial rotation"),
    Format(
        "LitGPT",
        r"transformer\.h\.\d+\.attn\.(attn|qkv)\.weight",
        advice="convert it to Hugging Face's format first (litgpt convert_from_litgpt)",
    ),
    Format("a model of x-transformers", r"(.*\.)?attn_layers\.layers\..*"),
    Format("a LoRA adapter", r".*\.lora_[AB]\..*", advice="merge it into its model first, and give that"),
    Format("a checkpoint of this program", r"blocks\.\d+\.attention\.query\.weight", advice="use it as it is"),
)


def recognise(file: WeightsFile) -> Format | None:
    """Returns the format of a file that can be converted; None if its weights have names of no known format.

    Raises ConfigError in one line that names the format if it is one that cannot be converted.
    """
    weights, _ = strip_prefixes(file.state)
    if (file.config or {}).get("model_type") not in (None, GPT2_TYPE):  # transformers reads the type only
        return next(each for each in FORMATS if each.source == "hf")
    found = next((each for each in FORMATS if any(re.fullmatch(each.marker, name) for name in weights)), None)
    if found is None:
        return None
    if found.title == "GPT-2":
        raise ConfigError(refusal(_gpt2_title(weights), _gpt2_lacks(weights)))
    if found.source == "hf" and file.config is None:
        raise ConfigError(f"{found.title} has its settings in {CONFIG_FILE}, and there is none beside it")
    if not found.source:
        raise ConfigError(refusal(found.title, found.lacks, found.advice))
    return found


def refusal(title: str, lacks: str, advice: str = "") -> str:
    """Returns the line about a model that ours cannot express."""
    reason = advice or (f"GPT and nGPT here have no {lacks}" if lacks else "")
    return f"{title} cannot be converted{reason and f': {reason}'}"


def unknown(names: Collection[str]) -> str:
    """Returns the line about weights whose names are those of no known format."""
    shown = ", ".join(printable(name) for name in list(names)[:3])
    known = ", ".join(each.title for each in FORMATS if each.source)
    return f"no known format: its weights have names like {shown}; known are {known}"


def _gpt2_title(weights: Mapping[str, Tensor]) -> str:
    """Tells nanoGPT from Hugging Face, which stores matrices transposed."""
    matrix = next(weight for name, weight in weights.items() if name.endswith("attn.c_attn.weight"))
    is_linear = matrix.ndim == 2 and matrix.shape[0] == 3 * matrix.shape[1]
    return "nanoGPT's GPT (GPT-2)" if is_linear else "Hugging Face's GPT-2"


def _gpt2_lacks(weights: Mapping[str, Tensor]) -> str:
    has_biases = any(name.endswith(".bias") and not name.endswith(MASKS) for name in weights)
    return f"learned positions (wpe), LayerNorm, GELU{', biases' if has_biases else ''}"
