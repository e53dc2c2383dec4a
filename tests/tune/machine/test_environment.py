"""What is said about the machine and the software: facts as flat scalars, and problems before they bite."""

import json
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from ray._private.utils import validate_socket_filepath

from tune.machine import environment
from tune.machine.environment import Check, describe, doctor, git_state, version

Usage = namedtuple("Usage", "total used free")


def check(name: str, out: Path) -> Check:
    return next(check for check in doctor(out) if check.name == name)


def test_a_machine_is_described_in_flat_scalars() -> None:
    about = describe("cpu")
    assert json.loads(json.dumps(about, allow_nan=False)) == about
    assert all(isinstance(value, str | int | bool | None) for value in about.values())
    assert about["device"].startswith("cpu (") and about["torch"] == version("torch")
    assert about["cpus"] >= 1 and about["memory_bytes"] > 1 << 28


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert version("no-such-package-at-all") is None
    assert version("torch") == torch.__version__


def test_the_commit_is_that_of_the_checkout_the_code_lies_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # wherever it is started
    folder = Path(environment.__file__).parent
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = head.stdout.strip() if head.returncode == 0 else None
    assert git_state()["git_commit"] == expected
    assert git_state()["git_dirty"] in ((True, False) if expected else (None,))


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_state() == {"git_commit": None, "git_dirty": None}


def test_no_secret_of_the_environment_is_in_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-k3y")
    assert "s3cr3t-k3y" not in json.dumps(describe("cpu"))
    assert "s3cr3t-k3y" not in str(doctor(Path("results")))


def test_every_check_has_a_name_and_a_value(tmp_path: Path) -> None:
    checks = doctor(tmp_path)
    assert len({check.name for check in checks}) == len(checks) == len(environment.CHECKS)
    assert all(check.value for check in checks)


def test_the_doctor_writes_nothing(tmp_path: Path) -> None:
    doctor(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_how_much_compiled_code_is_kept_is_said_with_the_command_that_empties_it(
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


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 30))
    assert check("results", tmp_path).problem == "less than 2 GiB free"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
    assert check("results", tmp_path).problem is None


def test_a_long_temporary_path_leaves_room_for_the_names_of_rays_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert environment.short_temporary() == "/scratch"
    monkeypatch.setenv("TMPDIR", f"/scratch/{'x' * 27}")
    assert environment.short_temporary() == "/tmp"
    monkeypatch.delenv("TMPDIR")
    assert environment.short_temporary() == "/tmp"
    longest = Path("/") / ("x" * (environment.LONGEST_TEMPORARY - 1))
    validate_socket_filepath(f"{longest}/ray/session_2026-11-21_19-00-59_197422_4194304/sockets/plasma_store")


def test_no_room_for_rays_files_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("Ray's files", tmp_path).problem is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 1 << 20))
    found = check("Ray's files", tmp_path)
    assert "(1 MiB free)" in found.value and "set TMPDIR" in str(found.problem)


def test_a_place_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    assert check("results", tmp_path / "below").problem == f"{tmp_path} is not writable"


def test_results_that_would_lie_below_a_file_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert check("results", tmp_path / "file" / "below").problem == f"{tmp_path / 'file'} is not a folder"


def test_a_missing_package_is_a_problem_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version", lambda name: None if name == "ray" else "1.0")
    problem: Any = check("packages", tmp_path).problem
    assert problem.startswith("not installed: ray; run pip install")


def fake_driver(folder: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the place of NVIDIA's that prints this."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_that_others_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(tmp_path, "0, 1024, 143771\n1, 87040, 143771\n2, [N/A], [N/A]\n3, 71680, 143771", monkeypatch)
    lines = environment.busy_gpus()
    assert [line.partition(";")[0] for line in lines] == [
        "GPU 1: 85.0 of 140.4 GiB are held by other processes",
        "GPU 3: 70.0 of 140.4 GiB are held by other processes",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert [line[:5] for line in environment.busy_gpus()] == ["GPU 3"]


def test_without_a_driver_or_an_answer_no_gpu_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(tmp_path, "No devices were found", monkeypatch)
    assert environment.busy_gpus() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.busy_gpus() == []
