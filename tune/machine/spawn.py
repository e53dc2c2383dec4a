"""Starts Python processes that do not run the script of the program again."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def hide_main_module() -> Iterator[None]:
    """Processes that multiprocessing spawns in this block do not import the main module of this process.

    By default a spawned process runs the script of its parent first, to find functions that are defined there. A script
    without `if __name__ == "__main__"` would start its campaign again, and one from stdin cannot be found. So the
    target of the process must be a function of an importable module.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
