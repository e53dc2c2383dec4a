"""Models that `ngpt.export` wrote as remote code for transformers: the same weights and settings under other names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ngpt.config.base import ConfigError, Problem, build, printable
from ngpt.conversion.layout import has_float_values, strip_prefixes
from ngpt.conversion.weights_file import CONFIG_FILE
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT

MODEL_TYPE = "ngpt"
BODY = "model."  # prefix of all weights but those of the head
HEAD = ("lm_head.", "s_z.")
COUNTER = "normalizer.replaced"  # a diagnostic of training, which an exported model does not have


def exported_name(name: str) -> str:
    """Returns the name in the exported model of a weight of `GPT`."""
    return name if name.startswith(HEAD) else BODY + name


def exported_weights(model: GPT) -> dict[str, Tensor]:
    """Returns the weights of a model by their exported names."""
    return {exported_name(name): weight for name, weight in model.state_dict().items() if name != COUNTER}


def from_exported(state: Mapping[str, Tensor], config: Mapping[str, Any], *, block_size: int | None = None) -> GPT:
    """Builds the model of an exported folder, with the same weights bit for bit.

    Raises ConfigError that lists the weights and settings that do not fit.

    Args:
        state: exported name -> tensor.
        config: the content of config.json.
        block_size: context in tokens; default: that of the training.
    """
    settings = config.get("settings")
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise ConfigError(f"{CONFIG_FILE}: settings are missing, which an exported model has")
    settings = dict(settings) | ({} if block_size is None else {"block_size": block_size})
    cfg = build(ModelConfig, settings)
    if cfg.vocab_size is None:
        raise ConfigError(f"{CONFIG_FILE}: settings.vocab_size is missing")
    with torch.device("meta"):  # shapes only
        expected = exported_weights(GPT(cfg))
    weights, problems = strip_prefixes(state)
    problems += [Problem((name,), "unknown weight of an exported nGPT") for name in weights.keys() - expected.keys()]
    problems += [Problem((name,), "missing weight of an exported nGPT") for name in expected.keys() - weights.keys()]
    for name in sorted(weights.keys() & expected.keys()):
        weight, right = weights[name], tuple(expected[name].shape)
        if not has_float_values(weight):
            problems.append(Problem((name,), f"dtype {str(weight.dtype).removeprefix('torch.')}, expected floats"))
        elif tuple(weight.shape) != right:
            problems.append(Problem((name,), f"shape {tuple(weight.shape)}, expected {right}"))
    if problems:
        raise ConfigError(sorted(problems))
    model = GPT(cfg)
    own = model.state_dict()
    model.load_state_dict({name: own[name] if name == COUNTER else weights[exported_name(name)] for name in own})
    return model


def exported_position(config: Mapping[str, Any] | None) -> tuple[int, int | None]:
    """Returns the steps that an exported model has trained, of how many; (0, None) for other models.

    Its alphas may follow a schedule, so that they depend on the two.
    """
    if config is None or config.get("model_type") != MODEL_TYPE:
        return 0, None
    step, steps = config.get("step", 0), config.get("steps", 1)
    for name, value, least in (("step", step, 0), ("steps", steps, 1)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{CONFIG_FILE}: {name} is {printable(repr(value))}, not a whole number from {least}")
    return step, steps


def exported_settings(model: GPT) -> dict[str, Any]:
    """Returns the settings of a model by name, as config.json has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in model.cfg}
