"""Describes the machine and its software, for the manifest, the report and `doctor`."""

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ngpt.system.cgroups import memory_limit, usable_cpus

PACKAGES = ("torch", "ray", "numpy", "sentencepiece", "pyarrow", "pydantic", "wandb")
GIT = ("git", "-C", str(Path(__file__).parent))
BUSY_SHARE = 0.1  # of a GPU's memory; a display or the driver alone uses less


def describe(device: str = "auto") -> dict[str, Any]:
    """Versions, device, host and git commit, as a flat dict of scalars."""
    from ngpt.system import gpus
    from ngpt.system.device import pick_device

    kind = pick_device(device)
    changed = _output(*GIT, "status", "--porcelain", "--untracked-files=no") if commit() else None
    return {
        "device": gpus.name(kind) if gpus.is_gpu(kind) else f"{kind.type} ({cpu_model()})",
        "gpus": gpus.count(),
        "cpus": usable_cpus(),
        "memory_bytes": total_memory(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "git_commit": commit(),
        "git_dirty": None if changed is None else bool(changed),  # whether tracked files differ from the commit
    }


def commit() -> str | None:
    """The git commit of this code; None outside a checkout, or if git refuses (see `git_problem`)."""
    # Only if git tracks this file: an installed copy may lie inside the checkout of another project.
    return _output(*GIT, "rev-parse", "HEAD") if _output(*GIT, "ls-files", Path(__file__).name) else None


def git_problem() -> str | None:
    """Why git cannot tell the commit of this code, in git's own words; None if it can, or without a checkout."""
    if not any((folder / ".git").exists() for folder in Path(__file__).parents):
        return None
    try:
        done = subprocess.run([*GIT, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return " ".join(done.stderr.split()) or f"git exits with {done.returncode}" if done.returncode else None


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def total_memory() -> int:
    """The size of main memory in bytes, or less if a control group limits it."""
    import psutil

    return min(psutil.virtual_memory().total, memory_limit() or sys.maxsize)


def cpu_model() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def busy_gpus() -> list[str]:
    """A warning for each visible GPU with a tenth of its memory in use; empty without an NVIDIA driver.

    A slice of a GPU (MIG) gets none, since the driver reports the memory of all slices together.
    """
    from ngpt.system import gpus

    # torch would create a CUDA context, which uses GPU memory itself.
    fields = "--query-gpu=index,uuid,memory.used,memory.total"
    text = _output("nvidia-smi", fields, "--format=csv,noheader,nounits", timeout=10) or ""
    rows = [cells for line in text.splitlines() if len(cells := [cell.strip() for cell in line.split(",")]) == 4]
    visible = gpus.select([(index, uuid) for index, uuid, *_ in rows], os.environ.get("CUDA_VISIBLE_DEVICES"))
    warnings = []
    for index, _, *sizes in rows:
        if index not in visible or not all(map(str.isdecimal, sizes)):
            continue
        used, total = map(int, sizes)
        if used >= BUSY_SHARE * total:
            text = f"GPU {index}: {used / 1024:.1f} of {total / 1024:.1f} GiB are held by other processes"
            warnings.append(f"{text}; trials may run out of memory (nvidia-smi lists the processes)")
    return warnings


def _output(*command: str, timeout: float | None = None) -> str | None:
    """The output of a command; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
