"""How many cores and how much memory this process may use, where Linux control groups limit them (containers, Slurm).

`os.sched_getaffinity` does not know a quota of CPU time, and the size of main memory is not what a container may use:
without the limits, two workers would share one core, and the kernel would kill a trial that fits into the machine.
Control groups, versions 1 and 2: https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")
NO_LIMIT = 2**62  # bytes; version 1 writes the largest number of pages


def usable_cpus() -> int:
    """Returns the number of cores that this process may use: its affinity, or less if a control group has a quota.

    A quota of 1.5 cores is 1, since two busy workers would wait for each other.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota() -> float | None:
    """Returns the smallest CPU quota of the process's control groups, in cores; None without one."""
    quotas = []
    for folder in _folders("cpu"):
        limit = _numbers(folder / "cpu.max")  # version 2: `150000 100000`, or `max 100000`
        limit = limit or _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")  # version 1
        if len(limit) == 2:
            quotas.append(limit[0] / limit[1])
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Returns the smallest memory limit of the process's control groups in bytes; None without one."""
    names = ("memory.max", "memory.limit_in_bytes")  # of versions 2 and 1
    limits = [limit for folder in _folders("memory") for name in names for limit in _numbers(folder / name)]
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def process_limit() -> tuple[int, int] | None:
    """Returns the limit of processes and threads with the fewest left, and how many are in use; None without one."""
    pairs = [_numbers(folder / "pids.max") + _numbers(folder / "pids.current") for folder in _folders("pids")]
    known = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    return min(known, key=lambda pair: pair[0] - pair[1], default=None)


def _folders(controller: str) -> Iterator[Path]:
    """Yields the control groups of this process for a controller, each with the groups that contain it."""
    try:
        mounts = (PROCESS / "mountinfo").read_text().splitlines()
        groups = (PROCESS / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths = {}  # by controller; version 2 has the empty name
    for line in groups:
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), path)
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, mount = map(_unescaped, left.split()[3:5])
        kind, _, options = right.split(maxsplit=2)
        is_mounted = kind == "cgroup2" or (kind == "cgroup" and controller in re.split("[ ,]", options))
        path = paths.get("" if kind == "cgroup2" else controller)
        if not is_mounted or path is None:
            continue
        # A container may see its own group as the root of the mount, under the path that it has on the host.
        inside = PurePosixPath(path).relative_to(root) if PurePosixPath(path).is_relative_to(root) else PurePosixPath()
        for part in (inside, *inside.parents):
            yield Path(mount, part)


def _unescaped(path: str) -> str:
    r"""Decodes a path of mountinfo, where a space is `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _numbers(path: Path) -> list[int]:
    """Returns the numbers of a limit file; empty if there is no such file or it says that there is no limit."""
    try:
        words = path.read_text().split()
        return [int(word) for word in words] if words and words[0] not in ("max", "-1") else []
    except (OSError, ValueError):
        return []
