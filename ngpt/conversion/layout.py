"""Builds `GPT` from a state dict of another program, given where each weight belongs; reports all that does not fit."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, Problem, build, unknown_message
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.model.rope import ROPE_KINDS

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Target(NamedTuple):
    """Where a weight belongs: the name in `GPT`, its shape in the symbols of `Layout`, and which part of the rows."""

    name: str
    shape: str
    part: int = 0


Table = Mapping[str, Target]  # by official name
Change = Callable[[Tensor, ModelConfig], Tensor]


@dataclass(frozen=True)
class Layout:
    """Weight names and shapes of an official state dict, and the settings that make `GPT` equivalent.

    Sizes: V vocabulary, D width, F hidden width of the MLP, C total width of the keys (n_kv_head * head width).
    """

    title: str
    top: Table
    layer: Table  # names after the prefix and the number of the layer
    settings: Mapping[str, Any]
    prefix: str = "transformer.h."
    changes: Mapping[str, Change] = field(default_factory=dict)  # of a weight's values, by the end of its name
    ignored: str = r"(?!)"  # pattern of the buffers that are no weights

    def expected(self, layers: list[int]) -> dict[str, Target]:
        """Returns the weights of a model with these layers."""
        inner = [(n, name, target) for n in layers for name, target in self.layer.items()]
        named = {f"{self.prefix}{n}.{name}": t._replace(name=f"blocks.{n}.{t.name}") for n, name, t in inner}
        return {**self.top, **named}

    def layer_of(self, name: str) -> int | None:
        """Returns the number of the layer that a weight belongs to."""
        match = re.match(rf"{re.escape(self.prefix)}(\d+)\.", name)
        return int(match[1]) if match else None


def convert_state(state: Mapping[str, Tensor], layout: Layout, settings: Mapping[str, Any]) -> GPT:
    """Builds the model of a state dict; ConfigError lists each weight and each setting that does not fit.

    Prefixes of torch.compile and DDP are stripped, and sizes are read off the shapes. Weights become float32.

    Args:
        settings: of `ModelConfig`, in addition to those of the layout and those that the shapes tell.
    """
    weights, problems = strip_prefixes(state)
    weights = {name: weight for name, weight in weights.items() if not re.search(layout.ignored, name)}
    layers = sorted({number for name in weights if (number := layout.layer_of(name)) is not None})
    if not layers:
        problems.append(Problem((), f"no layer of {layout.title} found: its names start with {layout.prefix}0."))
    elif gaps := sorted({*range(layers[-1])} - {*layers}):
        present = ", ".join(map(str, layers))
        problems.append(Problem((f"{layout.prefix}{gaps[0]}",), f"missing layer; present layers: {present}"))
    expected = layout.expected(layers)
    problems += _wrong_names(weights, expected, layout)
    sizes = _sizes(weights, expected)
    read = {"n_layer": len(layers) or 1, "vocab_size": sizes.get("V"), "n_embd": sizes.get("D")}
    if "D" in sizes and "F" in sizes:
        read["mlp_ratio"] = sizes["F"] / sizes["D"]
    cfg = _config({**layout.settings, **settings, **read}, problems)
    if cfg is not None:
        sizes["C"] = cfg.kv_heads * cfg.head_dim
    problems += _wrong_values(weights, expected, sizes)
    if problems or cfg is None:
        raise ConfigError(problems)
    model = GPT(cfg)
    model.load_state_dict(_renamed(weights, expected, layout, cfg))
    return model


def strip_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Problem]]:
    """Strips the prefixes of torch.compile (`_orig_mod.`) and DDP (`module.`); reports names that then collide."""
    names = {full_name: re.sub(r"^((_orig_mod|module)\.)+", "", full_name) for full_name in state}
    duplicates = [name for name, count in Counter(names.values()).items() for _ in range(count - 1)]
    problems = [Problem((name,), "is given twice, with and without a prefix") for name in duplicates]
    return {names[full_name]: weight for full_name, weight in state.items()}, problems


def has_float_values(weight: Tensor) -> bool:
    """Whether a tensor holds real numbers, one by one: not quantized, sparse or on the meta device."""
    return weight.dtype in FLOATS and weight.layout == torch.strided and not weight.is_meta


def interleaved(weight: Tensor, cfg: ModelConfig) -> Tensor:
    """Reorders the rows of each head for a RoPE that pairs the two halves of a head, (x1, x2), to adjacent pairs."""
    return weight.unflatten(0, (-1, 2, cfg.head_dim // 2)).transpose(1, 2).flatten(0, 2)


def flipped(weight: Tensor, cfg: ModelConfig) -> Tensor:
    """As `interleaved`, for a RoPE that rotates by -theta: pairs (x2, x1) rotate by +theta."""
    return weight.unflatten(0, (-1, 2, cfg.head_dim // 2)).flip(1).transpose(1, 2).flatten(0, 2)


def _renamed(weights: Mapping[str, Tensor], expected: Table, layout: Layout, cfg: ModelConfig) -> dict[str, Tensor]:
    """Returns the state dict of `GPT`."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, target in expected.items():
        change = next((change for end, change in layout.changes.items() if name.endswith(end)), None)
        parts[target.name][target.part] = change(weights[name], cfg) if change else weights[name]
    return {name: torch.cat([rows for _, rows in sorted(found.items())]) for name, found in parts.items()}


def _wrong_names(weights: Mapping[str, Tensor], expected: Table, layout: Layout) -> list[Problem]:
    problems = []
    for name in (name for name in weights if name not in expected):
        layer = layout.layer_of(name)
        candidates = layout.expected([] if layer is None else [layer])
        near = get_close_matches(name, list(candidates), n=1, cutoff=0.8)
        hint = f", did you mean '{near[0]}'?" if near else ""
        problems.append(Problem((name,), f"unknown weight, {layout.title} has no weight of this name{hint}"))
    missing = [name for name in expected if name not in weights]
    return problems + [Problem((name,), f"missing weight of {layout.title}") for name in missing]


def _wrong_values(weights: Mapping[str, Tensor], expected: Table, sizes: Mapping[str, int]) -> list[Problem]:
    problems = []
    for name, (_, symbols, _) in expected.items():
        weight = weights.get(name)
        if weight is None:
            continue
        if not has_float_values(weight):
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
            form = "" if weight.layout == torch.strided else "sparse "
            form += "without values, " if weight.is_meta else ""
            found = f"{form}dtype {str(weight.dtype).removeprefix('torch.')}"
            problems.append(Problem((name,), f"{found}, expected {kinds}"))
        elif sizes.keys() >= {*symbols.split()}:
            shape, right = tuple(weight.shape), tuple(sizes[symbol] for symbol in symbols.split())
            if shape != right:
                problems.append(Problem((name,), f"shape {shape}, expected {right}"))
            elif not weight.isfinite().all():
                problems.append(Problem((name,), "holds NaN or infinity"))
    return problems


def _sizes(weights: Mapping[str, Tensor], expected: Table) -> dict[str, int]:
    """Infers V, D, F and 2F by majority vote over the weights, so that a single wrong shape is reported as such."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, (_, shape, _) in expected.items():
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
