"""Facts about the machine: flat scalars without secrets, and warnings about GPUs that others use."""

import json
from pathlib import Path

import pytest

from ngpt.code.version import commit, own_version, version
from tune.machine import environment
from tune.machine.environment import describe


def test_a_machine_is_described_in_flat_scalars() -> None:
    facts = describe("cpu")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert all(isinstance(value, str | int | bool | None) for value in facts.values())
    assert facts["device"].startswith("cpu (") and facts["torch"] == version("torch")
    assert facts["cpus"] >= 1 and facts["memory_bytes"] > 1 << 28


@pytest.mark.parametrize("is_checkout", [True, False])
def test_the_description_names_the_version_and_the_commit_of_a_checkout(
    is_checkout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_checkout:  # an installed package, or a checkout without git
        monkeypatch.setenv("PATH", "/nowhere")
    elif commit() is None:
        pytest.skip("the code under test is not a checkout")
    facts = describe("cpu")
    assert facts["ngpt_campaign"] == own_version()
    assert (facts["git_commit"] == commit()) and (facts["git_commit"] is not None) == is_checkout
    assert facts["git_dirty"] in ((True, False) if is_checkout else (None,))


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
