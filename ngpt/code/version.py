"""Which version of this program runs, how it is installed, and how its user calls it.

Only the standard library is imported, since a command that lacks its packages says so with what is here.
"""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

PROGRAM = "ngpt-campaign"  # the name of the distribution and of its command
SCRIPT = "python run_campaign.py"  # the same command in a checkout
FOLDER = Path(__file__).resolve().parent
GIT = ("git", "-C", str(FOLDER))
SHOWN_PACKAGES = ("torch", "ray")  # by --version
SHORT_COMMIT = 12  # hex digits


def checkout() -> Path | None:
    """The folder of the source tree that this code is in; None for an installed package."""
    root = FOLDER.parents[1]
    project = root / "pyproject.toml"  # among installed packages there may be that of another project
    return root if project.is_file() and f'name = "{PROGRAM}"' in project.read_text(encoding="utf-8") else None


def command() -> str:
    """How the user calls this program, for messages and for the command that resumes a run."""
    called = Path(sys.argv[0]).name if sys.argv else ""
    return SCRIPT if called != PROGRAM and checkout() else PROGRAM


def install_command() -> str:
    """The command that installs this program with all packages that it needs, for the Python that runs."""
    root = checkout()
    what = ["-e", str(root)] if root else [PROGRAM]
    return shlex.join([sys.executable or "python3", "-m", "pip", "install", *what])


def version(package: str) -> str | None:
    """The version of an installed package, read from its metadata; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_version() -> str | None:
    """The version of this program. A checkout says it itself, since another version may be installed beside it."""
    if (root := checkout()) is None:
        return version(PROGRAM)
    import tomllib

    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def commit() -> str | None:
    """The git commit of this code; None outside a checkout, or if git refuses (see `git_problem`)."""
    # Only if git tracks this file: an installed copy may lie inside the checkout of another project.
    return output(*GIT, "rev-parse", "HEAD") if output(*GIT, "ls-files", Path(__file__).name) else None


def is_changed() -> bool | None:
    """Whether tracked files differ from the commit; None without one."""
    changed = output(*GIT, "status", "--porcelain", "--untracked-files=no") if commit() else None
    return None if changed is None else bool(changed)


def git_problem() -> str | None:
    """Why git cannot tell the commit of this code, in git's own words; None if it can, or without a checkout."""
    if checkout() is None or not any((folder / ".git").exists() for folder in FOLDER.parents):
        return None
    try:
        done = subprocess.run([*GIT, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return " ".join(done.stderr.split()) or f"git exits with {done.returncode}" if done.returncode else None


def version_text() -> str:
    """What `--version` prints: this program with its commit, then Python, torch and Ray, which are not imported."""
    number = commit()
    source = f", commit {number[:SHORT_COMMIT]}{' with changes' if is_changed() else ''}" if number else ""
    packages = [f"{name} {version(name) or 'not installed'}" for name in SHOWN_PACKAGES]
    return f"{PROGRAM} {own_version()}{source}\n{', '.join([f'Python {platform.python_version()}', *packages])}"


def output(*command: str, timeout: float | None = None) -> str | None:
    """The output of a command without surrounding white space; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
