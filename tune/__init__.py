"""The campaign engine: plans, runs and judges many trials in parallel.

from tune import judge

print(judge({"base": {1: 5.0, 2: 5.03}, "wide": {1: 4.9, 2: 4.93}}, baseline="base"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune.api import judge as judge

__all__ = ["judge"]


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `import tune` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("tune.api"), name)
