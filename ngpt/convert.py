"""Converts models trained with the official code: nGPT and its GPT baseline from NVIDIA/ngpt, nanochat's GPT.

python -m ngpt.convert nvidia ckpt.pt --out converted
python -m ngpt.convert nanochat model_021400.pt --tokenizer nanochat.model --out converted

The settings come from the checkpoint (nanochat: from meta_021400.json beside it). A bare state dict needs --n-head and
--block-size (nanochat: also --n-kv-head). Writes `converted/checkpoints/step_0000000`.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ngpt.config.base import ConfigError, Problem, build, flatten, unknown_message
from ngpt.config.visible import visible
from ngpt.data.tokens.tokenizer import parse_spec, tokenizer_vocab_size, with_path
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.rope import ROPE_KINDS
from ngpt.system.cli import ArgumentParser, run_command
from ngpt.training.checkpoint import checkpoint_folders, save_checkpoint

Table = dict[str, tuple[str, str]]  # official name -> name in `GPT`, shape


@dataclass(frozen=True)
class Layout:
    """Weight names and shapes of an official state dict, and the settings that make `GPT` equivalent.

    Sizes: V vocabulary, D width, F hidden width of the MLP, C total width of the keys (n_kv_head * head width).
    """

    title: str
    top: Table
    layer: Table  # names after "transformer.h.N."
    settings: Mapping[str, Any]
    half_split: tuple[str, ...] = ()  # weights for a RoPE that pairs the two halves of a head

    def expected(self, layers: list[int]) -> Table:
        """Returns the weights of a model with these layers."""
        inner = [(n, name, own, shape) for n in layers for name, (own, shape) in self.layer.items()]
        return self.top | {f"transformer.h.{n}.{name}": (f"blocks.{n}.{own}", shape) for n, name, own, shape in inner}


EMBEDDING_AND_HEAD = {"transformer.wte.weight": ("wte.weight", "V D"), "lm_head.weight": ("lm_head.weight", "V D")}
NVIDIA_MATRICES = {
    "query.weight": ("attention.query.weight", "D D"),
    "key.weight": ("attention.key.weight", "D D"),
    "value.weight": ("attention.value.weight", "D D"),
    "att_c_proj.weight": ("attention.out.weight", "D D"),
    "c_fc.weight": ("mlp.up.weight", "2F D"),
    "mlp_c_proj.weight": ("mlp.down.weight", "D F"),
}
NVIDIA_NGPT = Layout(
    "NVIDIA's nGPT",
    EMBEDDING_AND_HEAD | {"sz": ("s_z.stored", "V")},
    NVIDIA_MATRICES
    | {
        "attn_alpha": ("attention_residual.alpha.stored", "D"),
        "mlp_alpha": ("mlp_residual.alpha.stored", "D"),
        "sqk": ("attention.s_qk.stored", "D"),
        "suv": ("mlp.s_uv.stored", "2F"),
    },
    {"residual": "lerp", "alpha": 0.05, "mlp": "swiglu"},
)
NVIDIA_GPT = Layout(
    "NVIDIA's GPT baseline",
    EMBEDDING_AND_HEAD | {"rmsnorm_f.weight": ("final_norm.weight", "D")},
    NVIDIA_MATRICES
    | {"rmsnorm_att.weight": ("attention_norm.weight", "D"), "rmsnorm_mlp.weight": ("mlp_norm.weight", "D")},
    {"residual": "add", "mlp": "swiglu", "qk_norm": False, "embedding_norm": False, "norm_gain": True},
)
NANOCHAT = Layout(
    "nanochat's GPT",
    EMBEDDING_AND_HEAD,
    {
        "attn.c_q.weight": ("attention.query.weight", "D D"),
        "attn.c_k.weight": ("attention.key.weight", "C D"),
        "attn.c_v.weight": ("attention.value.weight", "C D"),
        "attn.c_proj.weight": ("attention.out.weight", "D D"),
        "mlp.c_fc.weight": ("mlp.up.weight", "F D"),
        "mlp.c_proj.weight": ("mlp.down.weight", "D F"),
    },
    {"residual": "add", "mlp": "relu2", "softcap": 15.0, "rope": "rotary"},
    half_split=("attn.c_q.weight", "attn.c_k.weight"),
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
    return _convert(state, layout, {"n_head": n_head, "block_size": block_size, "rope": rope})


def from_nanochat(state: Mapping[str, Tensor], *, n_head: int, n_kv_head: int, block_size: int) -> GPT:
    """Builds the model of a state dict of karpathy/nanochat as of November 2025 (gpt.py at a83646e).

    nanochat's RoPE pairs the two halves of a head and rotates by -theta; `GPT` pairs adjacent channels and rotates by
    +theta. Reordering the rows of the query and key matrices makes them equivalent. nanochat rounds its sine and cosine
    tables to bfloat16, `GPT` keeps float32. Later versions have more weights (resid_lambdas, ...), which are rejected
    with an error that names them. `n_head` counts query heads, `n_kv_head` key/value heads; `state` and errors are as
    in `from_nvidia_ngpt`.
    """
    return _convert(state, NANOCHAT, {"n_head": n_head, "n_kv_head": n_kv_head, "block_size": block_size})


def _convert(state: Mapping[str, Tensor], layout: Layout, settings: Mapping[str, Any]) -> GPT:
    weights, problems = _strip_prefixes(state)
    layers = sorted({int(match[1]) for name in weights if (match := re.match(r"transformer\.h\.(\d+)\.", name))})
    if not layers:
        problems.append(Problem((), f"no layer of {layout.title} found: its names start with transformer.h.0."))
    elif gaps := sorted({*range(layers[-1])} - {*layers}):
        present = ", ".join(map(str, layers))
        problems.append(Problem((f"transformer.h.{gaps[0]}",), f"missing layer; present layers: {present}"))
    expected = layout.expected(layers)
    problems += _wrong_names(weights, expected, layout)
    sizes = _sizes(weights, expected)
    read = {"n_layer": len(layers) or 1, "vocab_size": sizes.get("V"), "n_embd": sizes.get("D")}
    if "D" in sizes and "F" in sizes:
        read["mlp_ratio"] = sizes["F"] / sizes["D"]
    cfg = _config({**layout.settings, **settings, **read}, problems)
    if cfg is not None:
        sizes["C"] = cfg.kv_heads * cfg.head_dim
    for name, (_, symbols) in expected.items():
        if name in weights and sizes.keys() >= {*symbols.split()}:
            shape, right = tuple(weights[name].shape), tuple(sizes[symbol] for symbol in symbols.split())
            if shape != right:
                problems.append(Problem((name,), f"shape {shape}, expected {right}"))
    if problems or cfg is None:
        raise ConfigError(problems)
    for name in weights:
        if name.endswith(layout.half_split):
            weights[name] = _interleave(weights[name], cfg.head_dim)
    model = GPT(cfg)
    model.load_state_dict({own: weights[name] for name, (own, _) in expected.items()})
    return model


def _interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of each head from halves (x1, x2) to adjacent pairs (x2, x1), which rotate by +theta."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).flip(1).transpose(1, 2).flatten(0, 2)


def _strip_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Problem]]:
    """Strips the prefixes of torch.compile (`_orig_mod.`) and DDP (`module.`); reports names that then collide."""
    names = {full_name: re.sub(r"^((_orig_mod|module)\.)+", "", full_name) for full_name in state}
    duplicates = [name for name, count in Counter(names.values()).items() for _ in range(count - 1)]
    problems = [Problem((name,), "is given twice, with and without a prefix") for name in duplicates]
    return {names[full_name]: weight for full_name, weight in state.items()}, problems


def _wrong_names(weights: Mapping[str, Tensor], expected: Table, layout: Layout) -> list[Problem]:
    problems = []
    for name in (name for name in weights if name not in expected):
        match = re.search(r"\.h\.(\d+)\.", name)
        candidates = layout.expected([int(match[1])] if match else [])
        near = get_close_matches(name, list(candidates), n=1, cutoff=0.8)
        hint = f", did you mean '{near[0]}'?" if near else ""
        problems.append(Problem((name,), f"unknown weight, {layout.title} has no weight of this name{hint}"))
    missing = [name for name in expected if name not in weights]
    return problems + [Problem((name,), f"missing weight of {layout.title}") for name in missing]


def _sizes(weights: Mapping[str, Tensor], expected: Table) -> dict[str, int]:
    """Infers V, D, F and 2F by majority vote over the weights, so that a single wrong shape is reported as such."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, (_, shape) in expected.items():
        symbols = shape.split()
        if name in weights and weights[name].ndim == len(symbols):
            for symbol, size in zip(symbols, weights[name].shape, strict=True):
                votes[symbol[-1]][size // 2 if symbol == "2F" else size] += 1
    sizes = {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items() if symbol != "C"}
    return sizes | {f"2{symbol}": 2 * size for symbol, size in sizes.items() if symbol == "F"}


def _config(settings: dict[str, Any], problems: list[Problem]) -> ModelConfig | None:
    """Builds the config; returns None if the width is unknown or, after adding to `problems`, if it is invalid."""
    if settings["rope"] not in ROPE_KINDS:  # checked here, since `build` would then not report problems with the heads
        problems.append(Problem(("rope",), unknown_message("rope", settings["rope"], ROPE_KINDS)))
        settings["rope"] = "rotary"
    if settings["n_embd"] is None:
        return None
    try:
        return build(ModelConfig, settings)
    except ConfigError as error:
        problems += error.problems
        return None


def _read_nvidia(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Reads weights and settings from the `ckpt.pt` of NVIDIA/ngpt's train.py; a bare state dict has no settings."""
    loaded = _load(path)
    if not isinstance(loaded.get("model"), Mapping):
        return loaded, {}
    args = loaded.get("model_args", {})
    scale, right = args.get("base_scale"), args.get("n_embd", 1) ** -0.5
    if args.get("use_nGPT") and scale is not None and not math.isclose(scale, right, rel_tol=1e-6):
        raise ConfigError(f"{path}: base_scale is {scale}, only 1/sqrt(n_embd) = {right} can be converted")
    known = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    return loaded["model"], {name: args[name] for name in known if name in args}


def _read_nanochat(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Reads weights from nanochat's `model_STEP.pt` and, if it exists, settings from `meta_STEP.json` beside it."""
    state = _load(path)
    meta = path.with_name(path.name.replace("model_", "meta_", 1)).with_suffix(".json")
    if meta == path or not meta.exists():
        return state, {}
    try:
        settings = json.loads(meta.read_text())["model_config"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{meta}: cannot read model_config: {error!r}") from None
    known = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len")
    if unknown := [name for name, _ in settings if name not in known]:
        raise ConfigError(f"{meta}: nanochat as of November 2025 has no setting {', '.join(unknown)}")
    return state, {"block_size" if name == "sequence_len" else name: value for name, value in settings}


def _load(path: Path) -> Mapping[str, Any]:
    # NVIDIA's checkpoints contain NumPy's random state, an array that NumPy 1 pickled under another module name.
    new = np.empty(0).__reduce__()[0]
    numbers = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), new, (new, "numpy.core.multiarray._reconstruct")]
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(numbers):
            loaded = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # which error is raised for a non-pickle depends on its first bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{path} is not a checkpoint that can be read safely: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, not weights by name")
    return loaded


SOURCES = {"nvidia": (_read_nvidia, from_nvidia_ngpt), "nanochat": (_read_nanochat, from_nanochat)}


def convert(source: str, path: Path, *, out: Path, tokenizer: str, options: Mapping[str, Any]) -> Path:
    """Converts an official checkpoint file into `out/checkpoints/step_0000000` and returns that folder.

    Raises ConfigError if the file is invalid or inconsistent with itself, the tokenizer or the options, and OSError if
    it cannot be read or the checkpoint cannot be written.

    Args:
        source: a key of `SOURCES`.
        tokenizer: the model's tokenizer, such as `gpt2` or `PATH.model`; saved in the checkpoint's identity.
        options: keyword arguments of the source's build function; None values are read from the file.
    """
    root = out / "checkpoints"
    if checkpoint_folders(root):
        raise ConfigError(f"{out} already contains checkpoints, choose another folder")
    read, build_model = SOURCES[source]
    state, file_settings = read(path)
    settings = {name: file_settings.get(name) if value is None else value for name, value in options.items()}
    if missing := [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is None]:
        raise ConfigError(f"{path} does not state all settings of the model: give {' and '.join(missing)}")
    model = build_model(state, **settings)
    values = flatten(model.cfg)
    stated = file_settings.items()
    if mismatches := [f"{name} is {value}, not {values[name]}" for name, value in stated if value != values[name]]:
        raise ConfigError(f"{path} does not match its weights or the options: it states {', '.join(mismatches)}")
    identity = {f"model.{name}": value for name, value in values.items()}
    identity["data.tokenizer"] = _tokenizer_spec(tokenizer, values["vocab_size"])
    return save_checkpoint(root, model=model, state={}, step=0, val_loss=None, identity=identity, keep_last=1)


def _tokenizer_spec(tokenizer: str, vocab_size: int) -> str:
    """Returns the spec with an absolute path, so that the checkpoint works from any folder."""
    if parse_spec(tokenizer)[0] == "sentencepiece":
        raise ConfigError(f"{tokenizer} would be trained on a corpus; an official model needs its own, such as gpt2")
    if (needed := tokenizer_vocab_size(tokenizer)) > vocab_size:
        raise ConfigError(f"{tokenizer} has {needed} tokens, the model has {vocab_size}")
    return with_path(tokenizer, Path.resolve)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = ArgumentParser(
        prog="python -m ngpt.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="|".join(SOURCES))
    nvidia, nanochat = map(sources.add_parser, SOURCES)
    for each in (nvidia, nanochat):
        each.add_argument("checkpoint", type=Path, metavar="CKPT.pt")
        each.add_argument("--n-head", type=int, metavar="N", help="heads; default: as in the checkpoint")
        each.add_argument("--block-size", type=int, metavar="T", help="context; default: as in the checkpoint")
        each.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    nvidia.add_argument("--rope", default="nvidia", choices=ROPE_KINDS, help="default: nvidia")
    nvidia.add_argument("--tokenizer", default="gpt2", metavar="T", help="as for python -m ngpt.data; default: gpt2")
    nanochat.add_argument("--n-kv-head", type=int, metavar="G", help="key/value heads; default: as in the checkpoint")
    nanochat.add_argument("--tokenizer", required=True, metavar="T", help="as for python -m ngpt.data")
    options = vars(parser.parse_args(arguments))
    source, path, out, tokenizer = map(options.pop, ("source", "checkpoint", "out", "tokenizer"))

    def command() -> int:
        print(visible(convert(source, path, out=out, tokenizer=tokenizer, options=options)))
        return 0

    return run_command(command, path=out)


if __name__ == "__main__":
    sys.exit(main())
