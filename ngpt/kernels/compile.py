"""torch.compile for a process that trains many models in turn, and for later processes.

Within a process, `compile_for` traces each graph once. Compiled code is cached on disk by its content (torch's
AOTAutograd and Inductor caches, and Triton's), so other workers and later runs trace their graphs but compile nothing.
torch keeps this cache in the temporary folder, which is emptied; `use_disk_cache` moves it to the cache folder.
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
    """Returns `function` compiled for static shapes, once per `key`: all that decides its graph besides the shapes.

    torch counts compilations per code object and gives up after eight, so each key gets a code object of its own. A
    graph break raises instead of running slowly.
    """
    use_disk_cache()
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(copy, fullgraph=True, dynamic=False)


def use_disk_cache() -> Path:
    """Makes this process and its children keep compiled code in the cache folder; returns the folder in use.

    A folder that the user set in TORCHINDUCTOR_CACHE_DIR stays. torch sets that variable to its own default when it
    loads, which does not count as set by the user.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # loads the compiler: 1.5 seconds

    if os.environ.get(CACHE_VARIABLE) in (None, "", default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(cache_folder() / "compiled")
    return Path(os.environ[CACHE_VARIABLE])
