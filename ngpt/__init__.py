"""Models, data, optimizers and one train loop. Knows nothing about campaigns or Ray.

from ngpt import generate, load_model

print(generate(load_model("runs/first"), "The file is", max_tokens=50, seed=1))
"""

from __future__ import annotations  # an old Python reads this file before it is refused

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ngpt.config.base import ConfigError as ConfigError
    from ngpt.generate import generate as generate
    from ngpt.model.config import ModelConfig as ModelConfig
    from ngpt.model.gpt import GPT as GPT
    from ngpt.plugins.load import load_plugins as load_plugins
    from ngpt.training.config import TrainConfig as TrainConfig
    from ngpt.training.load_model import LoadedModel as LoadedModel
    from ngpt.training.load_model import load_model as load_model
    from ngpt.training.loop import train as train

__all__ = [
    "GPT",
    "ConfigError",
    "LoadedModel",
    "ModelConfig",
    "TrainConfig",
    "generate",
    "load_model",
    "load_plugins",
    "train",
]

_MODULES = {
    "ConfigError": "ngpt.config.base",
    "GPT": "ngpt.model.gpt",
    "LoadedModel": "ngpt.training.load_model",
    "ModelConfig": "ngpt.model.config",
    "TrainConfig": "ngpt.training.config",
    "generate": "ngpt.generate",
    "load_plugins": "ngpt.plugins.load",
    "load_model": "ngpt.training.load_model",
    "train": "ngpt.training.loop",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `import ngpt` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, also those that have not been imported yet."""
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The type of this package: `ngpt.train` and `ngpt.generate` are the functions, whatever has been imported.

    Python sets an attribute of the package for each module in it that is imported. The modules of these two commands
    have the names of the functions; they are imported as `from ngpt.train import ...`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
