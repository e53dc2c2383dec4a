"""torch.compile for a process that trains many models, one after another, and for the processes after it.

Within a process each graph is traced once (`compile_for`). What the compiler makes of a graph lies on disk by its own
content (torch's caches of AOTAutograd and Inductor, and Triton's), so that another worker, or the same campaign a
day later, traces its graphs and compiles none of them. torch's own place for that is the temporary folder, which
reboots and cleaners empty; ours is beside the corpora.
"""

import functools
import os
import types
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from ngpt.system.cache import cache_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
KEPT = 64  # graphs of one process; the code of the least recently used is forgotten


@functools.lru_cache(maxsize=KEPT)
def compile_for(key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for static shapes, once per `key`: what decides its graph apart from the shapes.

    torch keeps compilations per code object and gives up at the ninth: a worker that trains nine kinds of models would
    go on without compiled code, or fail. So each key has a code object of its own. A break in the graph is an error and
    not a slow program.
    """
    use_disk_cache()
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)


def use_disk_cache() -> Path:
    """Lets this process and its children keep compiled code in the cache folder; returns where it lies now.

    A folder that the user has named in TORCHINDUCTOR_CACHE_DIR stays. torch names its own default there once it is
    loaded, which is not a wish of the user's.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # loads the compiler, for a second and a half

    if os.environ.get(VARIABLE) in (None, "", default_cache_dir()):
        os.environ[VARIABLE] = str(cache_folder() / "compiled")
    return Path(os.environ[VARIABLE])
