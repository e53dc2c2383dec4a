"""What is sent to the nodes of a cluster, as a runtime environment of Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.code.digest import current_code
from tune.cluster.address import JOB_VARIABLE
from tune.cluster.shipping import OVERRIDE_VARIABLE, code_environment, stage_code


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    monkeypatch.delenv("NGPT_CACHE", raising=False)
    monkeypatch.setenv(OVERRIDE_VARIABLE, "0")


@pytest.mark.slow
def test_the_staged_code_runs_alone_and_is_the_code_of_this_process(tmp_path: Path) -> None:
    stage_code(tmp_path)
    assert not list(tmp_path.rglob("__pycache__"))
    code = "import ngpt.kernels, tune.trials.trial as t; print(t.current_code().folder, t.current_code().digest)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(tmp_path / "ngpt"), current_code().digest], done.stderr
    assert (tmp_path / "ngpt/kernels/softmax.cpp").is_file()  # compiled on the node
    assert list((tmp_path / "tune").rglob("*.html.j2"))


def test_the_code_is_the_working_directory_of_the_workers(tmp_path: Path) -> None:
    assert code_environment(tmp_path) == {"working_dir": str(tmp_path)}


def test_a_cache_that_is_set_here_holds_on_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPT_CACHE", "/shared/cache")
    assert code_environment(tmp_path)["env_vars"] == {"NGPT_CACHE": "/shared/cache"}


def test_inside_a_job_the_code_is_added_to_the_modules_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"runtime_env": {"working_dir": "gcs://a.zip", "py_modules": ["gcs://b.zip"]}}
    monkeypatch.setenv(JOB_VARIABLE, json.dumps(job))
    added = [str(tmp_path / "ngpt"), str(tmp_path / "tune")]
    assert code_environment(tmp_path) == {"py_modules": ["gcs://b.zip", *added]}
    assert os.environ[OVERRIDE_VARIABLE] == "1"  # without it, Ray refuses two lists of modules


def test_a_job_without_a_folder_gets_the_code_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"runtime_env": {"env_vars": {"A": "b"}}}))
    assert code_environment(tmp_path) == {"working_dir": str(tmp_path)}
