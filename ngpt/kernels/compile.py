"""torch.compile for a process that trains many models in turn, and for later processes.

Within a process, `compile_for` traces each graph once. torch caches compiled code on disk by its content, so other
workers and later runs trace their graphs but compile nothing; `use_disk_cache` keeps it in the cache folder.
"""

import functools
import os
import types
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from ngpt.system.cache import cache_folder

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
MAX_GRAPHS = 64  # per process; the least recently used is dropped


@functools.lru_cache(maxsize=MAX_GRAPHS)
def compile_for(key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` compiled for static shapes, once per `key`: all that determines its graph but shapes.

    torch counts compilations per code object and gives up after eight, so each key gets a separate code object. A
    graph break raises instead of running slowly.
    """
    use_disk_cache()
    parts = (getattr(function, f"__{part}__") for part in ("globals", "name", "defaults", "closure"))
    copy = types.FunctionType(function.__code__.replace(), *parts)
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, fullgraph=True, dynamic=False)


def use_disk_cache() -> Path:
    """Makes this process and its children keep compiled code in the cache folder; returns the folder in use.

    A folder that the user set in TORCHINDUCTOR_CACHE_DIR stays; the temporary one that torch sets does not.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # loads the compiler: 1.5 seconds

    if os.environ.get(CACHE_VARIABLE) in (None, "", default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(cache_folder() / "compiled")
    return Path(os.environ[CACHE_VARIABLE])
