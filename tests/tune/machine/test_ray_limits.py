"""Limits of a machine under which Ray cannot start are named in one line, with the value and what to do."""

import os
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from tune.machine import ray_limits
from tune.machine.ray_limits import (
    BASE_THREADS,
    MIN_ADDRESS_SPACE,
    OBJECT_STORE,
    WORKER_THREADS,
    limit_hint,
    ray_folder_problem,
    ray_limit_problem,
    ray_root,
)

Usage = namedtuple("Usage", "total used free")
UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """The limits of this process, which a test may change; without a container, and not as root."""
    known = dict.fromkeys(range(16), (UNLIMITED, UNLIMITED))
    monkeypatch.setattr(resource, "getrlimit", known.__getitem__)
    monkeypatch.setattr(ray_limits, "process_limit", lambda: None)
    monkeypatch.setattr(ray_limits, "_threads_of_user", lambda: 100)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    return known


def one_line(problem: str | None) -> str:
    assert problem is not None
    (line,) = problem.splitlines()
    return line


def test_without_limits_there_is_no_problem(limits: dict[int, tuple[int, int]]) -> None:
    assert ray_limit_problem(workers=1000) is None and limit_hint() == ""


def test_a_small_address_space_is_a_problem(limits: dict[int, tuple[int, int]]) -> None:
    limits[resource.RLIMIT_AS] = (3 << 30, UNLIMITED)
    line = one_line(ray_limit_problem())
    assert line.startswith("ulimit -v is 3.0 GiB, and Ray needs 4.0 GiB") and "raise it" in line and "--inline" in line


def test_an_address_space_that_may_be_too_small_is_named_only_when_ray_fails(
    limits: dict[int, tuple[int, int]],
) -> None:
    limits[resource.RLIMIT_AS] = (MIN_ADDRESS_SPACE, UNLIMITED)
    assert ray_limit_problem() is None
    assert "; ulimit -v is 4.0 GiB, which may be too little" in limit_hint()
    limits[resource.RLIMIT_DATA] = (1 << 30, UNLIMITED)
    assert "; ulimit -v is 4.0 GiB and ulimit -d is 1.0 GiB, which may be too little" in limit_hint()


def test_too_few_processes_are_a_problem_unless_root_asks(
    limits: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = BASE_THREADS + 4 * WORKER_THREADS
    limits[resource.RLIMIT_NPROC] = (100 + needed, UNLIMITED)
    assert ray_limit_problem(workers=4) is None
    line = one_line(ray_limit_problem(workers=5))
    assert line.startswith(f"ulimit -u is {100 + needed} with 100 in use, and Ray needs {needed + WORKER_THREADS} more")
    assert f"raise it by {WORKER_THREADS}," in line
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert ray_limit_problem(workers=5) is None


def test_the_limit_of_processes_of_a_container_counts_for_root_too(
    limits: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(ray_limits, "process_limit", lambda: (100, 20))
    assert one_line(ray_limit_problem()).startswith("the container's limit of processes (pids.max) is 100 with 20 in")


def test_too_few_open_files_are_a_problem_only_if_ray_cannot_raise_the_limit(
    limits: dict[int, tuple[int, int]],
) -> None:
    limits[resource.RLIMIT_NOFILE] = (100, 4096)
    assert ray_limit_problem() is None
    limits[resource.RLIMIT_NOFILE] = (100, 100)
    line = one_line(ray_limit_problem())
    assert line.startswith("ulimit -n is 100, and Ray needs 168: raise it (ulimit -n 4096)")


# ---- the folder ------------------------------------------------------------------------------------------------------


def fill(monkeypatch: pytest.MonkeyPatch, *, folder: int, shared: int) -> None:
    """Leaves so many bytes free in Ray's folder and in /dev/shm."""
    free = {ray_limits.SHARED_MEMORY: shared}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free.get(Path(path), folder)))


def test_a_full_temporary_folder_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_folder_problem(tmp_path) is None
    fill(monkeypatch, folder=1 << 20, shared=1 << 40)
    line = one_line(ray_folder_problem(tmp_path))
    assert line.startswith(f"{tmp_path} has 1 MiB free, Ray's logs need 64 MiB: set TMPDIR to a folder")


def test_with_a_full_dev_shm_the_temporary_folder_needs_room_for_the_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_limits, "SHARED_MEMORY", tmp_path)  # not every machine has a /dev/shm
    fill(monkeypatch, folder=100 << 20, shared=OBJECT_STORE)
    assert ray_folder_problem(tmp_path / "..") is None
    fill(monkeypatch, folder=100 << 20, shared=OBJECT_STORE - 1)
    line = one_line(ray_folder_problem(tmp_path.parent))
    assert "with" in line and "full, Ray needs 320 MiB: set TMPDIR" in line


def test_a_folder_without_inodes_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=10_000, f_favail=7))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
    assert one_line(ray_folder_problem(tmp_path)).startswith(f"{tmp_path} has 7 inodes left (df -i)")


def test_a_folder_that_is_missing_or_read_only_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_line(ray_folder_problem(tmp_path / "none")).startswith(f"{tmp_path}/none is not a folder: set TMPDIR to")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert one_line(ray_folder_problem(tmp_path)).startswith(f"{tmp_path} is not writable: set TMPDIR to")


def test_a_temporary_folder_too_long_for_sockets_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for given, used in (("/scratch", "/scratch"), (f"/scratch/{'x' * 12}", "/tmp"), ("", "/tmp")):
        monkeypatch.setenv("TMPDIR", given)
        assert ray_root() == Path(used)
    monkeypatch.setenv("RAY_TMPDIR", "/local")
    assert ray_root() == Path("/local")
