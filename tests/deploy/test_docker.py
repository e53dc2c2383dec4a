"""deploy/docker: what the image copies is all that a campaign needs, and it is installed as the README says."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
LINES = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
COPIED = [line.split()[1:] for line in LINES if line.startswith("COPY ")]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder /app of the image: what its COPY lines put there."""
    app = tmp_path_factory.mktemp("app")
    for *sources, target in COPIED:
        for source in sources:
            path = ROOT / source
            if path.is_dir():
                shutil.copytree(path, app / target)
            else:
                shutil.copy(path, app / target)
    return app


def test_every_file_that_is_copied_is_sent_to_docker() -> None:
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert {source for *sources, _ in COPIED for source in sources} == set(kept)
    assert fnmatch.filter(ignored, "*__pycache__*")


def test_the_image_installs_the_project_as_the_readme_does_and_runs_as_a_user() -> None:
    (install,) = (line for line in LINES if "pip install" in line)
    (readme,) = re.findall(r"^(pip install .*) &&.*quickstart", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert [word for word in readme.split() if word not in install.split()] == []
    assert '--extra-index-url "$TORCH"' in install and any(line.startswith("ARG TORCH=") for line in LINES)
    assert LINES.index("USER 1000") > LINES.index(install)


@pytest.mark.slow
def test_a_campaign_can_be_planned_with_the_files_of_the_image_alone(image: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "run_campaign.py", "experiments/quickstart.yaml", "--plan", "--json"]
    done = subprocess.run(
        command,
        cwd=image,
        env=environment | {"NGPT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert '"trials"' in done.stdout


def test_every_command_in_the_dockerfile_names_it_and_its_arguments() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    builds = re.findall(r"docker build (.*)", text)
    arguments = {name for build in builds for name in re.findall(r"--build-arg (\w+)=", build)}
    assert len(builds) == 2 and all(f"-f {DOCKERFILE.relative_to(ROOT)}" in build for build in builds)
    assert arguments <= set(re.findall(r"^ARG (\w+)", text, flags=re.M))
