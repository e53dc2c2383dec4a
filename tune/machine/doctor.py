"""The checks of `doctor`: whether a campaign can run on this machine."""

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ngpt.code.plugins import loaded_plugins
from ngpt.code.version import commit, git_problem, install_command, own_version, version
from ngpt.config.base import ConfigError
from ngpt.plugins.load import VARIABLE, installed, load_installed
from ngpt.system.cache import ADVICE, CODE_FOLDERS, cache_folder, code_folder_problem
from ngpt.system.cgroups import cpu_quota, usable_cpus
from tune import format as fmt
from tune.machine.environment import PACKAGES, cpu_model, total_memory
from tune.machine.ray_limits import SHARED_MEMORY, has_shared_memory, ray_folder_problem, ray_limits, ray_root
from tune.spec.plugins import TABLES

MIN_DISK = 2 << 30  # bytes


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
    problem = f"not installed: {', '.join(missing)}; run {install_command()}" if missing else None
    yield Check("packages", ", ".join(f"{name} {number}" for name, number in versions.items() if number), problem)
    yield Check("version", own_version() or "unknown")
    problem = git_problem()
    yield Check("commit", "unknown" if problem else commit() or "none: not a git checkout", problem)


def _device(out: Path) -> Iterator[Check]:
    import torch

    from ngpt.system import gpus
    from ngpt.system.timing import bfloat16_slowdown, slow_dtype_note

    if gpus.is_available():
        names = [gpus.name(i) for i in range(gpus.count())]
        yield Check("device", ", ".join(names))
        return
    quota = cpu_quota()
    allowed = "" if quota is None else f" (a control group allows {quota:g})"
    cores = fmt.counted(usable_cpus(), "usable core") + allowed
    cpu = f"CPU: {cpu_model()}, {cores}, {total_memory() / 2**30:.0f} GiB"
    reason, problem = gpus.why_unavailable(), None
    if gpus.has_driver() and not gpus.is_hidden():
        advice = "" if gpus.is_built() else "; reinstall torch with CUDA"
        problem = f"a GPU driver is installed, but {reason}{advice}"
    yield Check("device", f"{cpu}; no GPU: {reason}", problem)
    note = slow_dtype_note(torch.device("cpu"), "bfloat16")  # no problem, since it is not the default
    yield Check("bfloat16", note or f"{1 / bfloat16_slowdown():.2g} x the speed of float32")


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
    try:
        cache = cache_folder()
    except ConfigError as error:
        yield Check("corpora", "no folder", str(error))
        return
    existing = _nearest_existing(cache)
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    yield Check("corpora", str(cache), None if writable else "not writable: set NGPT_CACHE to another folder")
    folders = [folder for name in CODE_FOLDERS if (folder := cache / name).is_dir()]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    removal = f"; to empty it: {shlex.join(['rm', '-r', *map(str, folders)])}" if folders else ""
    untrusted = next(filter(None, (code_folder_problem(cache / name) for name in CODE_FOLDERS)), None)
    problem = f"not used, since {untrusted}: {ADVICE}" if untrusted else None
    yield Check("compiled code", f"{fmt.size(size)}{removal}", problem)


def _ray(out: Path) -> Iterator[Check]:
    root = ray_root()
    free = shutil.disk_usage(_nearest_existing(root)).free
    yield Check("Ray's files", f"{root} ({free / 2**20:.0f} MiB free)", ray_folder_problem(root))
    if has_shared_memory():
        yield Check("shared memory", f"{shutil.disk_usage(SHARED_MEMORY).free / 2**20:.0f} MiB free in {SHARED_MEMORY}")
    else:
        yield Check("shared memory", f"{SHARED_MEMORY} is missing or full; Ray uses the folder of its files instead")
    for limit in ray_limits(usable_cpus()):
        yield Check(limit.name, limit.value, limit.problem)


def _user(out: Path) -> Iterator[Check]:
    home = Path(os.path.expanduser("~"))  # "~" without a home directory
    writable = os.access(home, os.W_OK)
    yield Check("home", str(home) if writable else f"{home} is not writable; each private Ray gets a token of its own")
    has_key = "WANDB_API_KEY" in os.environ or os.path.exists(os.path.expanduser("~/.netrc"))
    yield Check("W&B", "a key is set" if has_key else "no key; tracker.wandb works offline")


def _plugins(out: Path) -> Iterator[Check]:
    names = [f"{source.name} of {package}" for package, source in installed()]
    if not names:
        return
    try:
        problems = load_installed(TABLES)
    except ConfigError as error:
        problems = [str(error)]
    note = "" if loaded_plugins() or problems else f" (left out, since {VARIABLE} is none)"
    yield Check("plug-ins", f"{fmt.listing(names)}{note}", "; ".join(problems) or None)


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))  # False if it may not be read


CHECKS: list[Callable[[Path], Iterator[Check]]] = [_software, _device, _results, _cache, _ray, _user, _plugins]
