"""What a command does first: it refuses an old Python, names a missing package, and ends on a signal.

Older versions of Python have to be able to read this file, and it can be imported without any package.
"""

from __future__ import annotations

import sys
from typing import Any

OLDEST_PYTHON = (3, 11)
EXIT_USAGE = 2
OUR_MODULES = ("ngpt", "tune", "run_campaign", "benchmarks", "tests")
PACKAGES = {"ruamel": "ruamel.yaml", "backports": "backports.zstd"}  # what pip calls a module, if that differs


def start_command() -> None:
    """Prepares the process of a command. It is called before imports that take seconds, or fail."""
    check_installation()
    from ngpt.system.signals import end_process_on_signal

    end_process_on_signal()


def check_installation() -> None:
    """Ends this process with one line if Python is too old, or as soon as an import misses a package."""
    if sys.version_info < OLDEST_PYTHON:
        needed, found = (".".join(map(str, numbers)) for numbers in (OLDEST_PYTHON, sys.version_info[:3]))
        sys.stderr.write(f"Python {needed} or newer is needed, but {sys.executable} is Python {found}\n")
        sys.exit(EXIT_USAGE)
    sys.excepthook = _explain


def missing_package(error: BaseException) -> str | None:
    """Names the package that an import has not found, this Python, and the command that installs it.

    Returns None for any other error, such as a module of this program or of Python itself that is not found.
    """
    module = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module in ("", *OUR_MODULES, *sys.stdlib_module_names):
        return None
    from ngpt.code.version import install_command

    package = PACKAGES.get(module, module)
    return f"the package {package} is not installed for {sys.executable}; what is needed: {install_command()}"


def _explain(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints one line instead of the traceback of an import that misses a package."""
    if message := missing_package(error):
        sys.stderr.write(f"{message}\n")
        sys.exit(EXIT_USAGE)
    sys.__excepthook__(kind, error, trace)
