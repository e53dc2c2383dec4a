"""What a node of a cluster has: versions of Python and packages, and the code that its workers import.

This runs on the node, which may have nothing of this project: it imports the standard library only.
"""

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def report_node(
    packages: Sequence[str], plugins: Sequence[Sequence[str]] = (), compile_for: str | None = None
) -> dict[str, Any]:
    """The node's Python, the version of each package, and the digest of the code, or why it cannot be imported.

    `plugins` are name, module and file (empty: none) of each plug-in, which belong to that code. With `compile_for`,
    the `device` of the campaign, also why models cannot be compiled there.
    """
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    try:
        import ngpt
        from ngpt.code.digest import current_code

        if plugins:
            from ngpt.code.plugins import Source
            from ngpt.plugins.load import load_sources

            load_sources([Source(name, module, Path(file) if file else None) for name, module, file in plugins])
        code = {"digest": current_code().digest, "folder": str(ngpt.__path__[0])}
    except Exception as error:  # whatever a package of the node, or a plug-in, raises
        code = {"error": f"{type(error).__name__}: {error}"}
    report = {"python": platform.python_version(), "versions": versions, "code": code}
    if compile_for is not None and "digest" in code:
        report["compiler"] = compiler_problem(compile_for)
    return report


def compiler_problem(device: str) -> str | None:
    """Why a model cannot be compiled for `device` of a campaign on this node; None if it can."""
    from ngpt.config.base import ConfigError
    from ngpt.kernels.compile import check_compiler
    from ngpt.system.device import pick_device

    try:
        kind = pick_device(device)
    except ConfigError:  # the worker says so
        return None
    except Exception as error:  # of a torch that cannot be imported, which the start of a worker says, too
        return f"cannot say whether it compiles ({type(error).__name__}: {error})"
    try:
        check_compiler(kind)
    except ConfigError as error:
        return str(error)
    return None
