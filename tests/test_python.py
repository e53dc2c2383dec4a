"""What a user of Python meets: the page, the notebook, the types and an interrupted kernel."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.helpers.clean_install import build, install, sources
from tests.helpers.tiny_campaign import write_file
from tune import load_results
from tune.judged import JUDGED_COLUMNS
from tune.rows import CLAIM_COLUMNS, COMPARED_COLUMNS, METRICS, PLANNED_COLUMNS, RECORD_COLUMNS

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
SCRIPT = ROOT / "tests" / "helpers" / "user_script.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def script(module: str, *arguments: str, cwd: Path) -> None:
    """Runs a helper in a process of its own: Jupyter's client leaves sockets and loops open."""
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr


def needs(*packages: str) -> Any:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def test_the_page_names_every_public_function_and_column() -> None:
    words = {word for code in re.findall(r"`([^`\n]+)`", PAGE) for word in re.findall(r"[\w.]+", code)}
    columns = {*CLAIM_COLUMNS, *PLANNED_COLUMNS, *JUDGED_COLUMNS, *RECORD_COLUMNS} - METRICS.keys()
    columns |= {name for name in COMPARED_COLUMNS if not name.startswith(("delta.", "tokens_per_second."))}
    assert columns - words == set()
    functions = {"load_campaign", "plan", "run", "load_results", "compare", "judge"}
    assert {f"tune.{name}" for name in functions} | {"ngpt.train", "ngpt.load_model", "ngpt.generate"} <= words


def test_the_notebook_shows_a_real_run_and_nothing_of_its_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4 and all(cell["outputs"] for cell in cells)
    assert not re.search(r"/(tmp|home|root|work|Users)\b|tok/s|wall time", text)
    assert "stderr" not in {output.get("name") for cell in cells for output in cell["outputs"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs("polars")
def test_every_block_of_the_page_runs_as_one_script(tmp_path: Path) -> None:
    (yaml,) = blocks("yaml")
    (tmp_path / "question.yaml").write_text(yaml, encoding="utf-8")
    assert len(blocks("python")) >= 7
    (tmp_path / "user.py").write_text("\n".join(blocks("python")), encoding="utf-8")
    command = [sys.executable, "-W", "error", "user.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    assert "0 finished " in done.stdout and done.stdout.count("identical in every trial") == 2
    assert "unknown setting, did you mean 'alpha'?" in done.stdout
    assert len(load_results(tmp_path / "results" / "question").trials) == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs("ipykernel", "nbclient", "polars")
def test_the_notebook_can_be_executed_and_shows_the_same_kinds_of_output(tmp_path: Path) -> None:
    copy = tmp_path / "again.ipynb"
    script("tests.helpers.notebook", str(NOTEBOOK), str(copy), cwd=tmp_path)
    kept, again = (json.loads(path.read_text(encoding="utf-8"))["cells"] for path in (NOTEBOOK, copy))
    shown = [[output["output_type"] for output in cell.get("outputs", [])] for cell in again]
    assert shown == [[output["output_type"] for output in cell.get("outputs", [])] for cell in kept]
    assert "question: finished, 6 of 6 trials" in copy.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs("ipykernel", "jupyter_client")
def test_the_stop_button_of_a_notebook_saves_and_the_kernel_goes_on(tmp_path: Path, corpus: Path) -> None:
    """An event loop runs in the kernel, and its command line must not get into results."""
    write_file(tmp_path, corpus, phases="\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n", seeds="[1]")
    script("tests.helpers.stop_button", cwd=tmp_path)
    assert load_results(tmp_path / "results" / "tiny").status == "interrupted"
    assert load_results(tmp_path / "short" / "tiny").status == "finished"
    assert list(tmp_path.glob("results/tiny/trials/*/checkpoints/step_*"))
    assert b"ipykernel" not in b"".join(path.read_bytes() for path in tmp_path.glob("*/tiny/*.json*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs("pyright", "polars", "build", "hatchling")
def test_a_users_script_passes_the_strict_type_checker(tmp_path: Path) -> None:
    """With the built wheel, as a user has it, whose types count only because it says so."""
    (source := tmp_path / "source").mkdir()
    installed = install(build(sources(source), tmp_path / "dist")[1], tmp_path / "installed")
    (work := tmp_path / "work").mkdir()
    shutil.copy(SCRIPT, work / "user.py")
    (work / "wrong.py").write_text("from tune import run\n\nrun('a', inlin=True)\nrun('a').exit_code.upper()\n")
    (work / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--pythonpath",
        str(installed.folder / "bin" / "python"),
        "--outputjson",
    ]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=580)
    found = json.loads(done.stdout)["generalDiagnostics"]
    rules = {name: [each["rule"] for each in found if each["file"].endswith(name)] for name in ("user.py", "wrong.py")}
    assert rules["user.py"] == [], found
    assert {"reportCallIssue", "reportAttributeAccessIssue"} <= {*rules["wrong.py"]}
