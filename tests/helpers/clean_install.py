"""A wheel built from the sources, and an environment in which nothing but this wheel provides the project.

The packages that it needs come from the environment of the tests, since downloading them would take gigabytes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

OURS = ("ngpt_campaign", "__editable__")  # how the names of an installed copy of this project start


def sources(target: Path) -> Path:
    """Copies what git tracks, or would track, so that nothing is built into the checkout."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """Builds the source distribution, and from that the wheel, as `python -m build` does for a release."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def plain_environment() -> dict[str, str]:
    """The environment of the tests without what leads Python to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the wheel, and an empty folder to work in."""

    folder: Path
    work: Path

    def __call__(self, *command: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment in the empty folder."""
        with self.start(*command) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """Starts a program of the environment in the empty folder."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = plain_environment() | {"PATH": path, "NGPT_CACHE": str(self.folder / "cache")}
        words = [str(self.folder / "bin" / command[0]), *map(str, command[1:])]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, cwd=self.work, env=environment, stdout=pipe, stderr=pipe, text=True)


def install(what: Path, folder: Path, *, editable: bool = False) -> Installation:
    """Installs a wheel, or the sources as with `pip install -e`, into a new virtual environment in `folder`."""
    environment, work = folder / "environment", folder / "work"
    venv.create(environment, with_pip=False, symlinks=True)
    work.mkdir(parents=True)
    (site,) = environment.glob("lib/python*/site-packages")
    link_packages(site)
    python = environment / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "-e", str(what)] if editable else [str(what)]
    done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return Installation(environment, work)


def link_packages(site: Path) -> None:
    """Links every installed package but this project into `site`.

    A .pth file would also run those of the environment of the tests, and with them lead to its checkout.
    """
    for name in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(name).iterdir():
            if not path.name.startswith(OURS) and path.suffix != ".pth" and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
