"""Which version runs: its number and commit, as a checkout and as an installed package, and how its user calls it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from ngpt.code import version
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the code as an installed package, in a virtual environment inside of another project's checkout."""
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "--message", "their own")
    shutil.copytree(ROOT / "ngpt" / "code", tmp_path / "site" / "ngpt" / "code")
    shutil.copy(ROOT / "ngpt" / "__init__.py", tmp_path / "site" / "ngpt")
    (tmp_path / "site" / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "9.9"\n')
    return tmp_path / "site"


def say(folder: Path, expression: str, *, called: str = "x") -> str:
    """What a process with the code in `folder` answers."""
    code = f"import sys; sys.argv[0] = {called!r}; from ngpt.code import version as v; print({expression})"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert version.version("no-such-package-at-all") is None
    assert torch.__version__.startswith(version.version("torch") or "none")  # "+cu130" is not always in the metadata


def test_a_checkout_says_its_own_version_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the working directory does not matter
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = head.stdout.strip() if head.returncode == 0 else None
    assert (version.checkout(), version.own_version(), version.commit()) == (ROOT, PROJECT["version"], commit)
    first, second = version.version_text().splitlines()
    assert first.startswith(f"ngpt-campaign {PROJECT['version']}, commit {commit[:12]}" if commit else "ngpt-campaign")
    assert re.search(r", torch \d[\w.+]*, ray \d[\w.]*$", second) and version.version("ray") in second


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert version.commit() is None and version.is_changed() is None
    assert version.version_text().startswith(f"ngpt-campaign {PROJECT['version']}\nPython ")


def test_an_installed_package_has_no_commit_and_the_version_of_its_metadata(installed: Path) -> None:
    facts = "v.checkout(), v.commit(), v.is_changed(), v.git_problem(), v.own_version() == v.version(v.PROGRAM)"
    assert say(installed, facts) == "None None None None True"
    git(installed, "add", "ngpt/code/version.py")  # git tracks the file, but has no project of ours
    assert len(say(installed, "v.commit()")) == 40
    metadata = installed / "ngpt_campaign-7.8.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ngpt-campaign\nVersion: 7.8\n")
    assert say(installed, "v.version_text()").startswith("ngpt-campaign 7.8, commit ")


@pytest.mark.parametrize(
    ("called", "in_checkout", "elsewhere"),
    [
        ("run_campaign.py", "python run_campaign.py", "ngpt-campaign"),
        ("/bin/ngpt-campaign", "ngpt-campaign", "ngpt-campaign"),
        ("ipykernel_launcher.py", "python run_campaign.py", "ngpt-campaign"),
    ],
)
def test_messages_name_the_command_as_it_is_called(
    called: str, in_checkout: str, elsewhere: str, installed: Path
) -> None:
    assert say(ROOT, "v.command()", called=called) == in_checkout
    assert say(installed, "v.command()", called=called) == elsewhere


def test_the_command_that_installs_names_this_python(installed: Path) -> None:
    python, *words = shlex.split(version.install_command())
    assert (python, words) == (sys.executable, ["-m", "pip", "install", "-e", str(ROOT)])
    assert shlex.split(say(installed, "v.install_command()"))[-1] == PROJECT["name"]


def test_a_git_that_refuses_the_folder_is_quoted_with_its_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the code under test is not a checkout")
    assert version.git_problem() is None
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its dubious-ownership check
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    problem = version.git_problem() or ""
    assert "dubious ownership" in problem and "safe.directory" in problem and "\n" not in problem
    assert version.commit() is None
