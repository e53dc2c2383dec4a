"""Describes the machine and its software, for the manifest, the report and `doctor`."""

import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

from ngpt.code.version import commit, is_changed, output, own_version, version
from ngpt.plugins.records import plugins_in_brief
from ngpt.system.cgroups import memory_limit, usable_cpus

PACKAGES = ("torch", "ray", "numpy", "sentencepiece", "pyarrow", "pydantic", "wandb")
BUSY_SHARE = 0.1  # of a GPU's memory; a display or the driver alone uses less


def describe(device: str = "auto") -> dict[str, Any]:
    """Versions, device, host and git commit, as a flat dict of scalars. An installed package has no commit."""
    from ngpt.system import gpus
    from ngpt.system.device import pick_device

    kind = pick_device(device)
    return {
        "device": gpus.name(kind) if gpus.is_gpu(kind) else f"{kind.type} ({cpu_model()})",
        "gpus": gpus.count(),
        "cpus": usable_cpus(),
        "memory_bytes": total_memory(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "ngpt_campaign": own_version(),
        "git_commit": commit(),
        "git_dirty": is_changed(),
        **({"plugins": plugins} if (plugins := plugins_in_brief()) else {}),
    }


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
    text = output("nvidia-smi", fields, "--format=csv,noheader,nounits", timeout=10) or ""
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
