"""torch.compile for processes that train many models one after another.

Within a process, `compile_for` traces each graph once. Across processes, torch's disk cache is keyed by graph content,
so other workers and later runs trace their graphs but compile nothing. `use_disk_cache` puts it in the cache folder.
"""

import functools
import os
import types
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from ngpt.config.base import ConfigError
from ngpt.system.cache import code_folder

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MAX_GRAPHS = 64  # per process; the least recently used is dropped


@functools.lru_cache(maxsize=MAX_GRAPHS)
def compile_for(key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` compiled for static shapes, with one compiled function per `key`.

    The key must contain everything except shapes that determines the graph. torch counts compilations per code object
    and gives up after eight, so each key gets a copy of the code object.
    """
    return compiled_copy(function)


def compiled_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` compiled for static shapes, without keeping it. A graph break raises an error."""
    use_disk_cache()
    attributes = (getattr(function, f"__{name}__") for name in ("globals", "name", "defaults", "closure"))
    copy = types.FunctionType(function.__code__.replace(), *attributes)
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, fullgraph=True, dynamic=False)


def use_disk_cache() -> Path:
    """Points torch's compile cache at our cache folder, unless TORCHINDUCTOR_CACHE_DIR is set; returns the path."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes 1.5 seconds to import

        if given == default_cache_dir():  # set by torch, in /tmp and with a name that everybody knows
            given = None
    if not given:
        os.environ[CACHE_VARIABLE] = str(code_folder("compiled"))
    return Path(os.environ[CACHE_VARIABLE])


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError if torch.compile finds no C++ compiler, which it needs on a CPU; takes a second or two."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # torch has its own types of exceptions, which move between versions
        advice = "install g++ or name a compiler in the environment variable CXX, or set compile to false"
        raise ConfigError(f"compile: true needs a C++ compiler: {advice} ({type(error).__name__})") from None
