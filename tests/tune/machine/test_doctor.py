"""The checks of `doctor`: each problem is reported before a campaign runs into it."""

import os
import resource
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from ngpt.code.version import install_command
from tests.helpers.plugin_files import RULE, install, no_plugins
from tune.machine import doctor
from tune.machine.doctor import Check, run_checks

__all__ = ["no_plugins"]
Usage = namedtuple("Usage", "total used free")


def check(name: str, out: Path) -> Check:
    return next(check for check in run_checks(out) if check.name == name)


def test_every_check_has_a_name_and_a_value(tmp_path: Path) -> None:
    checks = run_checks(tmp_path)
    assert len({check.name for check in checks}) == len(checks) >= len(doctor.CHECKS)
    assert all(check.value for check in checks)


def test_no_secret_of_the_environment_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-k3y")
    assert "s3cr3t-k3y" not in str(run_checks(Path("results")))


def test_the_checks_write_nothing(tmp_path: Path) -> None:
    run_checks(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_compiled_code_is_shown_with_the_command_that_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "a cache"
    monkeypatch.setenv("NGPT_CACHE", str(cache))
    assert check("compiled code", tmp_path).value == "0 B"
    for name, size in {"compiled/ab/graph": 1_500_000, "native/loop.so": 500_000, "corpus/tokens": 9}.items():
        (cache / name).parent.mkdir(parents=True)
        (cache / name).write_bytes(bytes(size))
    size, _, command = check("compiled code", tmp_path).value.partition("; to empty it: ")
    assert size == "2 MB"
    subprocess.run(command, shell=True, check=True)
    assert [path.name for path in cache.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("slowdown", "value"),
    [
        (40.4, "bfloat16 is emulated on this CPU: 40 x slower than float32; set dtype: float32"),
        (0.5, "2 x the speed of float32"),
    ],
)
def test_a_cpu_that_only_emulates_bfloat16_is_shown(
    slowdown: float, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpt.system.gpus.is_available", lambda: False)
    monkeypatch.setattr("ngpt.system.timing.bfloat16_slowdown", lambda: slowdown)
    assert check("bfloat16", tmp_path) == Check("bfloat16", value)


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 30))
    assert check("results", tmp_path).problem == "less than 2 GiB free"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
    assert check("results", tmp_path).problem is None


def test_no_room_for_rays_files_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("Ray's files", tmp_path).problem is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 20))
    found = check("Ray's files", tmp_path)
    assert "(1 MiB free)" in found.value and "set TMPDIR" in str(found.problem)


def test_the_limits_of_a_batch_system_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {resource.RLIMIT_AS: 1 << 30, resource.RLIMIT_NPROC: 10, resource.RLIMIT_NOFILE: 64}
    monkeypatch.setattr(resource, "getrlimit", lambda name: (small[name], small[name]))
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    names = {"address space": "ulimit -v is 1.0 GiB", "processes": "ulimit -u is 10", "open files": "ulimit -n is 64"}
    for name, start in names.items():
        assert str(check(name, tmp_path).problem).startswith(start)


def test_code_that_others_could_have_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "native").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o755)
    (tmp_path / "cache" / "native").chmod(0o700)
    assert check("compiled code", tmp_path).problem is None
    (tmp_path / "cache" / "native").chmod(0o777)
    problem = str(check("compiled code", tmp_path).problem)
    assert problem.startswith(f"not used, since {tmp_path}/cache/native can be written by other users")


def test_without_a_home_directory_the_variable_for_the_cache_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NGPT_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "set NGPT_CACHE to a folder" in str(check("corpora", tmp_path).problem)
    assert "token of its own" in check("home", tmp_path).value
    monkeypatch.setenv("NGPT_CACHE", "/dev/null/cache")
    assert check("corpora", tmp_path).problem == "not writable: set NGPT_CACHE to another folder"


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    assert check("results", tmp_path / "below").problem == f"{tmp_path} is not writable"


def test_results_below_a_file_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert check("results", tmp_path / "file" / "below").problem == f"{tmp_path / 'file'} is not a folder"


def test_a_missing_package_is_a_problem_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: None if name == "ray" else "1.0")
    problem: Any = check("packages", tmp_path).problem
    assert problem == f"not installed: ray; run {install_command()}"


def test_installed_plugins_are_listed_with_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "pkg_sound", RULE)
    install(tmp_path, "pkg_faulty", "import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    left_out = check("plug-ins", tmp_path)
    assert left_out.problem is None and left_out.value.endswith("(left out, since NGPT_PLUGINS is none)")
    monkeypatch.delenv("NGPT_PLUGINS")
    found = check("plug-ins", tmp_path)
    assert "pkg_sound.rules of pkg_sound" in found.value and "pkg_faulty.rules of pkg_faulty" in found.value
    problem = "the plug-in of the package pkg_faulty is left out: plug-in rules.py:1: ModuleNotFoundError: No module"
    assert found.problem is not None and found.problem.startswith(problem) and "pkg_sound" not in found.problem
