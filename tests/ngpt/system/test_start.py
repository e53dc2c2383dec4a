"""What a command says where it cannot run: on an old Python, and without its packages."""

import ast
import itertools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ngpt.system.cli import run_command
from ngpt.system.start import OLDEST_PYTHON, missing_package
from tests.helpers import ROOT

COMMANDS = [
    ["run_campaign.py", "status", "nowhere"],
    ["run_campaign.py", "experiments/quickstart.yaml", "--plan"],
    ["-m", "ngpt.train"],
    ["-m", "ngpt.bench", "step"],
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python in the checkout, without the packages that the tests import."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_missing_package_is_one_line_with_the_python_and_the_command_that_installs_it(command: list[str]) -> None:
    done = run(sys.executable, "-S", *command)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("the package ") and f" is not installed for {sys.executable};" in line
    assert line.endswith(f"{sys.executable} -m pip install -e {ROOT}")


def test_help_and_versions_need_no_package() -> None:
    for argument in ("--help", "--version"):
        done = run(sys.executable, "-S", "run_campaign.py", argument)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout
    assert done.stdout.rstrip().endswith("torch not installed, ray not installed")


def test_a_package_is_called_as_pip_calls_it(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise ModuleNotFoundError("No module named 'ruamel'", name="ruamel")

    assert run_command(command) == 2
    assert capsys.readouterr().err.startswith("the package ruamel.yaml is not installed for ")


@pytest.mark.parametrize("name", ["ngpt.no_such_file", "tune", "_lzma", None])
def test_a_module_of_no_known_package_is_not_reported_as_a_missing_package(name: str | None) -> None:
    """A bug of ours, or a Python that was built without a part of it, keeps its traceback."""
    assert missing_package(ModuleNotFoundError("No module", name=name)) is None
    assert missing_package(ImportError("cannot load", name="torch")) is None


def test_the_oldest_python_is_that_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = ".".join(map(str, OLDEST_PYTHON))
    assert project["requires-python"] == f">={oldest}"
    numbers = [entry.rpartition(" ")[2] for entry in project["classifiers"] if ":: Python :: 3." in entry]
    assert numbers[0] == oldest and len(numbers) >= 3


@pytest.mark.parametrize(
    "name", ["run_campaign.py", "ngpt/__init__.py", "ngpt/system/__init__.py", "ngpt/system/start.py", "ngpt/train.py"]
)
def test_an_old_python_can_read_what_refuses_it(name: str) -> None:
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))


def old_pythons() -> list[Path]:
    """Pythons of this machine that are too old, found on the path or where pyenv keeps them."""
    names = [f"python3.{minor}" for minor in range(8, OLDEST_PYTHON[1])]
    found = [Path(path) for name in names if (path := shutil.which(name))]
    found += [path for name in names for path in Path.home().glob(f".pyenv/versions/*/bin/{name}")]
    return [path for path in found if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]


def test_an_old_python_is_refused_in_one_line() -> None:
    found = old_pythons()
    if not found:
        pytest.skip("no Python older than 3.11 on this machine")
    for python, command in itertools.product({found[0], found[-1]}, (COMMANDS[0], COMMANDS[2])):
        done = run(str(python), *command)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("Python 3.11 or newer is needed, but ") and done.stderr.count("\n") == 1
