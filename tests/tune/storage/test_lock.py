"""One run at a time on a results directory; a second one is refused at once."""

import os
import subprocess
import sys
from pathlib import Path

from tune.storage.lock import ResultsLock


def test_a_second_command_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("campaign: one\nphases: []\n")
    program = f"""
import sys, run_campaign
code = run_campaign.main([{str(tmp_path / "one.yaml")!r}, "--out", {str(tmp_path)!r}])
print(code, "torch" in sys.modules)
"""
    running = ResultsLock(tmp_path / "one")
    running.acquire()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    running.release()
    assert done.stdout == "3 False\n" and f"(process {os.getpid()})" in done.stderr
