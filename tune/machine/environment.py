"""The machine and the software a campaign runs on: for the manifest, for the report, and for `doctor`."""

import importlib.metadata
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune import format as fmt

PACKAGES = ("torch", "ray", "numpy", "sentencepiece", "pyarrow", "pydantic", "wandb")
ENOUGH_DISK = 2 << 30  # bytes
BUSY = 0.1  # share of a GPU's memory; an idle one with a display or a driver's own takes less
ENOUGH_SHM = 256 << 20  # bytes
ENOUGH_RAY = 64 << 20  # bytes
LONGEST_TEMPORARY = 35  # bytes: with /ray/session_DATE_PID/sockets/plasma_store a socket's name may have 103
COMPILED = (
    "compiled",
    "native",
)  # folders of ngpt/kernels/compile.py and ngpt/kernels/build.py in the cache, which only grow


def describe(device: str = "auto") -> dict[str, Any]:
    """Versions, device, host and the commit of the code, as flat scalars."""
    import torch

    from ngpt.system.device import pick_device

    kind = pick_device(device)
    return {
        "device": torch.cuda.get_device_name(kind) if kind.type == "cuda" else f"{kind.type} ({cpu_model()})",
        "gpus": torch.cuda.device_count(),
        "cpus": usable_cpus(),
        "memory_bytes": total_memory(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **git_state(),
    }


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def short_temporary() -> str:
    """What TMPDIR says, or /tmp where the names of Ray's sockets would be longer than the system takes."""
    given = os.environ.get("TMPDIR") or "/tmp"
    return given if len(os.fsencode(given)) <= LONGEST_TEMPORARY else "/tmp"


def total_memory() -> int:
    """Bytes of main memory."""
    import psutil

    return psutil.virtual_memory().total


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """Commit of the checkout this code lies in, and whether files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"git_commit": commit, "git_dirty": None if changed is None else bool(changed)}


def busy_gpus() -> list[str]:
    """One line for each visible GPU of which others hold a tenth of the memory or more; none without an NVIDIA driver.

    It asks the driver's own program: a CUDA context, to ask torch, would take memory itself.
    """
    fields = "index,memory.used,memory.total"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    visible, found = os.environ.get("CUDA_VISIBLE_DEVICES"), []
    for row in done.stdout.splitlines():
        index, *sizes = (cell.strip() for cell in row.split(","))
        if len(sizes) != 2 or not all(map(str.isdecimal, sizes)) or (visible and index not in visible.split(",")):
            continue
        used, total = map(int, sizes)
        if used >= BUSY * total:
            text = f"GPU {index}: {used / 1024:.1f} of {total / 1024:.1f} GiB are held by other processes"
            found.append(f"{text}; trials may run out of memory (nvidia-smi shows whose they are)")
    return found


@dataclass(frozen=True)
class Check:
    """One line of `doctor`: a fact, and what it would make go wrong, if anything."""

    name: str
    value: str
    problem: str | None = None


def doctor(out: Path) -> list[Check]:
    """Everything about this machine that decides whether a campaign with results in `out` can run."""
    return [check(out) for check in CHECKS]


def _python(out: Path) -> Check:
    old = None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed"
    return Check("python", platform.python_version(), old)


def _packages(out: Path) -> Check:
    found = {name: version(name) for name in PACKAGES}
    missing = [name for name, number in found.items() if number is None]
    problem = f"not installed: {', '.join(missing)}; run pip install -e ." if missing else None
    return Check("packages", ", ".join(f"{name} {number}" for name, number in found.items() if number), problem)


def _device(out: Path) -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("device", ", ".join(names))
    driver = shutil.which("nvidia-smi")
    problem = "there is an NVIDIA driver, but this torch was built without CUDA: reinstall torch" if driver else None
    return Check(
        "device", f"CPU: {cpu_model()}, {usable_cpus()} cores for us, {total_memory() / 2**30:.0f} GiB", problem
    )


def _disk(out: Path) -> Check:
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    problem = f"less than {ENOUGH_DISK >> 30} GiB free" if free < ENOUGH_DISK else None
    if not there.is_dir():
        problem = f"{there} is not a folder"
    elif not os.access(there, os.W_OK):
        problem = f"{there} is not writable"
    return Check("results", f"{out} ({free / 2**30:.1f} GiB free)", problem)


def _cache(out: Path) -> Check:
    from ngpt.system.cache import cache_folder

    folder = cache_folder()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    problem = None if os.access(there, os.W_OK) else "not writable: set NGPT_CACHE to a folder that is"
    return Check("corpora", str(folder), problem)


def _compiled(out: Path) -> Check:
    from ngpt.system.cache import cache_folder

    folders = [folder for name in COMPILED if (folder := cache_folder() / name).is_dir()]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    emptied = f"; to empty it: {shlex.join(['rm', '-r', *map(str, folders)])}" if folders else ""
    return Check("compiled code", f"{fmt.size(size)}{emptied}")


def _ray(out: Path) -> Check:
    folder = Path(os.environ.get("RAY_TMPDIR") or short_temporary(), "ray")
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    problem = "Ray's logs and sockets need more: set TMPDIR to a folder with room" if free < ENOUGH_RAY else None
    if not os.access(there, os.W_OK):
        problem = "not writable: set TMPDIR to a folder that is"
    return Check("Ray's files", f"{folder} ({free / 2**20:.0f} MiB free)", problem)


def _shared_memory(out: Path) -> Check:
    shm = Path("/dev/shm")
    if not shm.exists():
        return Check("shared memory", "not used on this platform")
    free = shutil.disk_usage(shm).free
    problem = "Ray wants more: mount a larger /dev/shm, or use --inline" if free < ENOUGH_SHM else None
    return Check("shared memory", f"{free / 2**20:.0f} MiB free in /dev/shm", problem)


def _home(out: Path) -> Check:
    home = Path.home()
    problem = None if os.access(home, os.W_OK) else "Ray keeps its authentication token there and cannot write it"
    return Check("home", str(home), problem)


def _files(out: Path) -> Check:
    if sys.platform == "win32":
        return Check("open files", "no limit known")
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Check("open files", str(soft), "fewer than 1024: raise it with ulimit -n 4096" if soft < 1024 else None)


def _wandb(out: Path) -> Check:
    key = "WANDB_API_KEY" in os.environ or Path("~/.netrc").expanduser().exists()
    return Check("W&B", "a key is set" if key else "no key; tracker.wandb works offline")


CHECKS: list[Callable[[Path], Check]] = [
    _python, _packages, _device, _disk, _cache, _compiled, _ray, _shared_memory, _home, _files, _wandb
]  # fmt: skip
