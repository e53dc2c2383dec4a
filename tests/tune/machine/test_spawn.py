"""Processes that are started by a script without a guard."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing
from tune.machine.spawn import hide_main_module

print("begun", flush=True)
process = multiprocessing.get_context("spawn").Process(target=print, args=("child",))
with hide_main_module():
    process.start()
process.join()
print(process.exitcode, __name__)
"""


@pytest.mark.parametrize("is_file", [True, False])
def test_a_child_does_not_run_the_script_of_its_parent(tmp_path: Path, is_file: bool) -> None:
    """By default a script without a guard would start its campaign again, and one from stdin is not found."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path) if is_file else "-"]
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        command, input=SCRIPT, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": ""}, timeout=60
    )
    assert (done.stdout.split(), done.stderr) == (["begun", "child", "0", "__main__"], "")
