"""Control groups limit the cores and the memory that a process may use, as in containers and batch systems."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.system import cgroups
from ngpt.system.cgroups import cpu_quota, memory_limit, process_limit, usable_cpus

V1, V2 = "cgroup cgroup rw,{}", "cgroup2 cgroup2 rw"
AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Per case: the process's groups, mounts as (root, folder, kind), limit files, and the expected quota and memory limit.
CASES = {
    "version 2, limits of an outer group": (
        ["0::/job/step"],
        [("/", "all", V2)],
        {"all/job/cpu.max": "150000 100000", "all/job/step/cpu.max": "max 100000", "all/job/memory.max": "2048"},
        (1.5, 2048),
    ),
    "version 2, the smallest limit counts": (
        ["0::/job/step"],
        [("/", "all", V2)],
        {"all/job/cpu.max": "400000 100000", "all/job/step/cpu.max": "50000 100000", "all/job/step/memory.max": "max"},
        (0.5, None),
    ),
    "a container that sees its own group as the root": (
        ["0::/"],
        [("/", "all", V2)],
        {"all/cpu.max": "200000 100000", "all/memory.max": "4096"},
        (2.0, 4096),
    ),
    "version 1, a container without a namespace of its own": (
        ["3:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc"],
        [("/docker/abc", "cpu", V1.format("cpu,cpuacct")), ("/docker/abc", "memory", V1.format("memory"))],
        {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "8192"},
        (3.0, 8192),
    ),
    "version 1 without limits": (
        ["3:cpu:/a", "4:memory:/a"],
        [("/", "cpu", V1.format("cpu")), ("/", "memory", V1.format("memory"))],
        {
            "cpu/a/cpu.cfs_quota_us": "-1",
            "cpu/a/cpu.cfs_period_us": "100000",
            "memory/a/memory.limit_in_bytes": str(2**63 - 4096),
        },
        (None, None),
    ),
    "a mount point with a space": (["0::/"], [("/", r"a\040b", V2)], {"a b/cpu.max": "100000 100000"}, (1.0, None)),
    "no control groups": ([], [], {}, (None, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_limits_are_those_of_the_process_and_of_all_groups_around_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, mounts, files, expected = CASES[case]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    rows = [f"31 23 0:28 {root} {tmp_path}/{folder} rw,relatime shared:1 - {kind}" for root, folder, kind in mounts]
    (tmp_path / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/root rw\n" + "".join(f"{row}\n" for row in rows))
    (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    monkeypatch.setattr(cgroups, "PROCESS", tmp_path)
    assert (cpu_quota(), memory_limit()) == expected
    quota = expected[0]
    assert usable_cpus() == (AFFINITY if quota is None else max(1, min(AFFINITY, int(quota))))


@pytest.mark.parametrize("version", [1, 2])
def test_the_group_with_the_fewest_processes_left_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, kind = ("0::/job/step", V2) if version == 2 else ("8:pids:/job/step", V1.format("pids"))
    (tmp_path / "all" / "job" / "step").mkdir(parents=True)
    for folder, most, used in (("job/step", "max", "3"), ("job", "200", "150"), (".", "900", "200")):
        (tmp_path / "all" / folder / "pids.max").write_text(f"{most}\n")
        (tmp_path / "all" / folder / "pids.current").write_text(f"{used}\n")
    (tmp_path / "mountinfo").write_text(f"31 23 0:28 / {tmp_path}/all rw - {kind}\n")
    (tmp_path / "cgroup").write_text(f"{line}\n")
    monkeypatch.setattr(cgroups, "PROCESS", tmp_path)
    assert process_limit() == (200, 150)
    monkeypatch.setattr(cgroups, "PROCESS", tmp_path / "nothing")
    assert process_limit() is None


def test_outside_linux_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "PROCESS", tmp_path / "nothing")
    assert (cpu_quota(), memory_limit(), usable_cpus()) == (None, None, AFFINITY)


def test_a_real_quota_of_the_kernel_is_respected() -> None:
    folders = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")]
    parent = next((folder for folder in folders if (folder / "cgroup.procs").exists()), None)
    if parent is None or not os.access(parent, os.W_OK) or os.geteuid() != 0:
        pytest.skip("needs root and a writable control group of the CPU")
    group = parent / f"ngpt-test-{os.getpid()}"
    group.mkdir()
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text("120000 100000")
        elif (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("120000")
        else:
            pytest.skip("the controller `cpu` is not enabled for new control groups")
        code = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
        code += "from ngpt.system.cgroups import cpu_quota, usable_cpus; print(cpu_quota(), usable_cpus())"
        command = [sys.executable, "-c", code, str(group / "cgroup.procs")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.stdout, done.stderr) == ("1.2 1\n", "")
    finally:
        group.rmdir()
