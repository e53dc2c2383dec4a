"""torch.compile for a process that trains many models, one after another."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch

KEPT = 64  # graphs of one process; the code of the least recently used is forgotten


@functools.lru_cache(maxsize=KEPT)
def compile_for(key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for static shapes, once per `key`: what decides its graph apart from the shapes.

    torch keeps compilations per code object and gives up at the ninth: a worker that trains nine kinds of models would
    go on without compiled code, or fail. So each key has a code object of its own. A break in the graph is an error and
    not a slow program.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)
