"""What a private Ray needs from the machine: a folder for its files, address space, processes and open files.

Batch systems and containers limit them. Ray then ends with stacks of its C++ code, or not at all, so they are checked
before it starts. The needs are what every start takes; a limit that is met may still be too tight for large trials.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from ngpt.system.cgroups import process_limit
from ngpt.system.permissions import insecure_part

# Of the root below which Ray's socket /ngpt-abcdefgh/r/session_DATE_PID/sockets/dash_TaskEventsHead has 107 bytes.
MAX_ROOT_BYTES = 20
OBJECT_STORE = 256 << 20  # bytes; trials and their results need a fraction
MIN_DISK = 64 << 20  # bytes
MIN_INODES = 1000
MIN_ADDRESS_SPACE = 4 << 30  # bytes of a process: torch and Ray without a GPU
BASE_THREADS, WORKER_THREADS = 150, 25  # of Ray's own processes, and of each worker
BASE_FILES, WORKER_FILES = 160, 8  # open in the busiest of Ray's processes, and for each worker
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Limit:
    """A limit of this machine on what Ray needs: its value, and the problem with it, if any."""

    name: str
    value: str
    problem: str | None = None


def ray_root() -> Path:
    """RAY_TMPDIR, TMPDIR or /tmp: the folder in which Ray's folder is made. One too long for sockets counts as /tmp."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").absolute()
    return folder if len(os.fsencode(folder)) <= MAX_ROOT_BYTES else Path("/tmp")


def ray_folder_problem(root: Path) -> str | None:
    """Says why Ray's files cannot be kept below `root`, and what to do about it; None if they can."""
    wanted = f"set TMPDIR to a folder of at most {MAX_ROOT_BYTES} bytes"  # the advice goes on with what it lacks
    if not root.is_dir():
        return f"{root} is not a folder: {wanted} that exists"
    if unsafe := insecure_part(root):
        return f"{unsafe}, who could then replace Ray's sockets: {wanted} on a path that nobody else can write"
    if not os.access(root, os.W_OK | os.X_OK):
        return f"{root} is not writable: {wanted} that is"
    free, needed = shutil.disk_usage(root).free, MIN_DISK + (0 if has_shared_memory() else OBJECT_STORE)
    if free < needed:
        reason = "Ray's logs need" if needed == MIN_DISK else f"with {SHARED_MEMORY} full, Ray needs"
        return f"{root} has {free >> 20} MiB free, {reason} {needed >> 20} MiB: {wanted} with space, or free some"
    with contextlib.suppress(OSError, AttributeError):
        state = os.statvfs(root)
        if state.f_files and state.f_favail < MIN_INODES:
            return f"{root} has {state.f_favail} inodes left (df -i), Ray needs {MIN_INODES}: {wanted} with more"
    return None


def has_shared_memory() -> bool:
    """Whether /dev/shm has room for Ray's object store, which otherwise goes to Ray's folder."""
    return SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= OBJECT_STORE


def ray_limits(workers: int = 1) -> list[Limit]:
    """The limits of the shell, the batch system or the container on a Ray with `workers` workers."""
    return [_address_space(), _processes(workers), _open_files(workers)]


def ray_limit_problem(workers: int = 1) -> str | None:
    """The first limit under which Ray cannot start, and what to do about it; None if there is none."""
    return next((limit.problem for limit in ray_limits(workers) if limit.problem), None)


def limit_hint() -> str:
    """Names the limits of memory, for the message of a Ray that did not start or died; "" without any."""
    limits = {"ulimit -v": _limit("RLIMIT_AS"), "ulimit -d": _limit("RLIMIT_DATA")}
    known = [f"{name} is {_gib(size)}" for name, size in limits.items() if size is not None]
    return f"; {' and '.join(known)}, which may be too little: raise it or use --inline" if known else ""


def _address_space() -> Limit:
    size = _limit("RLIMIT_AS")
    if size is None:
        return Limit("address space", "unlimited")
    advice = "raise it (ulimit -v unlimited, or the memory request of the batch system) or use --inline"
    problem = f"ulimit -v is {_gib(size)}, and Ray needs {_gib(MIN_ADDRESS_SPACE)}, more with a GPU: {advice}"
    return Limit("address space", _gib(size), problem if size < MIN_ADDRESS_SPACE else None)


def _processes(workers: int) -> Limit:
    """Threads count as processes. Root is exempt from ulimit -u, but not from the limit of a container."""
    needed = BASE_THREADS + WORKER_THREADS * workers
    left = {"the container's limit of processes (pids.max)": process_limit()}
    limit = _limit("RLIMIT_NPROC")
    if limit is not None and os.getuid() != 0:
        left["ulimit -u"] = limit, _threads_of_user()
    known = {name: values for name, values in left.items() if values is not None}
    if not known:
        return Limit("processes", "unlimited")
    name, (most, used) = min(known.items(), key=lambda item: item[1][0] - item[1][1])
    advice = f"raise it by {needed - (most - used)}, end other processes of yours, or use --inline"
    problem = f"{name} is {most} with {used} in use, and Ray needs {needed} more: {advice}"
    return Limit("processes", f"{most}, {used} in use", problem if most - used < needed else None)


def _open_files(workers: int) -> Limit:
    most, needed = _limit("RLIMIT_NOFILE", hard=True), BASE_FILES + WORKER_FILES * workers  # Ray raises the soft limit
    if most is None:
        return Limit("open files", "unlimited")
    problem = f"ulimit -n is {most}, and Ray needs {needed}: raise it (ulimit -n {max(4096, needed)}) or use --inline"
    return Limit("open files", str(most), problem if most < needed else None)


def _limit(name: str, *, hard: bool = False) -> int | None:
    """A limit of this process; None if there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    value = resource.getrlimit(getattr(resource, name))[hard]
    return None if value == resource.RLIM_INFINITY else value


def _threads_of_user() -> int:
    processes = psutil.process_iter(["uids", "num_threads"])
    mine = (process.info for process in processes if process.info["uids"] and process.info["num_threads"])
    return sum(info["num_threads"] for info in mine if info["uids"].real == os.getuid())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
