"""The wheel: what it contains, and that it works in an empty folder without the checkout."""

import json
import subprocess
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from ngpt.code.digest import current_code
from ngpt.code.version import own_version
from tests.helpers import ROOT
from tests.helpers.clean_install import Installation, build, install, sources
from tune.spec.shipped import shipped

pytestmark = pytest.mark.slow
pytest.importorskip("build")
pytest.importorskip("hatchling")


def tracked(*folders: str) -> set[str]:
    """Files that git has, or would get with `git add`."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    return {name for name in subprocess.check_output(command, text=True).split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(sources(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def run(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return install(built[1], tmp_path_factory.mktemp("installed"))


def test_the_wheel_has_every_file_of_the_packages_and_the_experiments(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    experiments = {f"tune/{name}" for name in tracked("experiments")}
    assert names == tracked("ngpt", "tune") | experiments | {"run_campaign.py"}
    for name in (
        "tune/report/report.html.j2",
        "ngpt/kernels/softmax.cpp",
        "ngpt/kernels/fast_exp.h",
        "ngpt/py.typed",
        "tune/py.typed",
    ):
        assert name in names


def test_the_source_distribution_has_every_file_that_git_tracks(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert names - {"PKG-INFO"} == tracked()


def test_the_metadata_say_what_it_is(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (folder,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = message_from_string(wheel.read(f"{folder}/METADATA").decode())
        assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert (metadata["Name"], metadata["License-Expression"]) == ("ngpt-campaign", "MIT")
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(requirement.startswith("wandb") for requirement in metadata.get_all("Requires-Dist") or [])


def test_an_editable_installation_leads_to_the_sources_and_copies_nothing(tmp_path: Path) -> None:
    source = sources(tmp_path / "source")
    run = install(source, tmp_path / "installed", editable=True)
    (site,) = run.folder.glob("lib/python*/site-packages")
    own = {path.name for path in site.iterdir() if not path.is_symlink()}
    assert own == {"_ngpt_campaign.pth", f"ngpt_campaign-{own_version()}.dist-info"}
    done = run("python", "-c", "from tune.spec.shipped import shipped; print(shipped()[0].path)")
    assert done.stdout.startswith(f"{source}/experiments/"), done.stderr
    assert run("ngpt-campaign", "--version").stdout.startswith(f"ngpt-campaign {own_version()}\n")


def test_the_command_is_the_installed_one_and_knows_its_version(run: Installation) -> None:
    where = run("python", "-c", "import ngpt, tune, run_campaign as r; print(ngpt.__path__, tune.__path__, r.__file__)")
    assert where.stdout.count(str(run.folder)) == 3 and str(ROOT) not in where.stdout, where.stderr
    for command in (["ngpt-campaign", "--version"], ["python", "-m", "ngpt.train", "--version"]):
        done = run(*command)
        assert done.stdout.startswith(f"ngpt-campaign {own_version()}\nPython 3."), done.stderr
    usage = run("ngpt-campaign", "--help").stdout
    assert usage.startswith("usage: ngpt-campaign ") and "python run_campaign.py" not in usage


def test_its_code_has_the_digest_of_the_checkout(run: Installation) -> None:
    done = run("python", "-c", "from ngpt.code.digest import current_code as c; print(c().digest, c().folder)")
    digest, folder = done.stdout.split()
    assert digest == current_code().digest and folder.startswith(str(run.folder))


def test_it_sends_itself_to_the_nodes_of_a_cluster(run: Installation) -> None:
    code = "import pathlib; from tune.cluster.shipping import stage_code as s; print(*s(pathlib.Path('staged')))"
    assert run("python", "-c", code).returncode == 0
    staged = {str(path.relative_to(run.work / "staged")) for path in (run.work / "staged").rglob("*.*")}
    assert {name for name in tracked("ngpt", "tune") if "." in Path(name).name} <= staged
    report = "from tune.trials.trial import current_code as c; print(c().digest, c().folder)"
    command = f"import sys; sys.path.insert(0, 'staged'); {report}"
    done = run("python", "-c", command)
    assert done.stdout.split() == [current_code().digest, str(run.work / "staged" / "ngpt")], done.stderr


def test_a_shipped_experiment_is_copied_and_planned_without_the_checkout(run: Installation) -> None:
    """It is trained in test_user_journey.py."""
    listed = run("ngpt-campaign", "new").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [each.name for each in shipped()]
    made = run("ngpt-campaign", "new", "baseline", "--out", "mine.yaml")
    assert (made.returncode, made.stderr) == (0, "next: ngpt-campaign mine.yaml --plan\n")
    assert sorted(made.stdout.splitlines()) == ["mine.yaml", "models/1.3M.yaml", "models/30.5M.yaml"]
    planned = run("ngpt-campaign", "mine.yaml", "--plan", "--json", "--set", "model=models/30.5M.yaml", "steps=2")
    assert json.loads(planned.stdout)["trials"] > 50, planned.stderr


@pytest.mark.parametrize("package", ["torch", "ruamel", "pydantic"])
def test_without_a_package_it_says_how_to_install_it(package: str, run: Installation, tmp_path: Path) -> None:
    (site,) = run.folder.glob("lib/python*/site-packages")
    hidden = site / package
    target = hidden.readlink()
    hidden.unlink()
    try:
        done = run("ngpt-campaign", "new", "phase2", "--out", tmp_path)
        if done.returncode == 0:  # copying needs no torch
            done = run("ngpt-campaign", tmp_path / "phase2.yaml", "--plan")
    finally:
        hidden.symlink_to(target)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"the package {package}")
    assert line.endswith(f"{run.folder}/bin/python -m pip install ngpt-campaign")
