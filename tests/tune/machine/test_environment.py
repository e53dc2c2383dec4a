"""Facts about the machine: flat scalars without secrets, and warnings about GPUs that others use."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tune.machine import environment
from tune.machine.environment import describe, version


def test_a_machine_is_described_in_flat_scalars() -> None:
    facts = describe("cpu")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert all(isinstance(value, str | int | bool | None) for value in facts.values())
    assert facts["device"].startswith("cpu (") and facts["torch"] == version("torch")
    assert facts["cpus"] >= 1 and facts["memory_bytes"] > 1 << 28


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert version("no-such-package-at-all") is None
    assert version("torch") == torch.__version__


def test_the_commit_is_that_of_the_checkout_with_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the working directory does not matter
    folder = Path(environment.__file__).parent
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = head.stdout.strip() if head.returncode == 0 else None
    facts = describe("cpu")
    assert facts["git_commit"] == expected
    assert facts["git_dirty"] in ((True, False) if expected else (None,))


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    facts = describe("cpu")
    assert facts["git_commit"] is None and facts["git_dirty"] is None


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_code_of_another_projects_checkout_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "--message", "their own")
    monkeypatch.setattr(environment, "GIT", ("git", "-C", str(tmp_path)))  # as for a package in its virtual environment
    assert environment.commit() is None
    (tmp_path / "environment.py").touch()
    git(tmp_path, "add", "environment.py")
    assert len(environment.commit() or "") == 40


def test_a_git_that_refuses_the_folder_is_quoted_with_its_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (Path(environment.__file__).parents[2] / ".git").exists():
        pytest.skip("the code under test is not a checkout")
    assert environment.git_problem() is None
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its dubious-ownership check
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    problem = environment.git_problem() or ""
    assert "dubious ownership" in problem and "safe.directory" in problem and "\n" not in problem
    assert environment.commit() is None


def test_no_secret_of_the_environment_is_in_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-k3y")
    assert "s3cr3t-k3y" not in json.dumps(describe("cpu"))


def fake_driver(folder: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program that prints `output` in the place of nvidia-smi."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_each_visible_gpu_that_others_hold_gets_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["0, GPU-a0, 1024, 143771", "1, GPU-b1, 87040, 143771", "2, GPU-c2, [N/A], [N/A]"]
    fake_driver(tmp_path, "\n".join([*rows, "3, GPU-d3, 71680, 143771"]), monkeypatch)
    lines = environment.busy_gpus()
    assert [line.partition(";")[0] for line in lines] == [
        "GPU 1: 85.0 of 140.4 GiB are held by other processes",
        "GPU 3: 70.0 of 140.4 GiB are held by other processes",
    ]
    for visible, busy in {"0,3": ["GPU 3"], "GPU-b1,GPU-a0": ["GPU 1"], "": [], "MIG-GPU-b1/1/0": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [line[:5] for line in environment.busy_gpus()] == busy


def test_without_a_driver_or_a_gpu_there_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(tmp_path, "No devices were found", monkeypatch)
    assert environment.busy_gpus() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.busy_gpus() == []
