"""What a node says of itself; tests/test_cluster_code.py asks real ones."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ngpt
from ngpt.code.digest import current_code
from tune.cluster import node_report
from tune.cluster.node_report import report_node


def test_a_node_reports_its_versions_and_code() -> None:
    report = report_node(["torch", "no-such-package"])
    assert report["python"] == platform.python_version()
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["versions"]["no-such-package"] is None
    assert report["code"] == {"digest": current_code().digest, "folder": ngpt.__path__[0]}


def test_a_node_without_the_project_reports_why(tmp_path: Path) -> None:
    source = Path(str(node_report.__file__)).read_text()
    code = f"{source}\nprint(report_node([])['code'])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'ngpt'" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["torch", "ray", "numpy"])
def test_no_package_is_imported_for_its_version(name: str) -> None:
    code = f"import sys, tune.cluster.node_report as r; r.report_node(['{name}']); print('{name}' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.slow
def test_a_node_without_a_compiler_says_so_if_the_campaign_compiles() -> None:
    assert "compiler" not in report_node([])
    code = "import tune.cluster.node_report as r; print(r.report_node([], compile_for='cpu')['compiler'])"
    environment = os.environ | {"CXX": "/no/such/compiler"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("compile: true needs a C++ compiler: install g++ or name a compiler"), done.stderr
