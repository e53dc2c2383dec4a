"""Files that are plug-ins, and a process without plug-ins again after each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ngpt.plugins.load import forget_plugins

RULE = """\
from ngpt.model.residual import RESIDUAL_RULES


def mine(x, f, alpha, norm):
    return norm(x + 0.9 * alpha * f)


RESIDUAL_RULES["mine"] = mine
"""


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves out installed plug-ins, and forgets those that the test loads."""
    monkeypatch.setenv("NGPT_PLUGINS", "none")
    monkeypatch.setattr("ngpt.config.base.ORIGINS", {})
    yield
    forget_plugins()


def write(folder: Path, text: str = RULE, name: str = "mine.py") -> str:
    """Writes a plug-in, as somebody would name it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def install(folder: Path, package: str, text: str) -> None:
    """Installs a package with a plug-in, as pip would."""
    write(folder, text, f"{package}/rules.py")
    about = folder / f"{package}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[ngpt.plugins]\nrules = {package}.rules\n")
