"""The checks of `doctor`: whether a campaign can run on this machine."""

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ngpt.system.cache import cache_folder
from ngpt.system.cgroups import cpu_quota, usable_cpus
from tune import format as fmt
from tune.machine.environment import (
    PACKAGES,
    commit,
    cpu_model,
    git_problem,
    short_temporary,
    total_memory,
    version,
)

MIN_DISK = 2 << 30  # bytes
MIN_SHARED_MEMORY = 256 << 20  # bytes
MIN_RAY_DISK = 64 << 20  # bytes
COMPILED_FOLDERS = ("compiled", "native")  # in the cache, filled by ngpt/kernels/compile.py and build.py; never emptied


@dataclass(frozen=True)
class Check:
    """One line of `doctor`: a fact, and the problem with it, if any."""

    name: str
    value: str
    problem: str | None = None


def run_checks(out: Path) -> list[Check]:
    """Runs all checks for a campaign with results in `out`. Writes nothing."""
    return [check for checks in CHECKS for check in checks(out)]


def _software(out: Path) -> Iterator[Check]:
    problem = None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed"
    yield Check("python", platform.python_version(), problem)
    versions = {name: version(name) for name in PACKAGES}
    missing = [name for name, number in versions.items() if number is None]
    problem = f"not installed: {', '.join(missing)}; run pip install -e ." if missing else None
    yield Check("packages", ", ".join(f"{name} {number}" for name, number in versions.items() if number), problem)
    problem = git_problem()
    yield Check("commit", "unknown" if problem else commit() or "none: not a git checkout", problem)


def _device(out: Path) -> Iterator[Check]:
    from ngpt.system import gpus

    if gpus.is_available():
        names = [gpus.name(i) for i in range(gpus.count())]
        yield Check("device", ", ".join(names))
        return
    quota = cpu_quota()
    cores = fmt.counted(usable_cpus(), "usable core") + (
        "" if quota is None else f" (a control group allows {quota:g})"
    )
    cpu = f"CPU: {cpu_model()}, {cores}, {total_memory() / 2**30:.0f} GiB"
    reason, problem = gpus.why_unavailable(), None
    if gpus.has_driver() and not gpus.is_hidden():
        advice = "" if gpus.is_built() else "; reinstall torch with CUDA"
        problem = f"a GPU driver is installed, but {reason}{advice}"
    yield Check("device", f"{cpu}; no GPU: {reason}", problem)


def _results(out: Path) -> Iterator[Check]:
    folder = _nearest_existing(out.absolute())
    free = shutil.disk_usage(folder).free
    problem = f"less than {MIN_DISK >> 30} GiB free" if free < MIN_DISK else None
    if not folder.is_dir():
        problem = f"{folder} is not a folder"
    elif not os.access(folder, os.W_OK):
        problem = f"{folder} is not writable"
    yield Check("results", f"{out} ({free / 2**30:.1f} GiB free)", problem)


def _cache(out: Path) -> Iterator[Check]:
    writable = os.access(_nearest_existing(cache_folder()), os.W_OK)
    yield Check("corpora", str(cache_folder()), None if writable else "not writable: set NGPT_CACHE to another folder")
    folders = [folder for name in COMPILED_FOLDERS if (folder := cache_folder() / name).is_dir()]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    removal = f"; to empty it: {shlex.join(['rm', '-r', *map(str, folders)])}" if folders else ""
    yield Check("compiled code", f"{fmt.size(size)}{removal}")


def _ray(out: Path) -> Iterator[Check]:
    folder = Path(os.environ.get("RAY_TMPDIR") or short_temporary(), "ray")
    existing = _nearest_existing(folder)
    free = shutil.disk_usage(existing).free
    problem = "Ray's logs and sockets need more: set TMPDIR to a folder with space" if free < MIN_RAY_DISK else None
    if not os.access(existing, os.W_OK):
        problem = "not writable: set TMPDIR to another folder"
    yield Check("Ray's files", f"{folder} ({free / 2**20:.0f} MiB free)", problem)
    shared = Path("/dev/shm")
    if shared.exists():
        free = shutil.disk_usage(shared).free
        problem = "Ray needs more: mount a larger /dev/shm, or use --inline" if free < MIN_SHARED_MEMORY else None
        yield Check("shared memory", f"{free / 2**20:.0f} MiB free in /dev/shm", problem)
    else:
        yield Check("shared memory", "not used on this platform")


def _user(out: Path) -> Iterator[Check]:
    problem = None if os.access(Path.home(), os.W_OK) else "not writable: Ray stores its authentication token there"
    yield Check("home", str(Path.home()), problem)
    if sys.platform == "win32":
        yield Check("open files", "no limit known")
    else:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield Check("open files", str(soft), "fewer than 1024: raise it with ulimit -n 4096" if soft < 1024 else None)
    has_key = "WANDB_API_KEY" in os.environ or Path("~/.netrc").expanduser().exists()
    yield Check("W&B", "a key is set" if has_key else "no key; tracker.wandb works offline")


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


CHECKS: list[Callable[[Path], Iterator[Check]]] = [_software, _device, _results, _cache, _ray, _user]
